"""CLIPSeg: maps as transformers computes them, in any batch; masks of them; `genkit segment`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from transformers import CLIPSegForImageSegmentation, CLIPTokenizer
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from genkit.cli import run
from genkit.errors import InputError
from genkit.studies.senses import write_png
from genkit.vision.segmenter import Segmenter, binary
from tests.senses import noise, pictures, tensor, tiny_clipseg

TEXTS = ["a fox", "the sky over a green house", "two cats"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clipseg(tmp_path_factory.mktemp("clipseg"))


def expected(folder: Path, picture: Image.Image) -> torch.Tensor:
    """Return the maps (W, H, W') of a picture by transformers' model and processor, a row for each text."""
    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    pixels = ViTImageProcessorPil.from_pretrained(folder)([picture] * len(TEXTS), return_tensors="pt")
    with torch.inference_mode():
        logits = model(**tokens, **pixels).logits
    size = picture.size[::-1]
    return torch.nn.functional.interpolate(logits.sigmoid()[None], size=size, mode="bilinear")[0]


def test_maps_as_in_transformers(folder: Path) -> None:
    segmenter = Segmenter.from_pretrained(folder, device="cpu")
    for height, width in ((32, 32), (50, 37), (90, 120)):
        found = segmenter(tensor(noise(1, height, width)), TEXTS)
        wanted = expected(folder, noise(1, height, width))
        assert found.shape == (1, 3, height, width) and float(wanted.std()) > 0.01
        assert float((found[0] - wanted).abs().max()) < 1e-4


def test_any_batch_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = Segmenter.from_pretrained(folder, device="cpu")
    pixels = torch.cat([segmenter.pixels(tensor(noise(n, 40, 40 + n))) for n in range(5)])
    alone = torch.cat([segmenter.maps(pixels[n : n + 1], [text]) for n in range(5) for text in TEXTS])
    whole = segmenter.maps(pixels, TEXTS)
    assert float((whole.flatten(0, 1) - alone[:, 0]).abs().max()) < 1e-5
    call, sizes = segmenter._maps, []

    def scarce(pixels: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError
        return call(pixels, told)

    monkeypatch.setattr(segmenter, "_maps", scarce)
    assert torch.allclose(segmenter.maps(pixels, TEXTS), whole, atol=1e-5)
    assert sizes == [5, 2, 2, 1] and segmenter.batch == 2


def test_masks_grow_as_with_pil() -> None:
    maps = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(1))
    masks = binary(maps, 0.97, grow=3)
    for mask, levels in zip(masks.flatten(0, 1), maps.flatten(0, 1), strict=True):
        picture = Image.fromarray((levels.numpy() >= np.float32(0.97)).astype(np.uint8) * 255)
        assert np.array_equal(mask.numpy(), np.array(picture.filter(ImageFilter.MaxFilter(7))) > 0)
    assert torch.equal(binary(maps, 0.97, grow=3, invert=True), ~masks)


@pytest.mark.parametrize("words", [[], ["a", " "], ["a", "a"], ["x"] * 200])
def test_texts_that_say_nothing_are_refused(folder: Path, words: list[str]) -> None:
    segmenter = Segmenter.from_pretrained(folder, device="cpu")
    with pytest.raises(InputError, match="words: "):
        segmenter(tensor(noise(1, 20, 20)), words)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def segment(*words: Any) -> int:
    return run(["segment", *map(str, words), "--device", "cpu"])


def test_the_command_writes_masks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, out = pictures(tmp_path / "pictures"), tmp_path / "masks"
    (where / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (where / "more").mkdir()
    noise(4, 30, 30).save(where / "more" / "0.jpg")
    assert segment(where, "--words", "a fox, The sky!", "--model", folder, "-o", out, "--draw") == 1
    found = lines(capsys.readouterr().out)
    assert [Path(one["mask"]).relative_to(out).as_posix() for one in found[-2:]] == [
        "more/0.a-fox.png", "more/0.the-sky.png",
    ]  # fmt: skip
    assert len(found) == 8 and lines((out / "segments.jsonl").read_text()).count({"file": str(where / "bad.png"),
        "error": f"{where / 'bad.png'}: is truncated"}) == 1  # fmt: skip
    maps = Segmenter.from_pretrained(folder, device="cpu")(tensor(Image.open(where / "1.png")), ["a fox", "The sky!"])[
        0
    ]
    for one, levels in zip(found[2:4], maps, strict=True):
        mask = np.array(Image.open(one["mask"]))
        assert set(np.unique(mask)) == {0, 255} and np.array_equal(mask > 0, levels.numpy() >= 0.5)
        assert one["area"] == pytest.approx((mask > 0).mean(), abs=1e-5)
    assert Image.open(out / "1.drawn.png").size == Image.open(where / "1.png").size
    assert segment(where / "1.png", "--words", "a fox", "--model", folder, "-o", out, "--soft") == 0
    assert np.abs(np.array(Image.open(out / "1.a-fox.png")) - maps[0].numpy() * 255).max() <= 0.51


def test_a_stopped_command_keeps_its_lines(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, out = pictures(tmp_path / "pictures", 3), tmp_path / "masks"

    def stopped(path: Path, pixels: Any) -> None:
        if path.name == "1.a-fox.png":
            raise KeyboardInterrupt
        write_png(path, pixels)

    monkeypatch.setattr("genkit.studies.segment.write_png", stopped)
    assert segment(where, "--words", "a fox", "--model", folder, "-o", out) == 130
    assert [one["mask"] for one in lines((out / "segments.jsonl").read_text())] == [str(out / "0.a-fox.png")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--words", "a,a"], "--words: 'a' is named twice"),
        (["--words", " "], "--words: '': name 1 to 100 texts"),
        (["--words", "a", "--threshold", "1"], "--threshold: 1 is not"),
        (["--words", "a", "--grow", "-1"], "--grow: -1 is not"),
        (["--words", "fox " * 90], "tokens, more than the 32 that"),
        (["--words", "a", "--soft", "--invert"], "--soft: writes probabilities"),
        (["--words", "a", "--out", "."], "which is to be read"),
        (["--words", "a", "--model", "emoji"], "--model: 'emoji' is no segmenter"),
    ],
)
def test_bad_options_are_refused_before_torch(
    words: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(pictures(tmp_path / "pictures"))
    given = {"--model": str(folder), "--out": str(tmp_path / "new")}
    others = [word for name, value in given.items() if name not in words for word in (name, value)]
    assert segment(".", *words, *others) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "new").exists()
