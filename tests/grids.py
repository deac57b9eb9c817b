"""Grids of test cases: the quick choice of them, and the rest behind the mark `slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int, keep: Iterable[Any] = ()) -> list[Any]:
    """Return all cases for `parametrize`: every n-th one and those of `keep` as they are, the others marked slow."""
    chosen = list(keep)
    return [
        case if i % every == 0 or case in chosen else pytest.param(*_values(case), marks=pytest.mark.slow)
        for i, case in enumerate(cases)
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
