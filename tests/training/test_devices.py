"""A training step on another device than the CPU, which needs none: meta tensors refuse to meet those of the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import checkpoint
from transformers import modeling_utils

from genkit.components import load_components
from genkit.datasets.sources import read_examples
from genkit.training.checkpoint import read_log
from genkit.training.control import model_of
from genkit.training.data import Pictures
from genkit.training.loop import train
from genkit.training.recipe import make_recipe
from genkit.training.setup import Setup
from genkit.training.tasks import KINDS, make_task
from tests.colours import colour_folder
from tests.grids import thinned
from tests.tiny import tiny_clip, tiny_ddpm, tiny_sdxl, tiny_stable_diffusion

ELSEWHERE = torch.device("meta")
SD, XL, DDPM, CLIP = "tiny_stable_diffusion", "tiny_sdxl", "tiny_ddpm", "tiny_clip"
LORA = {"lora": {"rank": 2, "text_encoder": True}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unconditional": ("unconditional", DDPM, {}),
    "text-to-image": ("text-to-image", SD, {}),
    "with its text encoder": ("text-to-image", SD, {"train": {"text_encoder": True}}),
    "SDXL": ("text-to-image", XL, {}),
    "SDXL with its text encoders": ("text-to-image", XL, {"train": {"text_encoder": True}}),
    "every objective": ("text-to-image", SD, {"objective": {
        "snr_gamma": 5.0, "density": "logit_normal", "offset_noise": 0.1, "input_perturbation": 0.1}}),
    "lora": ("lora", SD, LORA),
    "lora of SDXL": ("lora", XL, LORA),
    "textual-inversion": ("textual-inversion", SD, {"token": {"placeholder": "<new>", "initializer": "red"}}),
    "controlnet": ("controlnet", SD, {}),
    "controlnet of SDXL": ("controlnet", XL, {}),
    "autoencoder": ("autoencoder", SD, {}),
    "clip": ("clip", CLIP, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    for make in (tiny_ddpm, tiny_stable_diffusion, tiny_sdxl, tiny_clip):
        make(folder / make.__name__)
    colour_folder(folder / "pictures", 4)
    return folder


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A generator of the other device; torch has none, so that what is drawn with it is checked and drawn without."""
    for name in ("randn", "rand", "randint"):
        real = getattr(torch, name)

        def drawn(*size: Any, generator: Any = None, real: Any = real, **options: Any) -> torch.Tensor:
            assert generator is None or generator.device == torch.device(options.get("device") or "cpu")
            return real(*size, **options)

        monkeypatch.setattr(torch, name, drawn)
    return SimpleNamespace(device=ELSEWHERE)


def data_of(places: Path, kind: str) -> dict[str, Any]:
    return {"path": str(places / "pictures"), **({"conditioning": "invert"} if kind == "controlnet" else {})}


@pytest.mark.parametrize("case", CASES)
def test_a_step_keeps_to_its_device(places: Path, elsewhere: Any, case: str) -> None:
    kind, model, changes = CASES[case]
    values = {"task": kind, "model": str(places / model), "data": data_of(places, kind), **changes}
    recipe = make_recipe(values)
    info = model_of(recipe, KINDS.get(kind, "text-to-image"))
    parts = load_components(info, device=torch.device("cpu"), dtype=torch.float32)
    for part in vars(parts).values():
        if isinstance(part, torch.nn.Module):
            part.to(ELSEWHERE)
    parts = dataclasses.replace(parts, device=ELSEWHERE)
    task = make_task(recipe, parts, torch.float32)
    pictures = Pictures(read_examples(recipe.data), recipe.data, task.resolution, task.multiple, 0)
    batch = pictures.batch([0, 1, 2], 0)
    batch.dropped[1] = True
    tensors = Setup._tensors(SimpleNamespace(task=task, device=ELSEWHERE), batch)  # type: ignore[arg-type]
    for plain in (True, False):
        loss = task.loss(tensors, elsewhere, plain=plain) * tensors["weights"]
        assert loss.shape == (3,) and loss.device == ELSEWHERE
    loss.mean().backward()
    learns = [p for network in task.networks.values() for p in network.parameters() if p.requires_grad]
    assert learns and all(p.grad is not None for p in learns), "several processes would wait for it forever"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
HALF = [("cpu", "bf16", case) for case in CASES]
ON_GPU = [pytest.param("cuda", "fp16", case, marks=[pytest.mark.cuda, needs_gpu]) for case in CASES]


@pytest.mark.parametrize(("device", "precision", "case"), [*thinned(HALF, 3, unpack=True), *ON_GPU])
def test_half_precision_trains_goes_on_and_is_evaluated(
    places: Path, tmp_path: Path, device: str, precision: str, case: str
) -> None:
    kind, model, changes = CASES[case]
    told = {"batch_size": 2, "mixed_precision": precision, "ema": 0.9, **changes.get("train", {})}
    look: dict[str, Any] = {"every": 1, "pictures": 2, "num_inference_steps": 2}
    data = {**data_of(places, kind), "captions": ["a <new>"], "validation": 0.5}
    if kind not in ("unconditional", "autoencoder", "clip"):
        look["prompts"], data["caption_dropout"] = ["red"], 0.5
    values = {"task": kind, "model": str(places / model), "data": data, "evaluate": look, **changes}
    for steps in (1, 3):
        recipe = make_recipe({**values, "train": {"steps": steps, **told}})
        outcome = train(recipe, tmp_path, device=device, quiet=True)
    assert outcome.step == 3 and 0 < outcome.scores["loss"] < 100
    assert (tmp_path / "samples" / "000003.png").exists() == (kind not in ("autoencoder", "clip"))


@pytest.mark.parametrize("case", thinned(["autoencoder", "lora of SDXL", "textual-inversion", "clip", "controlnet"], 3))
def test_gradient_checkpointing_keeps_less_and_learns_the_same(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kind, model, changes = CASES[case]
    told, again, real = {"steps": 3, "batch_size": 2, **changes.get("train", {})}, [0], checkpoint.checkpoint
    data = {**data_of(places, kind), "captions": ["a <new>"], "validation": 0.0}

    def counted(*given: Any, **options: Any) -> Any:
        again[0] += 1
        return real(*given, **options)

    for holder in (checkpoint, modeling_utils):  # transformers takes its own reference
        monkeypatch.setattr(holder, "checkpoint", counted)
    losses = []
    for less in (False, True):
        plan = {**told, "gradient_checkpointing": less}
        values = {"task": kind, "model": str(places / model), "data": data, **changes, "train": plan}
        out = tmp_path / str(less)
        train(make_recipe({**values, "evaluate": {"every": 0}}), out, device="cpu", quiet=True)
        losses.append([line["loss"] for line in read_log(out / "log.jsonl")])
        assert (again[0] > 0) == less
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3
