"""What expressions are compiled to: terms, and the names, labels and words that they use."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from genkit.errors import InputError, shown

Scores = Mapping[str, Any]
Value = Callable[[Scores], Any]
NUMBER, TRUTH, EITHER = "number", "truth", "either"


@dataclasses.dataclass(frozen=True)
class Term:
    """A compiled subexpression: its value as a function of the scores, its kind, and the range of a number.

    floor: values below it are not stored, and read as 0.
    """

    value: Value
    kind: str = NUMBER
    low: float = -math.inf
    high: float = math.inf
    floor: float = 0.0


@dataclasses.dataclass
class Scope:
    """What an expression may use, and what it was found to use."""

    labels: Collection[str] | None
    known: dict[str, Term]
    anything: bool
    used: set[str] = dataclasses.field(default_factory=set)
    used_labels: set[str] = dataclasses.field(default_factory=set)
    seen: list[tuple[tuple[str, ...], float | None]] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)
    questions: list[str] = dataclasses.field(default_factory=list)


def score(name: str) -> Value:
    """Return the function of a picture's scores that a name is; it raises InputError where there is no such score."""

    def value(scores: Scores) -> Any:
        found = scores.get(name)
        if found is None:
            raise InputError(f"{name}: this image has no such score; was it scored?")
        return found

    return value


def quoted(node: ast.AST) -> str:
    """Return a part of an expression as it is written, for messages."""
    try:
        return shown(ast.unparse(node))
    except (ValueError, RecursionError):
        return "this"
