"""What is in a picture, in words: captions and answers to questions, by BLIP (Li et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genkit.device.devices import pick_device
from genkit.errors import HostError, InputError, shown
from genkit.scoring.said import check_question
from genkit.vision.classes import CLASSES
from genkit.vision.models import Loaded, Sense, VisionInfo, load_model

if TYPE_CHECKING:
    from typing import Self

SENSES = ("captioner",)
TOKENS = 50  # most, of a caption
QUESTIONS = 1000  # whose tokens are kept


class Captioner(Sense):
    """Captions of pictures, or answers to a question about them: greedy, so the same picture has the same caption.

    Attribute name: as it was loaded.
    """

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self.name = loaded.info.name
        self._able = CLASSES[loaded.kind].answers
        self._questions: dict[str, dict[str, torch.Tensor]] = {}

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
        Raises InputError where it is missing, or is too long, HostError where the network's result is not a number.
        """
        check_text(self.loaded.info, text)
        given = {} if text is None else self._tokens(text)
        found = self.in_batches(len(pixels), lambda part: self._say(pixels[part], given, tokens))
        texts = [caption for part in found for caption in part]
        if None in texts:
            kind = str(self.dtype).removeprefix("torch.")
            raise HostError(f"{self.name}: its scores are no numbers in {kind}: use --dtype float32")
        return [str(text) for text in texts]

    def answers(self, pictures: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[str | None]]:
        """Return the answers to the questions about each uint8 picture (B, 3, H, W), which is encoded once for all.

        An answer is None where the network's result is not a number. Raises InputError for a model that captions, and
        for a question that is too long.
        """
        self.check_questions(question for some in questions for question in some)
        pixels = self.pixels(pictures)
        encoded = torch.cat(self.in_batches(len(pixels), lambda part: self._encoded(pixels[part])))
        found: list[dict[str, str | None]] = [{} for _ in questions]
        for question in dict.fromkeys(question for some in questions for question in some):
            places = [n for n, some in enumerate(questions) if question in some]
            given, chosen = self._questions[question], encoded[places]
            said = self.in_batches(len(places), lambda part, g=given, x=chosen: self._answer(x[part], g, TOKENS))  # type: ignore[misc]
            for n, text in zip(places, (text for part in said for text in part), strict=True):
                found[n][question] = text
        return [[found[n][question] for question in some] for n, some in enumerate(questions)]

    def check_questions(self, questions: Iterable[str]) -> None:
        """Raise InputError for a model that captions, and for a question that is longer than the model reads."""
        for question in dict.fromkeys(questions):
            if not self._able:
                raise InputError(f"{self.name}: {self.loaded.kind} captions, and answers no questions")
            if question not in self._questions:
                check_question(question)
                if len(self._questions) >= QUESTIONS:
                    self._questions.clear()
                self._questions[question] = self._tokens(question)

    def forget(self) -> None:
        """Drop the tokens of questions."""
        self._questions.clear()

    def _tokens(self, text: str) -> dict[str, torch.Tensor]:
        tokens = self.loaded.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        most = self.model.config.text_config.max_position_embeddings
        if tokens.input_ids.shape[1] > most:
            raise InputError(f"text: {shown(text)} has {tokens.input_ids.shape[1]} tokens, more than the {most} read")
        return dict(tokens.to(self.device))

    def _say(self, pixels: torch.Tensor, given: dict[str, torch.Tensor], tokens: int) -> list[str | None]:
        if self._able:
            return self._answer(self._encoded(pixels), given, tokens)
        start = given["input_ids"].shape[1] - 1 if given else 1
        repeated = {name: value.repeat(len(pixels), 1) for name, value in given.items()}
        return self._texts(
            self.model.generate(pixel_values=pixels.to(self.device), **repeated, **self._options(start, tokens))
        )

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the text networks read of pictures, (B, patches + 1, width)."""
        return self.model.vision_model(pixel_values=pixels.to(self.device))[0]

    def _answer(self, encoded: torch.Tensor, given: dict[str, torch.Tensor], tokens: int) -> list[str | None]:
        """Return the answers to one question about encoded pictures, as BlipForQuestionAnswering.generate does it."""
        model, count = self.model, len(encoded)
        asked = {name: value.repeat(count, 1) for name, value in given.items()}
        ones = torch.ones(encoded.shape[:-1], dtype=torch.long, device=encoded.device)
        states = model.text_encoder(
            **asked, encoder_hidden_states=encoded, encoder_attention_mask=ones, return_dict=False
        )[0]
        return self._texts(
            model.text_decoder.generate(
                input_ids=torch.full((count, 1), model.decoder_start_token_id, device=states.device),
                eos_token_id=model.config.text_config.sep_token_id,
                pad_token_id=model.config.text_config.pad_token_id,
                encoder_hidden_states=states,
                encoder_attention_mask=torch.ones(states.shape[:-1], dtype=torch.long, device=states.device),
                **self._options(1, tokens),
            )
        )

    def _options(self, start: int, tokens: int) -> dict[str, Any]:
        most = self.model.config.text_config.max_position_embeddings
        greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": max(1, min(tokens, most - start))}
        return {**greedy, "return_dict_in_generate": True, "output_logits": True}

    def _texts(self, found: Any) -> list[str | None]:
        """Return the texts; None where a logit is NaN, of which the greatest has no meaning."""
        texts = self.loaded.tokenizer.batch_decode(found.sequences, skip_special_tokens=True)
        broken = torch.stack([step.isnan().any(dim=-1) for step in found.logits]).any(dim=0).tolist()
        return [None if bad else text.strip() for text, bad in zip(texts, broken, strict=True)]


def check_text(info: VisionInfo, text: str | None) -> None:
    """Raise InputError unless a model that answers has a question, and any text says something."""
    if text is None and CLASSES[info.kind].answers:
        raise InputError(f"question: is missing: {info.name} answers questions; another model captions")
    if text is not None and (not text.strip() or "\x00" in text):
        raise InputError(f"question: {shown(text)} is no text")
