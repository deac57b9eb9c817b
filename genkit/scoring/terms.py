"""Compiled subexpressions, and the names, labels and words that they use."""

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
    """A compiled subexpression: its value as a function of the scores, its kind, and its range if it is a number.

    floor: smaller values are not stored with a run and are read as 0.
    """

    value: Value
    kind: str = NUMBER
    low: float = -math.inf
    high: float = math.inf
    floor: float = 0.0


@dataclasses.dataclass
class Scope:
    """The labels and names that an expression may use, and what it has been found to use."""

    labels: Collection[str] | None
    known: dict[str, Term]
    anything: bool
    used: set[str] = dataclasses.field(default_factory=set)
    used_labels: set[str] = dataclasses.field(default_factory=set)
    seen: list[tuple[tuple[str, ...], float | None]] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)
    questions: list[str] = dataclasses.field(default_factory=list)


def score(name: str) -> Value:
    """Return the function that looks up a score by name. It raises InputError for an image without that score."""

    def value(scores: Scores) -> Any:
        found = scores.get(name)
        if found is None:
            raise InputError(f"{name}: this image has no such score; was it scored?")
        if not isinstance(found, int | float):
            raise InputError(f"{name}: {shown(found)} is no number")
        return found

    return value


def quoted(node: ast.AST) -> str:
    """Return the source of a subexpression, for messages."""
    try:
        return shown(ast.unparse(node))
    except (ValueError, RecursionError):
        return "this"
