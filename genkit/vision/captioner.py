"""What is in a picture, in words: BLIP (Li et al. 2022), Florence-2 (Xiao et al. 2023), a ViT before a GPT-2."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genkit.device.devices import pick_device
from genkit.errors import InputError, shown
from genkit.vision.classes import CLASSES
from genkit.vision.generation import FLORENCE, detail_of
from genkit.vision.models import Loaded, Sense, VisionInfo, load_model

if TYPE_CHECKING:
    from typing import Self

SENSES = ("captioner",)
BLIP = "BlipForConditionalGeneration"
ANSWERS = "BlipForQuestionAnswering"  # the class that reads questions; BLIP continues texts, the others read none


class Captioner(Sense):
    """Captions of pictures, or answers to a question about them, never sampled: a picture has one caption."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        stated = loaded.info.generation
        if stated is not None:
            from transformers import GenerationConfig

            self.model.generation_config = GenerationConfig(**stated)
        how = self.model.generation_config
        if CLASSES[loaded.kind].generates and how.decoder_start_token_id is None and how.bos_token_id is None:
            raise InputError(f"{loaded.info.name}: generation_config.json: decoder_start_token_id: is missing")

    @classmethod
    def from_pretrained(cls, name: str | Path | VisionInfo, *, device: str = "auto", dtype: str = "auto") -> Self:
        """Load a captioner by folder or hub id. Raises InputError and HostError as `load_model` does."""
        return cls(load_model(name, SENSES, *pick_device(device, dtype)))

    def __call__(
        self, pictures: torch.Tensor, text: str | None = None, tokens: int | None = None, detail: str | None = None
    ) -> list[str]:
        """Return a text for each uint8 picture (B, 3, H, W); see `captions`."""
        return self.captions(self.pixels(pictures), text, tokens, detail)

    def captions(
        self, pixels: torch.Tensor, text: str | None = None, tokens: int | None = None, detail: str | None = None
    ) -> list[str]:
        """Return the caption of each picture (B, 3, h, w) as `pixels` prepares them, of at most `tokens` new tokens.

        text: for a model that answers, the question, which it needs; for BLIP, how the caption begins. detail: of
        Florence-2, one of DETAILS. tokens: as many as that detail may have, else 50. Raises InputError for a text that
        is missing, too long, or for a model that reads none.
        """
        info = self.loaded.info
        check_text(info, text)
        asked, most = detail_of(info.kind, info.name, detail)
        count, words = most if tokens is None else tokens, text if asked is None else asked
        found = self.in_batches(len(pixels), lambda part: self._say(pixels[part].to(self.device), words, count))
        return [caption for part in found for caption in part]

    def _say(self, pixels: torch.Tensor, text: str | None, tokens: int) -> list[str]:
        given, most = _KINDS[self.loaded.kind](self, pixels, text)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max(1, min(tokens, most))}
        with _quiet():
            ids = self.model.generate(pixel_values=pixels, **given, **options)
        return [text.strip() for text in self.loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning that pictures have no attention mask: they need none."""
    log = logging.getLogger("transformers.generation.utils")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def check_text(info: VisionInfo, text: str | None) -> None:
    """Raise InputError unless a model that answers has a question, and a text says something and is read at all."""
    if text is None and info.kind == ANSWERS:
        raise InputError(f"question: is missing: {info.name} answers questions; another model captions")
    if text is not None and info.kind not in (BLIP, ANSWERS):
        raise InputError(f"text: {shown(text)}: {info.name} reads none beside the picture; a {BLIP} continues one")
    if text is not None and (not text.strip() or "\x00" in text):
        raise InputError(f"question: {shown(text)} is no text")


Given = tuple[dict[str, Any], int]  # what `generate` is given beside pixels, and how many tokens there is room for


def _blip(captioner: Captioner, pixels: torch.Tensor, text: str | None) -> Given:
    most = captioner.model.config.text_config.max_position_embeddings
    if text is None:
        return {"num_beams": 1}, most - 1
    tokens = captioner.loaded.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    length = tokens.input_ids.shape[1]
    if length > most:
        raise InputError(f"text: {shown(text)} has {length} tokens, more than the {most} read")
    repeated = {name: value.to(captioner.device).repeat(len(pixels), 1) for name, value in tokens.items()}
    return {"num_beams": 1, **repeated}, most - (1 if captioner.loaded.kind == ANSWERS else length - 1)


def _florence(captioner: Captioner, pixels: torch.Tensor, text: str | None) -> Given:
    """Return the ids of Florence-2's processor: a place for each feature of the picture, then what is asked."""
    model, tokenizer = captioner.model, captioner.loaded.tokenizer
    places = model.get_image_features(pixels[:1]).pooler_output.shape[1]
    asked = tokenizer(f"{tokenizer.bos_token}{text}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
    most = model.config.text_config.max_position_embeddings
    if places + len(asked) > most:
        raise InputError(
            f"{captioner.loaded.info.name}: {places} features and {len(asked)} tokens are more than {most}"
        )
    ids = torch.tensor([[model.config.image_token_id] * places + asked], device=captioner.device)
    ids = ids.repeat(len(pixels), 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, most - 1


def _gpt2(captioner: Captioner, pixels: torch.Tensor, text: str | None) -> Given:
    return {}, captioner.model.config.decoder.max_position_embeddings - 1


_KINDS: dict[str, Callable[[Captioner, torch.Tensor, str | None], Given]] = {
    BLIP: _blip, ANSWERS: _blip, FLORENCE: _florence, "VisionEncoderDecoderModel": _gpt2,
}  # fmt: skip
