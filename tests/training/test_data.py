"""Data sets in every layout, what happens to a picture on its way, and an order that is a function of (seed, epoch)."""

from __future__ import annotations

import csv
import io
import json
import os
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

from genkit.datasets.config import Data
from genkit.datasets.sources import read_examples, split
from genkit.errors import InputError
from genkit.training.cache import encoded
from genkit.training.data import HUES, Batch, Feed, Pictures, order, turn_hue
from tests.colours import colour_folder


def data_of(path: Path | str, **fields: Any) -> Data:
    return Data.model_validate({"path": str(path), "validation": 0.0, **fields})


def pictures_of(path: Path | str, side: int = 16, **fields: Any) -> Pictures:
    data = data_of(path, **fields)
    return Pictures(read_examples(data), data, (side, side), 8, seed=3)


def png(colour: Any = (200, 10, 10), size: tuple[int, int] = (16, 16), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def jpeg(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(file, "JPEG")
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
    from genkit.cli import run as command
    from tests.judged_run import judged_run

    run = judged_run(tmp_path / "run", lambda n, k: {"clip": 0.5}, rows=3, images=2)
    for form in ("folder", "webdataset", "parquet"):
        assert command(["filter", str(run), "-o", str(tmp_path / form), "--format", form]) == 0
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
            r"metadata\.csv:2: byte 0xff is not UTF-8",
        ),
        (lambda p: (p / "000.txt").write_bytes(b"\xff\xfe"), r"000\.txt:1: byte 0xff is not UTF-8; save it as"),
        (lambda p: [x.unlink() for x in p.glob("*.png")], "holds no pictures"),
        (lambda p: (p / "a.tar").touch(), r"holds pictures, '000\.png', and shards, 'a\.tar'"),
        (
            lambda p: (p / "metadata.jsonl").write_text('{"file_name": "000.png"}\n{"file_name": "./000.png"}'),
            r"jsonl:2: file_name: '\./000\.png' is there twice: see .*jsonl:1",
        ),
        (lambda p: (p / "metadata.jsonl").write_text(f'{{"file_name": "{"x" * 999}"}}'), "there is no such file"),
        (lambda p: (p / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "\\ud800"}'), "half a char"),
        (lambda p: (p / "metadata.csv").write_text("file_name,text\n000.png,a,b"), "csv:2: has more cells than the 2"),
        (lambda p: (p / "metadata.csv").write_text("file_name,a,a\n000.png,a,b"), "csv:1: 'a': column is there twice"),
        (
            lambda p: (p / "metadata.csv").write_text('file_name,text\n000.png,"a\nb"\n001.png,"5 inch\n002.png,c\n'),
            "csv:4: is not CSV: unexpected end of data",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    folder = colour_folder(tmp_path / "set", 4)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        read_examples(data_of(folder))


def test_classes_are_several_folders_without_anything_like_a_caption(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "set" / label).mkdir(parents=True)
        (tmp_path / "set" / label / "0.png").write_bytes(png())

    def captions() -> list[str | None]:
        return [e.caption for e in read_examples(data_of(tmp_path / "set"))]

    (tmp_path / "set" / "LICENSE.txt").write_text("MIT")
    assert captions() == ["cat", "dog"]
    (tmp_path / "set" / "dog" / "0.caption").write_text("a dog")
    assert captions() == [None, None], "captions under a name that is not looked for"
    (tmp_path / "set" / "dog" / "0.caption").unlink()
    shutil.rmtree(tmp_path / "set" / "dog")
    assert captions() == [None], "one folder is no class"


def test_metadata_may_lie_in_any_folder_and_leaves_out_no_picture(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "deep"
    folder.mkdir(parents=True)
    for n in range(3):
        (folder / f"{n}.png").write_bytes(png())
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,text\r\n0.png,one\r\n1.png,two\r\n")
    found = read_examples(data_of(tmp_path / "set"))
    assert [(e.key, e.caption) for e in found] == [("deep/0.png", "one"), ("deep/1.png", "two"), ("deep/2.png", None)]


def test_paths_of_several_places_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b[1]"):
        shard(tmp_path / name)
    both = [str(tmp_path / "a" / "set.tar"), str(tmp_path / "b[1]" / "set.tar")]
    found = read_examples(data_of(tmp_path / "x").model_copy(update={"path": both}))
    assert [e.key for e in found[3:5]] == ["a/set.tar!003.png", "b[1]/set.tar!000.png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read_examples(data_of("~/a/**/*.tar"))) == 4
    with pytest.raises(InputError, match=r"data\.validation: 'nowhere': there is no such"):
        split(found, data_of(tmp_path / "a", validation="nowhere"))
    fifo = plain_folder(tmp_path / "c") / "001.png"
    fifo.unlink()
    os.mkfifo(fifo)
    with pytest.raises(InputError, match="is a pipe"):
        read_examples(data_of(tmp_path / "c" / "set"))[1].read()


def packed(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_shards_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    hidden = ("._0.png", b"x"), (".DS_Store", b"x"), ("/", b""), ("0.png", png()), ("0.txt", b"\xef\xbb\xbfa cat")
    assert [e.caption for e in read_examples(data_of(packed(path, *hidden)))] == ["a cat"]
    for members, message in [
        ([("0.png", png()), ("0.jpg", b"x")], "'0': has several pictures"),
        ([("0.png", png()), ("0.txt", b"caf\xe9")], r"0\.png: txt:1: byte 0xe9 is not UTF-8"),
        ([("a.b.png", png())], r"no sample has a picture: a\.tar!a \(has b\.png\)"),
    ]:
        with pytest.raises(InputError, match=message):
            read_examples(data_of(packed(path, *members)))
    whole = packed(path, *[(f"{n}.png", png()) for n in range(4)]).read_bytes()
    third = whole.index(b"2.png")
    for content, message in [
        (whole[:third], "has no end"),  # as long as it is, a tar file
        (whole[: third + 9] + b"?" + whole[third + 10 :], f"is damaged, or another begins, at byte {third}"),
        (whole[:third] + bytes(1024) + whole[third:], f"is damaged, or another begins, at byte {third}"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_examples(data_of(path))


def test_parquet_of_datasets_with_class_labels(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow.parquet import write_table

    table = arrow.table({"img": [{"bytes": png(), "path": None}] * 2, "label": [1, 0]})
    features = {"info": {"features": {"label": {"names": ["cat", "red_fox"], "_type": "ClassLabel"}}}}
    write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet")
    found = read_examples(data_of(tmp_path / "a.parquet"))
    assert [(e.caption, e.fields, e.size()) for e in found] == [
        ("red fox", {"label": "red fox"}, (16, 16)), ("cat", {"label": "cat"}, (16, 16)),
    ]  # fmt: skip


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
        pixels, caption, *_ = pictures.make(0, epoch)
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


def test_what_would_make_a_caption_untrue_is_not_done(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    half = Image.new("RGB", (16, 16), (210, 40, 40))
    half.paste((250, 180, 180), (0, 0, 8, 16))
    half.putalpha(255)
    texts = {"a": "square", "b": "red square", "c": "arrow pointing Left", "d": "square on a white background"}
    for name, text in texts.items():
        picture = half.copy()
        if name != "a":
            picture.putalpha(Image.new("L", (16, 16), 128))
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)
    pictures = pictures_of(folder, recolour={"share": 1.0}, background={"share": 1.0}, flip=0.5)
    seen: dict[str, Counter[str]] = {name: Counter() for name in texts}
    mirrored: dict[str, Counter[bool]] = {name: Counter() for name in texts}
    for turn in range(40):
        for index, name in enumerate(texts):
            pixels, caption, *_ = pictures.make(index, turn)
            seen[name][caption] += 1
            mirrored[name][bool(pixels[:, :, 2].mean() < pixels[:, :, -3].mean())] += 1
    assert all("background" not in c for c in seen["a"]), "nothing of a background is to be seen"
    assert {c.partition(" on a ")[0] for c in seen["b"]} == {"red square"} and len(seen["b"]) > 5
    assert set(seen["d"]) == {"square on a white background"}
    assert len(mirrored["a"]) == len(mirrored["b"]) == 2 and len(mirrored["c"]) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recolour": {"where": "shiftable"}}, r"data\.recolour\.where: no picture has a field 'shiftable'"),
        ({"recolour": {"caption": "{color} {caption}"}}, r"data\.recolour\.caption: .*'color' \(did you mean 'colour'"),
        ({"background": {"caption": "{caption}"}}, r"data\.background\.caption: .* says nothing of \{background\}"),
        ({"buckets": True}, r"data\.bucket_step: sides in steps of 64 are more than data\.resolution, 16"),
        ({"captions": ["a {colr} thing"]}, r"data\.captions: no picture has a field 'colr'"),
        ({"resolution": 20}, r"data\.resolution: 20 is not a multiple of 8"),
        ({"background": {"colour": "wite"}, }, r"colour: 'wite' is no colour \(did you mean 'white'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_met_are_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pictures_of(colour_folder(tmp_path / "set", 2), **fields)


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
        assert sorted(i for batch in batches for i in batch) == list(range(46))
        assert Counter(k for batch in batches for k in pictures.batch(batch, epoch).keys) == dict.fromkeys(
            (e.key for e in pictures.examples), 2
        )
        for batch in batches:
            assert pictures.batch(batch, epoch).pixels.shape[0] == len(batch)
    assert order(pictures, 4, 0) == order(pictures, 4, 0) != order(pictures, 4, 1)


def test_a_picture_that_comes_twice_in_an_epoch_comes_as_in_two(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "set", 6)
    options: dict[str, Any] = {"flip": 0.5, "caption_dropout": 0.5, "zoom": 0.5}
    once, twice = pictures_of(folder, **options), pictures_of(folder, repeat=2, **options)

    def told(batch: Batch) -> list[Any]:
        return [
            (k, x.tobytes(), bool(d)) for k, x, d in zip(batch.keys, batch.pixels.numpy(), batch.dropped, strict=True)
        ]

    epochs = [told(once.batch(range(6), epoch)) for epoch in range(4)]
    assert [told(twice.batch(range(12), epoch)) for epoch in range(2)] == [epochs[0] + epochs[1], epochs[2] + epochs[3]]
    cached = encoded(
        pictures_of(folder, repeat=2, cache=3, **options), lambda batch: {"x": batch.pixels}, tmp_path / "c", "", True
    )
    for epoch, wanted in enumerate(([0, 1], [2, 0], [1, 2])):
        batch = cached.batch([2, 8], epoch)
        assert batch.tensors is not None
        assert [x.numpy().tobytes() for x in batch.tensors["x"]] == [epochs[turn][2][1] for turn in wanted]


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


def test_buckets_go_on_without_what_cannot_be_read(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "set", 4)
    (folder / "002.png").write_bytes(b"GIF89a")  # not even its size can be read
    pictures = pictures_of(folder, side=32, buckets=True, bucket_step=8, broken=0.5)
    assert pictures.broken == {2} and len(drawn(Feed(pictures, 4), 0, 1)) == 1
    assert sorted(pictures.batch([0, 1, 2, 3], 0).keys) == ["000.png", "001.png", "003.png", "003.png"]
    with pytest.raises(InputError, match=r"002\.png: is not a PNG"):
        pictures_of(folder, side=32, buckets=True, bucket_step=8, broken=0.1)
    assert pictures_of(folder).plain(pictures.examples).batch([2], 0).keys == ["003.png"]
    (folder / "wide.jpg").write_bytes(jpeg(size=(64, 32))[:-200])  # its size can be read, and nothing else
    pictures = pictures_of(folder, side=32, buckets=True, bucket_step=8, broken=0.5)
    with pytest.raises(
        InputError, match=r"wide\.jpg cannot be read, and no other picture is trained at 40x24: remove it"
    ):
        pictures.batch([4], 0)


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
