"""Scores of x0 predictions part-way through sampling, and final scores, of the images of a row."""

from __future__ import annotations

import dataclasses

import numpy as np

from genkit.errors import InputError, shown
from genkit.rows.request import Request
from genkit.scoring.gates import Expression

MARKS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the steps after which x0 predictions are scored


@dataclasses.dataclass(frozen=True)
class Watched:
    """The images of one row: final scores (n,), and early scores of their x0 predictions (n, len(MARKS))."""

    final: np.ndarray
    early: np.ndarray


def order_of(row: Request) -> Expression | None:
    """Return the row's rank_by, None for clip. Raises InputError if it uses sim, which depends on other images."""
    order = None if row.rank_by is None else Expression(row.rank_by, row.labels, names=None)
    if order is not None and "sim" in order.names:
        raise InputError(f"row {row.id}: rank_by: {shown(order.text)} reads sim, which no picture has by itself")
    return order
