"""DPT and Depth Anything: depth as transformers' pipeline computes it, in any batch; `genkit depth`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation, pipeline

from genkit.cli import run
from genkit.errors import HostError, InputError
from genkit.vision import depth as vision
from genkit.vision.depth import Depth
from genkit.vision.models import inspect_vision
from tests.depths import tiny_depth_anything, tiny_dpt, tiny_dpt_dinov2, tiny_dpt_hybrid, tiny_glpn, tiny_zoedepth
from tests.senses import noise, pictures, tensor

MODELS: dict[str, Callable[[Path], Path]] = {
    "dpt": tiny_dpt,
    "dpt-dinov2": tiny_dpt_dinov2,
    "dpt-hybrid": tiny_dpt_hybrid,
    "depth-anything": tiny_depth_anything,
    "zoedepth": tiny_zoedepth,
    "zoedepth-two": lambda folder: tiny_zoedepth(folder, heads=2, ensure_multiple_of=None, keep_aspect_ratio=False),
    "zoedepth-bare": lambda folder: tiny_zoedepth(folder, do_pad=False, resample=3),
    "glpn": tiny_glpn,
    "metric": lambda folder: tiny_depth_anything(folder, depth_estimation_type="metric", max_depth=20),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_depth_anything(tmp_path_factory.mktemp("depth"))


def zoedepth(model: Any, processor: Any, picture: Image.Image) -> dict[str, torch.Tensor]:
    """Return what the pipeline says, whose last step is of torchvision: `resize` without antialiasing, then a crop."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        pass
    else:
        found: Any = pipeline("depth-estimation", model=model, image_processor=processor)
        return found(picture)
    with torch.inference_mode():
        maps = model(**processor(picture, return_tensors="pt")).predicted_depth[None]
    height, width = picture.size[::-1]
    down, across = (int(np.sqrt(side / 2) * 3) if processor.do_pad else 0 for side in (height, width))
    whole = torch.nn.functional.interpolate(maps, (height + 2 * down, width + 2 * across), mode="bicubic")
    return {"predicted_depth": whole[0, 0, down : down + height, across : across + width]}


SLOW = ("dpt-hybrid", "metric", "zoedepth-two", "zoedepth-bare")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MODELS])
def test_depth_as_in_transformers(name: str, tmp_path: Path) -> None:
    home = MODELS[name](tmp_path)
    found = Depth.from_pretrained(home, device="cpu")
    model, processor = AutoModelForDepthEstimation.from_pretrained(home), AutoImageProcessor.from_pretrained(home)
    theirs: Any = pipeline("depth-estimation", model=model, image_processor=processor)
    if name.startswith("zoedepth"):
        theirs = partial(zoedepth, model, processor)
    for height, width in ((42, 42), (50, 37), (40, 120), (90, 33)):
        wanted = theirs(noise(1, height, width))["predicted_depth"]
        depth = found(tensor(noise(1, height, width)))[0]
        assert depth.shape == wanted.shape == (height, width) and depth.dtype == torch.float32
        assert float(wanted.std()) > 0.005 and float((depth - wanted).abs().max()) < 1e-4


def test_any_batch_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sense = Depth.from_pretrained(folder, device="cpu")
    pixels = torch.cat([sense.pixels(tensor(noise(n, 40, 40))) for n in range(5)])
    whole = sense.maps(pixels)
    assert torch.allclose(whole, torch.cat([sense.maps(pixels[n : n + 1]) for n in range(5)]), atol=1e-5)
    monkeypatch.setattr(vision, "MOST_PIXELS", 2 * 42 * 42)  # large pictures: two a call
    assert torch.allclose(sense.maps(pixels), whole, atol=1e-5) and sense.batch == 2


def test_zoedepth_of_two_heads_is_the_same_in_any_company(tmp_path: Path) -> None:
    sense = Depth.from_pretrained(tiny_zoedepth(tmp_path, heads=2), device="cpu")
    pixels = torch.cat([sense.pixels(tensor(noise(n, 40, 40))) for n in range(3)])
    head, calls = sense.model.metric_head, []
    head.register_forward_hook(lambda module, given, kept, found: calls.append(len(found[1])), with_kwargs=True)
    whole = sense.maps(pixels)
    assert calls == [1, 1, 1]
    assert torch.equal(whole, torch.cat([sense.maps(pixels[n : n + 1]) for n in range(3)]))
    with pytest.raises(InputError, match="4x40 pixels: ZoeDepth mirrors edges of pictures of 5 and more a side"):
        sense(tensor(noise(1, 40, 4)))


