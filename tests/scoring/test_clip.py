"""The scorer: equal to transformers' own processor and model, and it tells right pictures from wrong ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from genkit import ClipScorer, InputError, TextToImage
from genkit.scoring.clip import TEMPLATES
from tests.tiny import EMBEDDED, tiny_clip

LABELS = ["a red fox", "a green apple", "a pizza", "a blue whale"]


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer.from_pretrained("emoji-clip", device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    gen = TextToImage.from_pretrained("emoji", device="cpu")
    return [gen(label, seed=1, num_inference_steps=10).images[0] for label in LABELS]


def odd_sizes(pictures: list[Image.Image]) -> list[Image.Image]:
    return [p.resize(size, Image.Resampling.BICUBIC) for p, size in
            zip(pictures, [(128, 128), (300, 200), (77, 131), (512, 512)], strict=True)]  # fmt: skip


def reference(folder: Path, pictures: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """Cosines of every picture with every text, by transformers alone."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=pictures, return_tensors="pt").pixel_values
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        found = model(pixel_values=pixels, **tokens)
    return found.image_embeds @ found.text_embeds.T


def test_scores_are_those_of_transformers(scorer: ClipScorer, pictures: list[Image.Image]) -> None:
    images = odd_sizes(pictures)
    expected = reference(EMBEDDED / "emoji-clip", images, LABELS)
    assert scorer.score(images, LABELS) == pytest.approx(expected.diagonal().tolist(), abs=1e-2)
    tensors = [torch.from_numpy(np.array(i)).permute(2, 0, 1)[None] / 255 for i in images]
    from_tensors = [scorer.score(t, label)[0] for t, label in zip(tensors, LABELS, strict=True)]
    assert from_tensors == pytest.approx(expected.diagonal().tolist(), abs=1e-2)


def test_shortest_edge_and_centre_crop_as_transformers_does_them(tmp_path: Path, pictures: list[Image.Image]) -> None:
    tiny_clip(tmp_path)
    config = (tmp_path / "preprocessor_config.json").read_text()
    images = odd_sizes(pictures)
    expected = reference(tmp_path, images, LABELS)
    found = ClipScorer.from_pretrained(tmp_path, device="cpu").score(images, LABELS)
    assert found == pytest.approx(expected.diagonal().tolist(), abs=1e-2), config


def test_the_right_label_wins(scorer: ClipScorer, pictures: list[Image.Image]) -> None:
    found = scorer.classify(pictures, LABELS)
    assert [max(p, key=p.__getitem__) for p in found] == LABELS
    assert all(sum(p.values()) == pytest.approx(1, abs=1e-4) for p in found)
    scores = [scorer.score(pictures, label) for label in LABELS]
    assert all(max(range(4), key=row.__getitem__) == k for k, row in enumerate(scores))


def test_templates_are_averaged(scorer: ClipScorer, pictures: list[Image.Image]) -> None:
    one = scorer.classify(pictures[:1], LABELS, templates=["{}"])[0]
    many = scorer.classify(pictures[:1], LABELS)[0]
    assert one != many and len(TEMPLATES) > 1
    embedded = torch.stack([scorer.embed_texts([t.format(label) for t in TEMPLATES]).mean(dim=0) for label in LABELS])
    directions = torch.nn.functional.normalize(embedded, dim=-1)
    logits = scorer.model.logit_scale.exp() * scorer.embed_images(pictures[:1]) @ directions.T
    assert list(many.values()) == pytest.approx(logits.softmax(dim=-1)[0].tolist(), abs=1e-5)


def test_prompts_and_images_must_pair_up(scorer: ClipScorer, pictures: list[Image.Image]) -> None:
    with pytest.raises(InputError, match="2 for 4 images"):
        scorer.score(pictures, ["a", "b"])
    assert len(scorer.score(pictures, "a fox")) == 4
    assert scorer.score([], "a fox") == []
    with pytest.raises(InputError, match="not a CLIP model"):
        ClipScorer.from_pretrained("emoji")
