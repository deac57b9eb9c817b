"""The field `detect` of a row: words to look for in its pictures, besides those of its gate and rank_by."""

from __future__ import annotations

import functools
from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator

from genkit.errors import InputError

MOST = 100  # words of one row


class Detecting(BaseModel):
    """What a detector looks for in the pictures of a row."""

    detect: Annotated[list[str], Field(min_length=1, max_length=MOST)] | None = None

    @field_validator("detect")
    @classmethod
    def _check_detect(cls, value: list[str] | None) -> list[str] | None:
        from genkit.scoring.boxes import check_word

        if value is not None and len(set(value)) < len(value):
            raise ValueError("must be different words")
        try:
            return value if value is None else [check_word(word) for word in value]
        except InputError as error:
            raise ValueError(str(error)) from None

    @property
    def sought(self) -> list[str]:
        """The words to look for: those of `detect`, then those of gate and rank_by, each once."""
        row: Any = self
        texts = tuple(text for text in (row.gate, row.rank_by) if text is not None)
        found = [word for text in texts for word in words_of(text, None if row.labels is None else tuple(row.labels))]
        return list(dict.fromkeys([*(self.detect or ()), *found]))


@functools.lru_cache(4096)
def words_of(text: str, labels: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the words of which an expression needs boxes."""
    from genkit.scoring.gates import Expression

    return Expression(text, labels, names=None).words
