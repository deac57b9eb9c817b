"""Check the number of tokens of words and texts before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genkit.errors import InputError, reason, shown
from genkit.files import place
from genkit.vision.models import VisionInfo

ENDS = 2  # start and end token, in CLIP and in BERT


def most_tokens(info: VisionInfo) -> int:
    """Return the maximum number of tokens of a model's text encoder."""
    config = info.part.config
    if info.kind == "GroundingDinoForObjectDetection":
        return int(config.get("max_text_len") or 256)
    default = {"segmenter": 77, "captioner": 512, "video classifier": 77}.get(info.sense, 16)
    return int((config.get("text_config") or {}).get("max_position_embeddings", default))


def joined(words: Sequence[str]) -> str:
    """Return the prompt of Grounding DINO for these words: "a cat. a dog."."""
    return ". ".join(word.strip().lower() for word in words) + "."


class Lengths:
    """Checks the words of rows against a detector's limit. Without a tokenizer.json the loaded detector checks them."""

    def __init__(self, info: VisionInfo) -> None:
        self.info, self.most = info, most_tokens(info)
        self._tokenizer: Any = None
        self._checked: set[tuple[str, ...]] = set()

    def check(self, words: Sequence[str]) -> None:
        """Raise InputError for a word with too many tokens; for Grounding DINO also for all words together."""
        key = tuple(words)
        path = self.info.folder / "tokenizer.json"
        if not words or key in self._checked or not path.exists():
            return
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            try:
                self._tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the Rust library raises plain Exception
                raise InputError(f"{place(path)}: cannot be read: {reason(error)}") from None
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        for word in words:
            refuse_long(word, self._count(word), self.info)
        if self.info.kind == "GroundingDinoForObjectDetection":
            refuse_many(words, self._count(joined(words)), self.info)
        self._checked.add(key)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids) + ENDS


def refuse_long(word: str, count: int, info: VisionInfo) -> None:
    """Raise InputError for a word of more tokens than the text encoder reads."""
    if count > most_tokens(info):
        raise InputError(
            f"detect: {shown(word)} has {count} tokens, more than the {most_tokens(info)} that {info.name} reads"
        )


def refuse_many(words: Sequence[str], count: int, info: VisionInfo) -> None:
    """Raise InputError for words that have more tokens together than the text encoder reads."""
    if count > most_tokens(info):
        raise InputError(
            f"detect: {len(words)} words have {count} tokens together, more than the {most_tokens(info)} that "
            f"{info.name} reads: look for fewer"
        )


def check_lengths(info: VisionInfo, words: Sequence[str], field: str, lengths: Lengths | None = None) -> None:
    """Raise InputError, naming the field, for a text of more tokens than a segmenter or captioner reads.

    lengths: the checker of this model, if there is one already, so that the tokenizer is not read again.
    """
    try:
        (lengths or Lengths(info)).check(words)
    except InputError as error:
        raise InputError(f"{field}: {str(error).removeprefix('detect: ')}") from None
