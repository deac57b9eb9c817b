"""What is in a picture, in words: BLIP (Li et al. 2022), Florence-2 (Xiao et al. 2023), a ViT before a GPT-2."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from genkit.errors import InputError, shown
from genkit.scoring.said import check_question
from genkit.vision.classes import CLASSES
from genkit.vision.generation import FLORENCE, detail_of
from genkit.vision.models import Loaded, Sense, VisionInfo

BLIP = "BlipForConditionalGeneration"  # continues texts
TOKENS = 50  # maximum length of an answer
QUESTIONS = 1000  # questions whose tokens are cached


class Captioner(Sense):
    """Captions of pictures, or answers to questions about them. Decoding is deterministic, it never samples."""

    sense = "captioner"

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self._answers_questions = CLASSES[loaded.kind].answers
        self._questions: dict[str, dict[str, torch.Tensor]] = {}
        stated = loaded.info.generation
        if stated is not None:
            from transformers import GenerationConfig

            self.model.generation_config = GenerationConfig(**stated)
        how = self.model.generation_config
        if CLASSES[loaded.kind].generates and how.decoder_start_token_id is None and how.bos_token_id is None:
            raise InputError(f"{self.name}: generation_config.json: decoder_start_token_id: is missing")

    def __call__(
        self, pictures: torch.Tensor, text: str | None = None, tokens: int | None = None, detail: str | None = None
    ) -> list[str]:
        """Return a text for each uint8 picture (B, 3, H, W); see `captions`."""
        return self.captions(self.pixels(pictures), text, tokens, detail)

    def captions(
        self, pixels: torch.Tensor, text: str | None = None, tokens: int | None = None, detail: str | None = None
    ) -> list[str]:
        """Return the caption of each picture (B, 3, h, w) that `pixels` has prepared.

        text: the question for a model that answers questions, which requires one; for BLIP, the beginning of the
        caption. detail: one of DETAILS, for Florence-2. tokens: maximum number of new tokens; default 50, or that of
        `detail`. Raises InputError for a text that is missing, too long, or not read by this model, HostError if the
        logits are NaN.
        """
        info = self.loaded.info
        check_text(info, text)
        asked, most = detail_of(info.kind, info.name, detail)
        count, words = most if tokens is None else tokens, text if asked is None else asked
        found = self.in_batches(len(pixels), lambda part: self._say(pixels[part].to(self.device), words, count))
        texts = [caption for part in found for caption in part]
        if None in texts:
            raise self.nan_error()
        return [str(text) for text in texts]

    def answers(self, pictures: torch.Tensor, questions: Sequence[Sequence[str]]) -> list[list[str | None]]:
        """Return the answers to the questions about each uint8 picture of (B, 3, H, W); each picture is encoded once.

        An answer is None if its logits are NaN. Raises InputError for a model that only writes captions, and for a
        question that is too long.
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
        """Raise InputError for a model that only writes captions, and for a question that is too long for it."""
        for question in dict.fromkeys(questions):
            if not self._answers_questions:
                raise InputError(f"{self.name}: {self.loaded.kind} captions, and answers no questions")
            if question not in self._questions:
                check_question(question)
                if len(self._questions) >= QUESTIONS:
                    self._questions.clear()
                self._questions[question] = self._tokens(question)

    def forget(self) -> None:
        """Clear the cached tokens of questions."""
        self._questions.clear()

    def _tokens(self, text: str) -> dict[str, torch.Tensor]:
        tokens = self.loaded.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        most = self.model.config.text_config.max_position_embeddings
        if tokens.input_ids.shape[1] > most:
            raise InputError(f"text: {shown(text)} has {tokens.input_ids.shape[1]} tokens, more than the {most} read")
        return dict(tokens.to(self.device))

    def _say(self, pixels: torch.Tensor, text: str | None, tokens: int) -> list[str | None]:
        if self._answers_questions:
            return self._answer(self._encoded(pixels), self._tokens(str(text)), tokens)
        given, most = _KINDS[self.loaded.kind](self, pixels, text)
        return self._texts(self.model, len(pixels), tokens, most, **given)

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the image features that the text encoder attends to, (B, patches + 1, width)."""
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
            model.text_decoder,
            count,
            tokens,
            model.config.text_config.max_position_embeddings - 1,
            input_ids=torch.full((count, 1), model.decoder_start_token_id, device=states.device),
            eos_token_id=model.config.text_config.sep_token_id,
            pad_token_id=model.config.text_config.pad_token_id,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:-1], dtype=torch.long, device=states.device),
            num_beams=1,
        )

    def _texts(self, network: Any, count: int, tokens: int, most: int, **given: Any) -> list[str | None]:
        """Generate a text of at most min(tokens, most) new tokens for each of `count` pictures.

        None where a logit was NaN: the argmax of such logits has no meaning.
        """
        broken = torch.zeros(count, dtype=torch.bool, device=self.device)

        def watch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            broken.logical_or_(scores.isnan().any(dim=-1).view(count, -1).any(dim=-1))  # any beam of the picture
            return scores

        options = {"do_sample": False, "max_new_tokens": max(1, min(tokens, most)), "logits_processor": [watch]}
        with _quiet():
            ids = network.generate(**given, **options)
        texts = self.loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [None if bad else text.strip() for text, bad in zip(texts, broken.tolist(), strict=True)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warning about a missing attention mask: pictures do not need one."""
    log = logging.getLogger("transformers.generation.utils")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def check_text(info: VisionInfo, text: str | None) -> None:
    """Raise InputError for a missing question, for an empty text, and for a text that the model does not read."""
    if text is None and CLASSES[info.kind].answers:
        raise InputError(f"question: is missing: {info.name} answers questions; another model captions")
    if text is not None and info.kind != BLIP and not CLASSES[info.kind].answers:
        raise InputError(f"text: {shown(text)}: {info.name} reads none beside the picture; a {BLIP} continues one")
    if text is not None and (not text.strip() or "\x00" in text):
        raise InputError(f"question: {shown(text)} is no text")


