"""Data sets in every layout, what happens to a picture on its way, and an order that is a function of (seed, epoch)."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.errors import InputError
from genkit.sources import read_examples, split
from genkit.training.cache import encoded
from genkit.training.data import HUES, Batch, Feed, Pictures, order, turn_hue
from genkit.training.recipe import Data
from tests.pictures import colour_folder


def data_of(path: Path | str, **fields: Any) -> Data:
    return Data.model_validate({"path": str(path), "validation": 0.0, **fields})


def pictures_of(path: Path | str, side: int = 16, **fields: Any) -> Pictures:
    data = data_of(path, **fields)
    return Pictures(read_examples(data), data, (side, side), 8, seed=3)


def png(colour: Any = (200, 10, 10), size: tuple[int, int] = (16, 16), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


# -- layouts --


def plain_folder(folder: Path) -> Path:
    return colour_folder(folder / "set", 4)


def jsonl_folder(folder: Path) -> Path:
    made = colour_folder(folder / "set", 4)
    lines = [{"file_name": f"{n:03d}.png", "text": (made / f"{n:03d}.txt").read_text()} for n in range(4)]
    (made / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return made


def csv_folder(folder: Path) -> Path:
    made = colour_folder(folder / "set", 4)
    with open(made / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption", "artist"])
        writer.writerows([f"{n:03d}.png", (made / f"{n:03d}.txt").read_text(), "somebody, once"] for n in range(4))
    return made


def shard(folder: Path) -> Path:
    made = colour_folder(folder / "set", 4)
    with tarfile.open(folder / "set.tar", "w") as tar:
        for path in sorted(made.iterdir(), reverse=True):
            tar.add(path, path.name)
    return folder / "set.tar"


def json_shard(folder: Path) -> Path:
    made = colour_folder(folder / "set", 4)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for n in range(4):
            content = json.dumps({"caption": (made / f"{n:03d}.txt").read_text(), "style": "flat"}).encode()
            info = tarfile.TarInfo(f"{n:03d}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            tar.add(made / f"{n:03d}.png", f"{n:03d}.png")
    return folder / "*.tar"


def parquet(folder: Path) -> Path:
    import pyarrow as arrow
    from pyarrow.parquet import write_table

    made = colour_folder(folder / "set", 4)
    cells = [{"bytes": (made / f"{n:03d}.png").read_bytes(), "path": None} for n in range(4)]
    texts = [(made / f"{n:03d}.txt").read_text() for n in range(4)]
    write_table(arrow.table({"image": cells, "text": texts}), folder / "set.parquet")
    return folder / "set.parquet"


LAYOUTS = [plain_folder, jsonl_folder, csv_folder, shard, json_shard, parquet]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_gives_the_same_pictures_and_captions(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    wanted = read_examples(data_of(plain_folder(tmp_path / "plain")))
    found = read_examples(data_of(layout(tmp_path)))
    assert [e.caption for e in found] == [e.caption for e in wanted] == ["a red picture", "a blue picture"] * 2
    assert [e.digest() for e in found] == [e.digest() for e in wanted]
    assert [e.size() for e in found] == [(16, 16)] * 4
    assert all(np.array_equal(np.asarray(a.read()), np.asarray(b.read())) for a, b in zip(found, wanted, strict=True))


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    for label in ("red_fox", "cat"):
        colour_folder(tmp_path / "set" / label, 2)
        for text in (tmp_path / "set" / label).glob("*.txt"):
            text.unlink()
    found = read_examples(data_of(tmp_path / "set"))
    assert [(e.key, e.caption, e.fields["label"]) for e in found] == [
        ("cat/000.png", "cat", "cat"), ("cat/001.png", "cat", "cat"),
        ("red_fox/000.png", "red fox", "red fox"), ("red_fox/001.png", "red fox", "red fox"),
    ]  # fmt: skip


def test_what_filter_exports_can_be_trained_on(tmp_path: Path) -> None:
    from genkit.cli import _run
    from tests.judged_run import judged_run

    run = judged_run(tmp_path / "run", lambda n, k: {"clip": 0.5}, rows=3, images=2)
    for form in ("folder", "webdataset", "parquet"):
        assert _run(["filter", str(run), "-o", str(tmp_path / form), "--format", form]) == 0
        found = read_examples(data_of(tmp_path / form))
        assert sorted(Counter(e.caption for e in found).items()) == [(f"picture {n}", 2) for n in range(3)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "metadata.jsonl").write_text('{"text": "a"}'), r"metadata\.jsonl:1: file_name: is missing"),
        (lambda p: (p / "metadata.jsonl").write_text('{"file_name": "../x.png"}'), "leads out of the folder"),
        (
            lambda p: (p / "metadata.jsonl").write_text('\n{"file_name": "no.png"}'),
            r"jsonl:2: .*'no\.png': there is no",
        ),
        (lambda p: (p / "metadata.jsonl").write_text("[1]"), "is not a JSON object"),
        (
            lambda p: (p / "metadata.csv").write_bytes(b"file_name,text\n000.png,\xff"),
            r"metadata\.csv: byte 23 is not UTF",
        ),
        (lambda p: (p / "000.txt").write_bytes(b"\xff\xfe"), r"000\.txt: byte 0 is not UTF-8"),
        (lambda p: [x.unlink() for x in p.glob("*.png")], "holds no pictures"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    folder = colour_folder(tmp_path / "set", 4)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        read_examples(data_of(folder))


def test_bad_shards_and_paths_are_named(tmp_path: Path) -> None:
    whole = shard(tmp_path)
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:700])
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    for path, message in [
        (tmp_path / "cut.tar", r"cut\.tar: is not an uncompressed, whole tar"),
        (tmp_path / "no.parquet", "is no Parquet file"),
        (tmp_path / "absent", "there is no such file or folder"),
        (tmp_path / "*.zip", "there is no such file"),
    ]:
        with pytest.raises(InputError, match=message):
            read_examples(data_of(path))
    broken = colour_folder(tmp_path / "broken", 2)
    (broken / "001.png").write_bytes(png()[:-20])
    with pytest.raises(InputError, match=r"001\.png: "):
        pictures_of(broken).make(1, 0)


# -- the split --


def test_split_is_stable_and_keeps_concepts_together(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "set", 40)
    lines = [{"file_name": f"{n:03d}.png", "text": "a", "concept": str(n // 4)} for n in range(40)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = data_of(folder, validation=0.3, validation_by="concept")
    train, held = split(read_examples(data), data)
    concepts = [{e.fields["concept"] for e in part} for part in (train, held)]
    assert not concepts[0] & concepts[1]
    assert len(train) + len(held) == 40 and 4 <= len(held) <= 24
    assert split(list(reversed(read_examples(data))), data)[1] == list(reversed(held))
    with pytest.raises(InputError, match="did you mean 'concept'"):
        split(read_examples(data), data_of(folder, validation=0.3, validation_by="concpt"))


# -- pictures --


def test_a_picture_depends_on_seed_epoch_and_name_alone(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "set", 6, side=24)
    options: dict[str, Any] = {"flip": 0.5, "crop": "random", "zoom": 0.6, "caption_dropout": 0.5}
    options["resolution"] = [16, 8]
    pictures = pictures_of(folder, **options)
    fewer = shutil.copytree(folder, tmp_path / "fewer")
    (fewer / "000.png").unlink()
    for epoch in range(3):
        one, two = pictures.make(3, epoch), pictures_of(fewer, **options).make(2, epoch)
        assert np.array_equal(one[0], two[0]) and one[1:] == two[1:]
    assert one[0].shape == (3, 8, 16) and one[0].min() >= -1 and one[0].max() <= 1
    different = [pictures.make(3, epoch)[0] for epoch in range(8)]
    assert len({x.tobytes() for x in different}) > 2


@pytest.mark.parametrize("colour", HUES)
def test_a_turned_hue_is_the_named_one(colour: str) -> None:
    lot = random.Random(1)
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    for x in range(8, 24):
        for y in range(8, 24):
            picture.putpixel((x, y), (200 + lot.randint(-30, 30), 60 + lot.randint(-20, 20), 40, 255))
    turned = turn_hue(picture, HUES[colour])
    assert turned is not None and turned.getchannel("A").tobytes() == picture.getchannel("A").tobytes()
    hsv = np.asarray(turned.convert("RGB").convert("HSV"))[8:24, 8:24].reshape(-1, 3)
    hue = np.median((hsv[:, 0].astype(float) * 360 / 256 - HUES[colour] + 180) % 360 - 180)
    assert abs(hue) < 12
    assert turn_hue(Image.new("RGB", (8, 8), (90, 90, 92)), 0) is None, "grey has no hue to turn"


def test_captions_stay_true_to_colour_and_background(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    square = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    square.paste((210, 40, 40, 255), (4, 4, 12, 12))
    square.save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "square", "may": true, "words": ["box"]}')
    pictures = pictures_of(
        folder, recolour={"share": 0.5, "where": "may"}, background={"colour": "black", "share": 0.5},
        captions=["{caption}", "a {words}"],
    )  # fmt: skip
    seen: Counter[str] = Counter()
    for epoch in range(60):
        pixels, caption, _, _ = pictures.make(0, epoch)
        rgb = ((pixels + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
        corner, middle = rgb[0, 0], Image.fromarray(rgb).convert("HSV").getpixel((8, 8))
        assert isinstance(middle, tuple)
        thing, _, ground = caption.partition(" on a ")
        assert bool(ground) or not corner.any(), "an unsaid background is the plain one"
        said = next((c for c in HUES if c in thing), "red")
        assert abs((middle[0] * 360 / 256 - HUES[said] + 180) % 360 - 180) < 15, caption
        assert (said in thing) or thing in ("square", "a box")
        seen[thing] += 1
        seen["ground"] += bool(ground)
    assert (
        seen["a box"]
        and len([c for c in seen if c.endswith(" square")]) >= 4
        and any(c.endswith("e box") for c in seen)
    )
    assert 15 < seen["ground"] < 45


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"captions": ["a {colr} thing"]}, r"data\.captions: no picture has a field 'colr'"),
        ({"resolution": 20}, r"data\.resolution: 20 is not a multiple of 8"),
        ({"background": {"colour": "wite"}, "zoom": 0.5}, r"colour: 'wite' is no colour \(did you mean 'white'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_met_are_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pictures_of(colour_folder(tmp_path / "set", 2), **fields).make(0, 0)


# -- order --


def test_buckets_drop_nothing_and_keep_shapes(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lot = random.Random(0)
    for n in range(23):
        (folder / f"{n:02d}.png").write_bytes(png(size=(lot.randint(20, 90), lot.randint(20, 90))))
        (folder / f"{n:02d}.txt").write_text("a")
    pictures = pictures_of(folder, side=64, buckets=True, bucket_step=16, repeat=2)
    assert len(pictures.buckets) == 3
    assert all(w % 16 == 0 and h % 16 == 0 and w * h <= 64 * 64 for w, h in pictures.buckets)
    for epoch in range(2):
        batches = order(pictures, 4, epoch)
        assert Counter(i for batch in batches for i in batch) == dict.fromkeys(range(23), 2)
        for batch in batches:
            assert pictures.batch(batch, epoch).pixels.shape[0] == len(batch)
    assert order(pictures, 4, 0) == order(pictures, 4, 0) != order(pictures, 4, 1)


def drawn(feed: Feed, start: int, count: int) -> list[Any]:
    found = []
    for epoch, batch in feed.from_micro_step(start):
        found.append((epoch, batch.keys, batch.captions, batch.pixels.numpy().tobytes(), batch.dropped.tolist()))
        if len(found) == count:
            return found
    raise AssertionError


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_from_anywhere_and_with_workers(tmp_path: Path, workers: int) -> None:
    pictures = pictures_of(colour_folder(tmp_path / "set", 10), flip=0.5, caption_dropout=0.3)
    whole = drawn(Feed(pictures, 4), 0, 8)  # three batches an epoch
    assert [epoch for epoch, *_ in whole] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert drawn(Feed(pictures, 4, workers), 2, 6) == whole[2:]
    shares = [drawn(Feed(pictures, 4, workers, rank, 2), 1, 3) for rank in (0, 1)]
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == whole[2:8]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    folder = colour_folder(tmp_path / "set", 4)
    pictures = pictures_of(folder)
    (folder / "002.png").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"002\.png: is not a PNG") as error:
        drawn(Feed(pictures, 2, workers), 0, 2)
    assert "\n" not in str(error.value)


# -- the cache --


def encode(batch: Batch) -> dict[str, torch.Tensor]:
    return {"mean": batch.pixels.mean(dim=(2, 3)), "length": torch.tensor([len(c) for c in batch.captions])}


def test_cached_batches_are_what_encoding_gives_and_are_made_once(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "set", 10)
    pictures = pictures_of(folder, cache=2, flip=0.5, caption_dropout=0.5)
    cached = encoded(pictures, encode, tmp_path / "cache", "weights", quiet=True)
    for epoch in range(4):
        batch, plain = cached.batch([5, 2], epoch), pictures.batch([5, 2], epoch)
        assert batch.tensors is not None and batch.keys == plain.keys
        assert all(torch.equal(batch.tensors[k], v) for k, v in encode(plain).items())
        assert torch.equal(batch.dropped, plain.dropped)
    assert len({tuple(cached.batch(range(10), epoch).dropped.tolist()) for epoch in range(4)}) == 4, "dropped anew"

    def never(batch: Batch) -> dict[str, torch.Tensor]:
        raise AssertionError("encoded again")

    encoded(pictures_of(folder, cache=2, flip=0.5), encode, tmp_path / "other", "weights", quiet=True)
    encoded(pictures, never, tmp_path / "cache", "weights", quiet=True)
    with pytest.raises(AssertionError):
        encoded(pictures, never, tmp_path / "cache", "other weights", quiet=True)
    with pytest.raises(AssertionError):
        encoded(pictures_of(folder, cache=2, flip=0.1), never, tmp_path / "cache", "weights", quiet=True)
    (folder / "003.txt").write_text("something else")
    with pytest.raises(AssertionError):
        encoded(pictures_of(folder, cache=2, flip=0.5), never, tmp_path / "cache", "weights", quiet=True)


def test_an_interrupted_or_damaged_cache_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genkit.training import cache

    monkeypatch.setattr(cache, "SHARD", 4)
    pictures = pictures_of(colour_folder(tmp_path / "set", 10), cache=1)
    calls: list[int] = []

    def counting(batch: Batch) -> dict[str, torch.Tensor]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(batch.keys))
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        encoded(pictures, counting, tmp_path / "cache", "w", quiet=True)
    kept = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:-9])
    calls[:] = [0]
    with pytest.raises(KeyboardInterrupt):  # two to make: the damaged one, and the one that was never made
        encoded(pictures, counting, tmp_path / "cache", "w", quiet=True)
    found = encoded(pictures, encode, tmp_path / "cache", "w", quiet=True)
    batch = found.batch(range(10), 0)
    assert batch.tensors is not None
    assert torch.equal(batch.tensors["mean"], pictures.batch(range(10), 0).pixels.mean(dim=(2, 3)))
