"""The fields `detect` and `ask` of a row: what vision models look for in its pictures, besides what its gate names."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator

from genkit.errors import InputError
from genkit.scoring.senses import Asked

MOST = 100  # words, and questions, of one row


class Detecting(BaseModel):
    """What a detector looks for in the pictures of a row, and what is asked about them."""

    detect: Annotated[list[str], Field(min_length=1, max_length=MOST)] | None = None
    ask: Annotated[list[str], Field(min_length=1, max_length=MOST)] | None = None

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

    @field_validator("ask")
    @classmethod
    def _check_ask(cls, value: list[str] | None) -> list[str] | None:
        from genkit.scoring.said import check_questions

        check_questions(value or ())
        return value

    @property
    def sought(self) -> list[str]:
        """The words to look for: those of `detect`, then those of gate and rank_by, each once."""
        return list(dict.fromkeys([*(self.detect or ()), *(word for one in self._used for word in one.words)]))

    @property
    def questions(self) -> list[str]:
        """The questions to ask: those of `ask`, then those of gate and rank_by, each once."""
        return list(dict.fromkeys([*(self.ask or ()), *(q for one in self._used for q in one.questions)]))

    @property
    def asked(self) -> Asked:
        """What is asked of vision models about each picture of the row."""
        return Asked(tuple(self.sought), tuple(self.questions))

    @property
    def _used(self) -> list[Used]:
        row: Any = self
        labels = None if row.labels is None else tuple(row.labels)
        return [used_by(text, labels) for text in (row.gate, row.rank_by) if text is not None]


@dataclasses.dataclass(frozen=True)
class Used:
    """What an expression needs of vision models: words, questions, and which models."""

    words: tuple[str, ...]
    questions: tuple[str, ...]
    senses: tuple[str, ...]


@functools.lru_cache(4096)
def used_by(text: str, labels: tuple[str, ...] | None) -> Used:
    """Return what an expression needs of vision models."""
    from genkit.scoring.gates import Expression

    found = Expression(text, labels, names=None)
    return Used(found.words, found.questions, found.senses)
