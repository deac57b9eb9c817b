"""Grids of test cases: the quick choice of them, and the rest behind the mark `slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int, keep: Iterable[Any] = (), unpack: bool = False) -> list[Any]:
    """Return all cases for `parametrize`: every n-th one and those of `keep` as they are, the others marked slow.

    unpack: the cases are tuples for several argument names.
    """
    chosen = list(keep)
    return [
        case
        if i % every == 0 or case in chosen
        else pytest.param(*(case if unpack else (case,)), marks=pytest.mark.slow)
        for i, case in enumerate(cases)
    ]
