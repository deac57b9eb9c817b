"""Scores of the pictures that are predicted part-way: where they are taken, and what they are compared with."""

from __future__ import annotations

import dataclasses

import numpy as np

from genkit.errors import InputError, shown
from genkit.rows.request import Request
from genkit.scoring.gates import Expression

MARKS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the steps, at which predicted pictures are judged


@dataclasses.dataclass(frozen=True)
class Watched:
    """The images of one row: final (n,) scores, and early (n, len(MARKS)) scores of their predicted pictures."""

    final: np.ndarray
    early: np.ndarray


def order_of(row: Request) -> Expression | None:
    """Return what the images of a row are ranked by; None is clip. Raises InputError where that is not of one alone."""
    order = None if row.rank_by is None else Expression(row.rank_by, row.labels, names=None)
    if order is not None and "sim" in order.names:
        raise InputError(f"row {row.id}: rank_by: {shown(order.text)} reads sim, which no picture has by itself")
    return order
