"""What is in a picture, in words: captions and answers to questions, by BLIP (Li et al. 2022)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genkit.device.devices import pick_device
from genkit.errors import InputError, shown
from genkit.vision.models import Sense, VisionInfo, load_model

if TYPE_CHECKING:
    from typing import Self

SENSES = ("captioner",)
ANSWERS = "BlipForQuestionAnswering"  # the class that reads questions; the other one continues texts
TOKENS = 50  # most, of a caption


class Captioner(Sense):
    """Captions of pictures, or answers to a question about them: greedy, so the same picture has the same caption."""

    @classmethod
    def from_pretrained(cls, name: str | Path | VisionInfo, *, device: str = "auto", dtype: str = "auto") -> Self:
        """Load a captioner by folder or hub id. Raises InputError and HostError as `load_model` does."""
        return cls(load_model(name, SENSES, *pick_device(device, dtype)))

    def __call__(self, pictures: torch.Tensor, text: str | None = None, tokens: int = TOKENS) -> list[str]:
        """Return a text for each uint8 picture (B, 3, H, W); see `captions`."""
        return self.captions(self.pixels(pictures), text, tokens)

    def captions(self, pixels: torch.Tensor, text: str | None = None, tokens: int = TOKENS) -> list[str]:
        """Return the caption of each picture (B, 3, h, w) as `pixels` prepares them, of at most `tokens` new tokens.

        text: for a model that answers, the question, which it needs; for one that captions, how the caption begins.
        Raises InputError where it is missing, or is too long.
        """
        check_text(self.loaded.info, text)
        given = {} if text is None else self._tokens(text)
        found = self.in_batches(len(pixels), lambda part: self._say(pixels[part], given, tokens))
        return [caption for part in found for caption in part]

    def _tokens(self, text: str) -> dict[str, torch.Tensor]:
        tokens = self.loaded.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        most = self.model.config.text_config.max_position_embeddings
        if tokens.input_ids.shape[1] > most:
            raise InputError(f"text: {shown(text)} has {tokens.input_ids.shape[1]} tokens, more than the {most} read")
        return dict(tokens.to(self.device))

    def _say(self, pixels: torch.Tensor, given: dict[str, torch.Tensor], tokens: int) -> list[str]:
        most = self.model.config.text_config.max_position_embeddings
        start = 1 if self.loaded.kind == ANSWERS or not given else given["input_ids"].shape[1] - 1
        repeated = {name: value.repeat(len(pixels), 1) for name, value in given.items()}
        options: dict[str, Any] = {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": max(1, min(tokens, most - start)),
        }
        ids = self.model.generate(pixel_values=pixels.to(self.device), **repeated, **options)
        return [text.strip() for text in self.loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def check_text(info: VisionInfo, text: str | None) -> None:
    """Raise InputError unless a model that answers has a question, and any text says something."""
    if text is None and info.kind == ANSWERS:
        raise InputError(f"question: is missing: {info.name} answers questions; another model captions")
    if text is not None and (not text.strip() or "\x00" in text):
        raise InputError(f"question: {shown(text)} is no text")
