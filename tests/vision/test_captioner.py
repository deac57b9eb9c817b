"""BLIP: captions and answers as transformers generates them, in any batch; `genkit caption`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipForConditionalGeneration, BlipForQuestionAnswering, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from genkit.errors import InputError
from genkit.vision.captioner import Captioner
from tests.senses import noise, tensor, tiny_blip, tiny_blip_vqa

QUESTION = "how many cats in the picture?"


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip_vqa(tmp_path_factory.mktemp("vqa"))


def expected(kind: Any, folder: Path, picture: Image.Image, text: str | None) -> str:
    """Return what transformers' model and processor say of a picture."""
    processor = BlipProcessor(BlipImageProcessorPil.from_pretrained(folder), BertTokenizer.from_pretrained(folder))
    inputs = processor(images=picture, text=text, return_tensors="pt")
    with torch.inference_mode():
        ids = kind.from_pretrained(folder).eval().generate(**inputs, max_new_tokens=20)
    return processor.decode(ids[0], skip_special_tokens=True).strip()


def test_captions_as_in_transformers(blip: Path, vqa: Path) -> None:
    shots = [noise(n, 30 + 9 * n, 50) for n in range(5)]
    cases: list[tuple[Any, Path, str | None]] = [
        (BlipForConditionalGeneration, blip, None),
        (BlipForConditionalGeneration, blip, "a picture of"),
        (BlipForQuestionAnswering, vqa, QUESTION),
    ]
    for kind, folder, text in cases:
        captioner = Captioner.from_pretrained(folder, device="cpu")
        pixels = torch.cat([captioner.pixels(tensor(shot)) for shot in shots])
        found = captioner.captions(pixels, text, 20)
        assert found == [expected(kind, folder, shot, text) for shot in shots]
        assert any(found) and found == [captioner(tensor(shot), text, 20)[0] for shot in shots]
        captioner.batch = 2
        assert captioner.captions(pixels, text, 20) == found


def test_what_a_model_cannot_read_is_refused(blip: Path, vqa: Path) -> None:
    picture = tensor(noise(1, 20, 20))
    with pytest.raises(InputError, match="question: is missing"):
        Captioner.from_pretrained(vqa, device="cpu")(picture)
    with pytest.raises(InputError, match="is no text"):
        Captioner.from_pretrained(blip, device="cpu")(picture, " ")
    with pytest.raises(InputError, match="tokens, more than the 40 read"):
        Captioner.from_pretrained(blip, device="cpu")(picture, "fox " * 50)
