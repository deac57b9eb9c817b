"""Detectors: the boxes and scores of transformers' processors, on tiny checkpoints in the real layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    OwlViTForObjectDetection,
    OwlViTProcessor,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

from genkit.errors import HostError, InputError
from genkit.scoring.boxes import COLORS
from genkit.vision.colors import colors_of
from genkit.vision.detector import Detector
from genkit.vision.models import inspect_vision, read_tokenizer
from genkit.vision.words import Lengths
from tests.detectors import tiny_grounding_dino, tiny_owlv2, tiny_owlvit

OWLS: dict[str, Any] = {
    "owlvit": (tiny_owlvit, OwlViTForObjectDetection, OwlViTProcessor, OwlViTImageProcessorPil),
    "owlv2": (tiny_owlv2, Owlv2ForObjectDetection, Owlv2Processor, Owlv2ImageProcessorPil),
}
WORDS = ["a cat", "a red fox"]


def _pictures(height: int = 40, width: int = 56, count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def _between(scores: torch.Tensor) -> float:
    """Return a threshold that half of the scores exceed, and that is none of them."""
    middle = scores.flatten().sort().values[len(scores.flatten()) // 2 :][:2]
    return float(middle.mean())


def _same(found: Any, reference: Any, size: tuple[int, int], labels: list[str] | None) -> None:
    """Compare boxes with a result of transformers, which neither sorts nor clips."""
    order = torch.argsort(-reference["scores"], stable=True)
    assert len(found) == len(order)
    limit = torch.tensor([size[0], size[1], size[0], size[1]])
    for box, n in zip(found, order.tolist(), strict=True):
        expected = reference["boxes"][n].clamp(min=0).minimum(limit)
        assert (torch.tensor([box.x0, box.y0, box.x1, box.y1]) - expected).abs().max() < 1e-3
        assert abs(box.score - float(reference["scores"][n])) < 1e-4
        if labels is not None:
            assert box.label == labels[int(reference["labels"][n])]


@pytest.mark.parametrize("name", OWLS)
def test_owls_find_what_transformers_finds(name: str, tmp_path: Path) -> None:
    make, cls, combined, images = OWLS[name]
    folder = make(tmp_path / name)
    detector = Detector.from_pretrained(folder, device="cpu")
    processor = combined(images.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    model = cls.from_pretrained(folder).eval()
    pictures = _pictures()
    inputs = processor(text=[WORDS] * 3, images=pictures, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    scores = outputs.logits.sigmoid().amax(dim=-1)
    threshold = _between(scores)
    expected = processor.post_process_grounded_object_detection(outputs, threshold, target_sizes=[(40, 56)] * 3)
    found = detector.detect(pictures, WORDS, threshold)
    assert 0 < sum(map(len, found)) < scores.numel()
    for one, reference in zip(found, expected, strict=True):
        _same(one, reference, (56, 40), WORDS)
    tensor = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    assert [[b.label for b in one] for one in detector.detect(tensor, [WORDS] * 3, threshold)] == [
        [b.label for b in one] for one in found
    ]


@pytest.mark.parametrize("name", OWLS)
def test_owls_find_by_example(name: str, tmp_path: Path) -> None:
    make, cls, combined, images = OWLS[name]
    folder = make(tmp_path / name)
    processor = combined(images.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    pictures, example = _pictures(count=1), _pictures(30, 30, 4)[3]
    inputs = processor(images=pictures, query_images=example, return_tensors="pt")
    with torch.no_grad():
        outputs = cls.from_pretrained(folder).eval().image_guided_detection(**inputs)
    sizes = torch.tensor([[40, 56]])
    expected = processor.post_process_image_guided_detection(outputs, 0.0, target_sizes=sizes)[0]
    found = Detector.from_pretrained(folder, device="cpu").detect_like(pictures, example, 0.0)[0]
    best = max(box.score for box in found)  # transformers returns how opaque a box is to be drawn, from its score
    alphas = [min(1.0, (box.score - 0.1 * (best + 1e-6)) / (0.9 * (best + 1e-6))) for box in found]
    order = torch.argsort(-expected["scores"])
    assert np.allclose(alphas, expected["scores"][order].numpy(), atol=1e-3)
    boxes = expected["boxes"][order].clamp(min=0).minimum(torch.tensor([56, 40, 56, 40]))
    assert np.allclose([[b.x0, b.y0, b.x1, b.y1] for b in found], boxes.numpy(), atol=1e-3)


def test_grounding_dino_finds_what_transformers_finds(tmp_path: Path) -> None:
    folder = tiny_grounding_dino(tmp_path / "dino")
    processor = GroundingDinoProcessor(
        GroundingDinoImageProcessorPil.from_pretrained(folder), BertTokenizer.from_pretrained(folder)
    )
    pictures = _pictures()
    inputs = processor(images=pictures, text=[WORDS] * 3, return_tensors="pt")
    with torch.no_grad():
        outputs = GroundingDinoForObjectDetection.from_pretrained(folder).eval()(**inputs)
    threshold = _between(outputs.logits.sigmoid().amax(dim=-1))
    expected = processor.post_process_grounded_object_detection(
        outputs, inputs.input_ids, threshold, 0.0, target_sizes=[(40, 56)] * 3
    )
    detector = Detector.from_pretrained(folder, device="cpu")
    for one, reference in zip(detector.detect(pictures, WORDS, threshold), expected, strict=True):
        _same(one, reference, (56, 40), None)
        assert {box.label for box in one} <= set(WORDS)
    with pytest.raises(InputError, match="finds by words only"):
        detector.detect_like(pictures, pictures[0])
    with pytest.raises(InputError, match="tokens together, more than the 256"):
        detector.detect(pictures[:1], [f"{'a ' * 80}cat {n}" for n in range(4)])


def test_pictures_of_different_sizes_and_words_are_found_as_alone(tmp_path: Path) -> None:
    detector = Detector.from_pretrained(tiny_owlvit(tmp_path / "owl"), device="cpu")
    pictures = [*_pictures(40, 56, 2), *_pictures(32, 32, 1)]
    words = [["a cat"], ["a dog", "a cat"], ["a cat"]]
    together = detector.detect(pictures, words, 0.0)
    for picture, some, found in zip(pictures, words, together, strict=True):
        alone = detector.detect([picture], some, 0.0)[0]
        assert [b.label for b in alone] == [b.label for b in found]
        assert np.allclose([b.score for b in alone], [b.score for b in found], atol=1e-5)
    assert detector.detect(pictures, [[], [], []]) == [[], [], []]
    assert set(detector._words) == {"a cat", "a dog"}
    detector.forget()
    assert not detector._words


def test_bad_words_and_scores_that_are_no_numbers(tmp_path: Path) -> None:
    detector = Detector.from_pretrained(tiny_owlvit(tmp_path / "owl"), device="cpu")
    picture = _pictures(count=1)
    with pytest.raises(InputError, match="tokens, more than the 16"):
        detector.detect(picture, ["a very long " * 9])
    with pytest.raises(InputError, match="nothing to look for"):
        detector.detect(picture, [" "])
    with pytest.raises(InputError, match="2 lists for 1 pictures"):
        detector.detect(picture, [["a"], ["b"]])
    detector.model.layer_norm.weight.fill_(float("inf"))
    with pytest.raises(HostError, match="no numbers in float32"):
        detector.detect(picture, ["a cat"])
    assert detector.see([torch.zeros(3, 8, 8, dtype=torch.uint8)], [["a cat"]])[0].broken


@pytest.mark.parametrize("make", [tiny_owlvit, tiny_grounding_dino])
def test_lengths_are_known_without_the_model(make: Any, tmp_path: Path) -> None:
    info = inspect_vision(make(tmp_path / "model"), ("detector",))
    tokenizer, lengths = read_tokenizer(info), Lengths(info)
    lengths.check(["a cat", "a red fox"])
    for word in ("a red fox", "two cats of 3, the Dog-house"):
        assert lengths._count(word) == len(tokenizer(word)["input_ids"])
    with pytest.raises(InputError, match="tokens, more than the"):
        lengths.check(["a very long cat " * 70])


def test_ten_thousand_boxes_are_cut_to_the_best(tmp_path: Path) -> None:
    detector = Detector.from_pretrained(tiny_owlvit(tmp_path / "owl"), device="cpu")
    scores = torch.rand(10_000)
    raw = scores, torch.zeros(10_000, dtype=torch.int64), torch.rand(10_000, 4)
    seen = detector._seen(torch.zeros(3, 64, 64, dtype=torch.uint8), raw, ["a cat"], 0.05, 300)
    assert len(seen.boxes) == 300
    assert seen.boxes[-1].score >= seen.floor == pytest.approx(float(scores.sort().values[-301]))
    assert all(0 <= box.x0 <= box.x1 <= 64 for box in seen.boxes)


NAMED = {
    "black": (10, 10, 10), "white": (250, 250, 250), "grey": (128, 128, 128), "red": (220, 20, 30),
    "orange": (255, 140, 0), "yellow": (255, 230, 20), "green": (30, 160, 60), "blue": (30, 80, 220),
    "purple": (128, 0, 160), "pink": (255, 170, 190), "brown": (120, 72, 30),
}  # fmt: skip


def test_main_colours() -> None:
    assert set(NAMED) == set(COLORS)
    for name, rgb in NAMED.items():
        image = Image.new("RGB", (20, 20), (255, 255, 255) if name != "white" else (0, 0, 0))
        ImageDraw.Draw(image).rectangle((5, 5, 14, 14), fill=rgb)
        picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert colors_of(picture, [(5, 5, 15, 15), (4, 4, 16, 16), (19.9, 19.9, 20, 20)])[:2] == [name, name]


def test_a_config_may_state_the_threshold(tmp_path: Path) -> None:
    folder = tiny_owlvit(tmp_path / "owl")
    assert Detector.from_pretrained(folder, device="cpu").threshold == 0.1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "detection_threshold": 0.35}))
    assert Detector.from_pretrained(folder, device="cpu").threshold == 0.35
    for wrong in (1, "0.3", True):
        (folder / "config.json").write_text(json.dumps({**config, "detection_threshold": wrong}))
        with pytest.raises(InputError, match=r"detection_threshold: .* is not a number above 0 and below 1"):
            inspect_vision(folder, ("detector",))
