"""On a GPU: vision models compute what they do on the CPU, runs use them, the server draws. Skipped elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genkit import Request, generate
from genkit.options import Options
from genkit.vision.captioner import Captioner
from genkit.vision.classifier import Classifier
from genkit.vision.depth import Depth
from genkit.vision.detector import Detector
from genkit.vision.segmenter import Segmenter
from genkit.vision.video import VideoClassifier
from tests.captioners import tiny_florence
from tests.check_run import check_run
from tests.classifiers import tiny_classifier
from tests.depths import tiny_depth_anything, tiny_zoedepth
from tests.detectors import tiny_grounding_dino, tiny_owlv2, tiny_owlvit
from tests.senses import noise, tensor, tiny_blip, tiny_clipseg
from tests.timms import tiny_timm
from tests.tiny import tiny_stable_diffusion
from tests.videos import shots, tiny_xclip

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DEVICE = "cuda"
WORDS = ["fox", "owl"]


def pictures() -> torch.Tensor:
    return torch.cat([tensor(noise(seed, 48, 64)) for seed in range(3)])


def boxes(detector: Any) -> torch.Tensor:
    """The numbers of all boxes, those of a picture in the order of where they lie."""
    found = [[box.to_json()[1:6] for box in some] for some in detector.detect(pictures(), WORDS, threshold=0.01)]
    return torch.tensor([numbers for some in found for numbers in sorted(some, key=lambda n: n[1:])])


SENSES: dict[str, tuple[Any, Callable[[Path], Path], Callable[[Any], torch.Tensor]]] = {
    "owlvit": (Detector, tiny_owlvit, boxes),
    "owlv2": (Detector, tiny_owlv2, boxes),
    "grounding-dino": (Detector, tiny_grounding_dino, boxes),
    "clipseg": (Segmenter, tiny_clipseg, lambda model: model(pictures(), WORDS)),
    "vit": (Classifier, tiny_classifier, lambda model: model(pictures())),
    "timm": (Classifier, tiny_timm, lambda model: model(pictures())),
    "depth-anything": (Depth, tiny_depth_anything, lambda model: model(pictures())),
    "zoedepth": (Depth, tiny_zoedepth, lambda model: model(pictures())),
    "x-clip": (VideoClassifier, tiny_xclip, lambda model: model([shots(6)], WORDS)),
}


@pytest.mark.parametrize("name", SENSES)
def test_float32_on_the_gpu_computes_what_the_cpu_does(name: str, tmp_path: Path) -> None:
    kind, write, numbers = SENSES[name]
    folder = write(tmp_path / "model")
    slow = numbers(kind.from_pretrained(folder, device="cpu"))
    fast = numbers(kind.from_pretrained(folder, device=DEVICE, dtype="float32"))
    assert len(slow) > 0 and fast.shape == slow.shape
    assert float((fast - slow).abs().max()) <= 2e-3 * max(1.0, float(slow.abs().max()))


@pytest.mark.parametrize("name", SENSES)
def test_half_precision_gives_numbers(name: str, tmp_path: Path) -> None:
    kind, write, numbers = SENSES[name]
    model = kind.from_pretrained(write(tmp_path / "model"), device=DEVICE)
    assert bool(numbers(model).isfinite().all())


@pytest.mark.parametrize("write", [tiny_blip, tiny_florence])
def test_captions_are_those_of_the_cpu(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    slow = Captioner.from_pretrained(folder, device="cpu")(pictures(), tokens=4)
    assert Captioner.from_pretrained(folder, device=DEVICE, dtype="float32")(pictures(), tokens=4) == slow


def test_a_run_that_looks_with_every_sense(tmp_path: Path) -> None:
    vit = tiny_classifier(tmp_path / "vit")
    label = Classifier.from_pretrained(vit, device="cpu").labels[0]
    gate = f"count['fox'] < 100 and p_class[{label!r}] > 0.0001"
    rows = [Request(id=str(k), prompt="a fox", seed=k, num_inference_steps=4, gate=gate) for k in range(3)]
    summary = generate(
        rows, out=tmp_path / "run", device=DEVICE, detector=str(tiny_owlvit(tmp_path / "owl")), classifier=str(vit),
        quiet=True,
    )  # fmt: skip
    assert (summary.images, summary.failed, summary.kept) == (3, 0, 3)
    check_run(tmp_path / "run", finished=True)


def test_models_of_a_server_take_turns_on_the_gpu(tmp_path: Path) -> None:
    """A model that comes back to the GPU draws what it drew before it left."""
    pytest.importorskip("fastapi", reason="the server is an extra")
    httpx = pytest.importorskip("httpx", reason="the server's client is of the tests")
    from genkit.serve.choice import Choice
    from tests.serve.conftest import serve

    tiny_stable_diffusion(tmp_path / "first")
    tiny_stable_diffusion(tmp_path / "second", {"_class_name": "EulerAncestralDiscreteScheduler"})
    running = serve(Options(device=DEVICE, batch_size=4, model="first"), choice=Choice(tmp_path))
    drawn = []
    for name in ("first", "second", "first"):
        body = {"prompt": "a fox", "model": name, "seed": 5, "steps": 3}
        answer = httpx.post(f"{running.url}/v1/images/generations", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
        drawn.append(np.asarray(picture).astype(int))
    running.server.should_exit = True
    running.thread.join(20)
    for one in running.serving.models.values():
        one.engine.close()
    running.server.listener.close()
    assert np.abs(drawn[0] - drawn[2]).max() <= 1 and np.abs(drawn[0] - drawn[1]).max() > 1
