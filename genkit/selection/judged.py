"""The images of a row, judged one by one: rejected or not, and the value each is ranked by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from genkit.rows.request import Request
from genkit.rows.result import Result, value_of
from genkit.runs.table import Row
from genkit.scoring.gates import Expression, passes


@dataclasses.dataclass(frozen=True)
class Weigher:
    """The images of a row whose gate or rank_by uses `sim`, which changes with every choice."""

    found: Sequence[Result]
    gate: Expression | None
    order: Expression | None
    keep: int | None

    @property
    def moving(self) -> bool:
        """Whether the order depends on sim, not only which images pass."""
        return self.keep is not None and reads_sim(self.order)

    def __call__(self, k: int, sim: float) -> float:
        """Return the value that image k is ranked by at that sim; NaN if it does not pass or has no value."""
        r = with_sim(self.found[k], sim)
        if not passes(self.gate, r.scores):
            return math.nan
        value = value_of(r, self.order)
        return -math.inf if value != value and self.keep is None else value

    def refusal(self, k: int, sim: float | None) -> str | None:
        """Return why image k is rejected at that sim (None: unknown), or None if sim is not the reason."""
        value = self(k, math.nan if sim is None else sim)
        by = "nan: no score to rank by" if self.gate is None else f"gate: {self.gate.text}"
        return None if value == value else f"{by} (no sim)" if sim is None else f"{by} (sim {sim:.3f})"


@dataclasses.dataclass
class Judged:
    """A row's images: for each a reason to reject it or None, its value, and those with a value, best first.

    weigh: set if the row uses `sim`; values and ranked are then for the first choice.
    """

    request: Request | Row
    found: list[Result]
    reasons: list[str | None]
    values: list[float]  # NaN: nothing to rank by
    ranked: list[int]
    keep: int | None
    hard: dict[str, Any] | None = None
    weigh: Weigher | None = None

    def candidates(self) -> list[int]:
        """Return the positions in `found` of the images that may be kept, best first."""
        if self.keep is not None:
            return self.ranked
        return self.ranked + [k for k, r in enumerate(self.reasons) if r is None and self.values[k] != self.values[k]]


def reads_sim(expression: Expression | None) -> bool:
    return expression is not None and "sim" in expression.names


def with_sim(r: Result, sim: float) -> Result:
    return dataclasses.replace(r, scores={**r.scores, "sim": sim})
