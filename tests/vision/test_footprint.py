"""What vision models take: estimates against measured peaks, and in the plan of a run's memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genkit import cli
from genkit.components import inspect_model
from genkit.components.needs import model_need
from genkit.device.memory import PARTS, RESIDENT, TURNS, Look, at_once, peak, plan_memory
from genkit.errors import HostError
from genkit.job import masks, plan
from genkit.job.plan import plan_job
from genkit.options import Options
from genkit.rows.request import Request
from genkit.vision.footprint import looks, mask_look, row
from genkit.vision.models import inspect_vision, load_model
from genkit.vision.segmenter import Segmenter
from tests.classifiers import tiny_classifier
from tests.detectors import tiny_grounding_dino, tiny_owlv2, tiny_owlvit
from tests.peak import peak_bytes
from tests.senses import noise, tiny_blip_vqa, tiny_clipseg

SHAPES: dict[str, tuple[Any, str, dict[str, Any], int]] = {  # as published; pixels of a side
    "owlvit": (tiny_owlvit, "OwlViTForObjectDetection", {}, 768),
    "blip": (tiny_blip_vqa, "BlipForQuestionAnswering", {}, 384),
    "vit": (tiny_classifier, "ViTForImageClassification", {}, 224),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_picture_in_a_vision_model(name: str, tmp_path: Path) -> None:
    import transformers

    from genkit.components.weights import Tensor
    from genkit.vision.faster import quicken

    write, kind, fields, side = SHAPES[name]
    folder = write(tmp_path / name)
    cls = getattr(transformers, kind)
    with torch.device("meta"):
        model = cls(cls.config_class(**fields)).eval()
        pixels = torch.zeros(2, 3, side, side)
    quicken(model)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"height": side, "width": side}}))
    info = inspect_vision(folder, (inspect_vision(folder, ("detector", "captioner", "classifier")).sense,))
    tensors = {k: Tensor(path, k, "F32", tuple(v.shape)) for k, v in model.state_dict().items()}
    object.__setattr__(info.part, "tensors", tensors)
    call = {"owlvit": "image_embedder", "blip": "vision_model"}.get(name)
    network = model if call is None else getattr(model, call)
    measured = peak_bytes(lambda: network(pixel_values=pixels), model) / 8
    assert 0.9 <= row(info, 1024, 1024) / measured <= 1.6, (row(info, 1024, 1024), measured)


@pytest.mark.parametrize("texts", [1, 6])
def test_a_picture_in_a_segmenter(texts: int, tmp_path: Path) -> None:
    import transformers

    from genkit.components.weights import Tensor
    from genkit.vision.models import Loaded

    folder = tiny_clipseg(tmp_path)
    for file, changes in (
        ("preprocessor_config.json", {"size": {"height": 352, "width": 352}}),
        ("config.json", {"vision_config": {}, "extract_layers": [3, 6, 9], "decoder_intermediate_size": 2048}),
    ):
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))
    info = inspect_vision(folder, ("segmenter",))
    with torch.device("meta"):
        vision = {"image_size": 352, "patch_size": 16}
        model: Any = transformers.CLIPSegForImageSegmentation(transformers.CLIPSegConfig(vision_config=vision)).eval()
        pixels, told = torch.zeros(2, 3, 352, 352), torch.zeros(texts, 512)
    tensors = {k: Tensor(folder, k, "F32", tuple(v.shape)) for k, v in model.state_dict().items()}
    object.__setattr__(info.part, "tensors", tensors)
    segmenter = Segmenter(Loaded(info, model))
    measured = peak_bytes(lambda: segmenter._maps(pixels, told), model) / 2
    found = mask_look(info, texts)
    assert 0.9 <= found.picture / measured <= 1.6, (found.picture, measured)
    assert found.weights > 4 * sum(w.numel() for w in model.parameters())


def test_a_segmenter_is_counted_alone_and_looks_at_as_many_as_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"segmenter": Look(3 * 2**30, 2**29)}
    plain = model_need(inspect_model("emoji"), None, "float16", "cuda")
    need = model_need(inspect_model("emoji"), None, "float16", "cuda", looks=large)
    assert need.first == 3.5 * 2**30 and need.weights == plain.weights and need.looks == {}
    assert plan_memory(need, 4 * 2**30) == plan_memory(plain, 4 * 2**30)
    with pytest.raises(HostError, match=r"masks in words take 3.5 GiB on cuda, and 2.0 are free"):
        plan_memory(need, 2 * 2**30)
    assert [at_once(large["segmenter"], free * 2**30, "cuda", 8) for free in (3, 4.7, 100)] == [1, 2, 8]
    clipseg, photo = tiny_clipseg(tmp_path / "clipseg"), tmp_path / "photo.png"
    noise(1, 64, 64).save(photo)
    command = ["generate", "--prompt", "a fox", "--image", str(photo), "--mask", "a cat", "--segmenter", str(clipseg)]
    command += ["--steps", "1", "--device", "cpu", "-o", str(tmp_path / "run")]
    assert cli.run([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_gib"]["cpu"]["masks"] > 0
    seen, maps = list[int](), Segmenter.maps

    def recorded(self: Segmenter, pixels: torch.Tensor, words: Any) -> torch.Tensor:
        seen.append(self.batch)
        return maps(self, pixels, words)

    monkeypatch.setattr(Segmenter, "maps", recorded)
    monkeypatch.setattr(masks, "at_once", lambda look, free, device, most: 3)
    assert cli.run(command) == 0 and seen == [3]
    monkeypatch.setattr(plan, "mask_look", lambda info, texts: Look(2**60, 2**60))
    assert cli.run([*command[:-1], str(tmp_path / "other")]) == 3
    assert "masks in words take" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert cli.run(command) == 0, "nothing is left to draw"


def test_their_weights_and_work_are_counted_and_they_leave_the_device(tmp_path: Path) -> None:
    infos = {
        "detector": inspect_vision(tiny_owlvit(tmp_path / "owl"), ("detector",)),
        "classifier": inspect_vision(tiny_classifier(tmp_path / "cls"), ("classifier",)),
    }
    found = looks(infos, "float16", "cuda", (512, 512))
    weights = load_model(infos["detector"], ("detector",), "cpu", torch.float32).model.parameters()
    assert found["detector"].weights == 2 * sum(w.numel() for w in weights)
    assert looks(infos, "float32", "cpu", (512, 512))["detector"].picture == 2 * found["detector"].picture
    plain = model_need(inspect_model("emoji"), None, "float16", "cuda")
    need = model_need(inspect_model("emoji"), None, "float16", "cuda", looks=found)
    extra = sum(look.weights for look in found.values())
    assert peak(need, RESIDENT, 1) == peak(plain, RESIDENT, 1) + extra
    heavy = model_need(inspect_model("emoji"), None, "float16", "cuda", looks={
        "detector": Look(2**31, 2**28)})  # fmt: skip
    assert peak(heavy, PARTS, 4) == heavy.weights["unet"] + 4 * heavy.image + 2**31 + 4 * 2**28
    assert peak(heavy, TURNS, 1) == 2**31 + 2**28, "alone on the device"
    free = (2.27 + 0.4) * 2**30 / 0.95
    assert (plan_memory(plain, free).level, plan_memory(heavy, free).level) == (RESIDENT, TURNS)


@pytest.mark.parametrize("write", [tiny_owlv2, tiny_grounding_dino])
def test_every_detector_has_an_estimate(write: Any, tmp_path: Path) -> None:
    info = inspect_vision(write(tmp_path / "model"), ("detector",))
    assert row(info, 512, 1024) > row(info, 256, 256) * 0.9 > 0


def test_the_dry_run_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    owl = tiny_owlvit(tmp_path / "owl")
    rows = [Request(prompt="a fox", detect=["a cat"])]
    plain = plan_job([Request(prompt="a fox")], Options(), {})
    job = plan_job(rows, Options(detector=str(owl), memory="low"), {})
    assert job.looks("float16", "cuda").keys() == {"detector"} and not plain.looks("float16", "cuda")
    large = {"detector": Look(2**31, 2**28)}
    monkeypatch.setattr(plan, "looks", lambda infos, dtype, device, largest: large if infos else {})
    command = ["generate", "--prompt", "a fox", "--detect", "a cat", "--detector", str(owl), "--memory", "low"]
    assert cli.run([*command, "-o", str(tmp_path / "run"), "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["memory_gib"]["cuda"]
    assert said["low"] == 2.25 and said["high"] > said["weights"] > 2