def test_pictures_that_cannot_be_read_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sense = Depth.from_pretrained(folder, device="cpu")
    assert sense(tensor(noise(1, 1, 1))).shape == (1, 1, 1)
    with pytest.raises(InputError, match="2000x10 pixels would be read at 42x0, but the model looks at patches of 14"):
        sense(tensor(noise(1, 10, 2000)))
    broken = SimpleNamespace(predicted_depth=torch.full((1, 4, 4), torch.nan))
    with monkeypatch.context() as patch, pytest.raises(HostError, match="not a number in float32"):
        patch.setattr(sense.model, "forward", lambda **_: broken)
        sense(tensor(noise(1, 20, 20)))
    monkeypatch.setattr(vision, "MOST_PIXELS", 42 * 42)
    with pytest.raises(InputError, match="120x40 pixels would be read at 126x42, more than 1764"):
        sense(tensor(noise(1, 40, 120)))
    _edit(tiny_dpt(tmp_path) / "preprocessor_config.json", keep_aspect_ratio=True, ensure_multiple_of=8)
    with pytest.raises(InputError, match="reads squares: set keep_aspect_ratio to false"):
        Depth.from_pretrained(tmp_path, device="cpu")(tensor(noise(1, 20, 80)))


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "timm": ({"backbone_config": {"model_type": "timm_backbone"}}, {}, "'timm_backbone' is not dinov2"),
    "swin": ({"backbone_config": {"model_type": "swinv2"}}, {}, "backbone_config: model_type: 'swinv2' is not dinov2"),
    "elsewhere": ({"backbone": "facebook/dinov2-small"}, {}, "never fetched"),
    "other": ({"architectures": ["PromptDepthAnythingForDepthEstimation"]}, {}, "is no depth estimator (did you mean"),
    "edge": ({}, {"size": {"shortest_edge": 42}}, "size: depth is read of pictures of a height and width"),
    "multiple": ({}, {"ensure_multiple_of": -1}, "ensure_multiple_of: -1 is not"),
    "std": ({}, {"image_std": [1, 0, 1]}, "image_std: [1, 0, 1] holds a 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_folders_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    config, processor, message = BAD[name]
    for file, fields in (("config.json", config), ("preprocessor_config.json", processor)):
        (tmp_path / file).write_text((folder / file).read_text())
        _edit(tmp_path / file, **fields)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        inspect_vision(tmp_path, ("depth estimator",), "--model")
    assert message in str(error.value)


def _edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def depth(*words: Any) -> int:
    return run(["depth", *map(str, words), "--device", "cpu"])


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_command_writes_depth_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, out = pictures(tmp_path / "pictures"), tmp_path / "out"
    (where / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (where / "more").mkdir()
    noise(4, 30, 60).convert("L").save(where / "more" / "0.jpg")
    assert depth(where, "--model", folder, "-o", out) == 1
    found = lines(capsys.readouterr().out)
    assert [one["depth"] for one in found] == [str(out / f"{name}.depth.png") for name in ("0", "1", "2", "more/0")]
    assert lines((out / "depth.jsonl").read_text())[3] == {"file": str(where / "bad.png"),
        "error": f"{where / 'bad.png'}: is truncated"}  # fmt: skip
    wanted = Depth.from_pretrained(folder, device="cpu")(tensor(Image.open(where / "1.png")))[0].numpy()
    levels = np.array(Image.open(found[1]["depth"]))
    assert levels.dtype == np.uint16 and levels.min() == 0 and levels.max() == 65535
    low, high = found[1]["min"], found[1]["max"]
    assert np.abs(low + levels / 65535 * (high - low) - wanted).max() < (high - low) / 65535
    (out / "0.depth.png").unlink()
    assert depth(where, "--model", folder, "-o", out) == 1
    printed = capsys.readouterr()
    assert lines(printed.out) == found[:1] and "3 of 5 pictures have their depth and keep it" in printed.err
    assert depth(where / "1.png", "--model", folder, "-o", out, "--npy", "--draw") == 0
    assert np.abs(np.load(out / "1.depth.npy") - wanted).max() < 1e-6
    assert Image.open(out / "1.drawn.png").size == Image.open(where / "1.png").size
    assert len(lines((out / "depth.jsonl").read_text())) == 5


def test_a_stopped_command_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, out = pictures(tmp_path / "pictures", 5), tmp_path / "out"
    monkeypatch.setattr("genkit.studies.senses.READ", 2)
    look, calls = Depth.maps, []

    def stopped(self: Depth, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return look(self, pixels)

    monkeypatch.setattr(Depth, "maps", stopped)
    assert depth(where, "--model", folder, "-o", out) == 130
    done = [Path(one["file"]).name for one in lines((out / "depth.jsonl").read_text())]
    assert 1 <= len(done) < 5
    capsys.readouterr()
    assert depth(where, "--model", folder, "-o", out) == 0
    assert [Path(one["file"]).name for one in lines(capsys.readouterr().out)] == [
        f"{n}.png" for n in range(len(done), 5)
    ]
    assert len(lines((out / "depth.jsonl").read_text())) == 5


def test_what_is_not_a_number_is_said_and_not_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, out = pictures(tmp_path / "pictures", 2), tmp_path / "out"
    monkeypatch.setattr(Depth, "maps", lambda self, pixels: torch.full((len(pixels), 4, 4), torch.nan))
    assert depth(where, "--model", folder, "-o", out, "--draw") == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "0.png: depth by" in printed.err and "use --dtype float32" in printed.err
    assert sorted(path.name for path in out.iterdir()) == ["depth.jsonl"]


def test_depth_of_others_is_not_overwritten(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, out = pictures(tmp_path / "pictures", 1), tmp_path / "out"
    assert depth(where, "--model", folder, "-o", out) == 0
    other, dpt = pictures(tmp_path / "other", 1), tiny_dpt(tmp_path / "dpt")
    refused = {
        f"0.depth.png is the depth of {where / '0.png'}; name another folder": [other, "--model", folder, "-o", out],
        "is by another model": [where, "--model", dpt, "-o", out],
        "which is to be read": [where, "--model", folder, "-o", where],
        "is not a folder": [where, "--model", folder, "-o", where / "0.png"],
        "'emoji' is no depth estimator": [where, "--model", "emoji", "-o", out],
    }
    for message, words in refused.items():
        capsys.readouterr()
        assert depth(*words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert depth(where, "--model", dpt, "-o", out, "--overwrite") == 0