Given = tuple[dict[str, Any], int]  # keyword arguments of `generate`, and the number of tokens that still fit


def _blip(captioner: Captioner, pixels: torch.Tensor, text: str | None) -> Given:
    most = captioner.model.config.text_config.max_position_embeddings
    if text is None:
        return {"pixel_values": pixels, "num_beams": 1}, most - 1
    tokens = captioner._tokens(text)
    repeated = {name: value.repeat(len(pixels), 1) for name, value in tokens.items()}
    return {"pixel_values": pixels, "num_beams": 1, **repeated}, most - tokens["input_ids"].shape[1] + 1


def _florence(captioner: Captioner, pixels: torch.Tensor, text: str | None) -> Given:
    """Return the inputs of Florence-2's decoder: image features and the task prompt, encoded together."""
    model, tokenizer = captioner.model, captioner.loaded.tokenizer
    features = model.get_image_features(pixels).pooler_output
    asked = tokenizer(f"{tokenizer.bos_token}{text}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
    most, places = model.config.text_config.max_position_embeddings, features.shape[1]
    if places + len(asked) > most:
        raise InputError(f"{captioner.name}: {places} features and {len(asked)} tokens are more than {most}")
    words = model.get_input_embeddings()(torch.tensor([asked], device=captioner.device)).expand(len(pixels), -1, -1)
    inputs = torch.cat([features.to(words.dtype), words], dim=1)
    mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=captioner.device)
    encoded = model.model.language_model.encoder(attention_mask=mask, inputs_embeds=inputs)
    return {"encoder_outputs": encoded, "attention_mask": mask}, most - 1


def _gpt2(captioner: Captioner, pixels: torch.Tensor, text: str | None) -> Given:
    return {"pixel_values": pixels}, captioner.model.config.decoder.max_position_embeddings - 1


_KINDS: dict[str, Callable[[Captioner, torch.Tensor, str | None], Given]] = {
    BLIP: _blip, FLORENCE: _florence, "VisionEncoderDecoderModel": _gpt2,
}  # fmt: skip
