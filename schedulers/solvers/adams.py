"""Adams-Bashforth solvers with the weights of even steps: ipndm, pndm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from genkit.schedulers.solvers.one_step import euler_row
from genkit.schedulers.solvers.rows import HISTORY, Path, Row, SolverOptions, Step, row_of
from genkit.schedulers.solvers.rule import step_orders

# Adams-Bashforth weights, newest first: Liu et al. 2022, equation 12, and its lower orders.
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(path: Path, s: SolverOptions) -> list[Row]:
    """DDIM's step with eps extrapolated from up to four calls as if they were evenly apart (Liu et al. 2022, eq. 12).

    x' = alpha'/alpha x + (sigma' - alpha' sigma/alpha) sum_j w_j eps_j, of order 2 where steps are not even.
    """
    return _adams(path, step_orders(path, s, "none"), again=False)


def pndm(path: Path, s: SolverOptions) -> list[Row]:
    """ipndm, the second call repeating the first step with the mean of the eps at both of its ends (PLMS).

    Liu et al. 2022 without Runge-Kutta steps; the repeated call is not used again. From pure noise it is not repeated.
    """
    return _adams(path, [HISTORY] * path.n, again=path.n > 1 and path.points[0].alpha > 0)


def _adams(path: Path, orders: Sequence[int], again: bool) -> list[Row]:
    rows: list[Row] = []
    usable: list[bool] = []  # which calls of the history count, newest first
    for i, (here, to) in enumerate(zip(path.points, path.targets, strict=False)):
        gain = to.sigma - to.alpha / here.alpha * here.sigma if here.alpha else 0.0
        if here.alpha:
            weights = iter(ADAMS[min(sum(usable) + 1, orders[i]) - 1])
            past = tuple(next(weights, 0.0) * gain if counts else 0.0 for counts in (True, *usable[:HISTORY]))
            rows.append(row_of(here, Step(to.alpha / here.alpha, past), eps=True))
        else:
            rows.append(dataclasses.replace(euler_row(here, to), leaves=(1 / here.sigma, 0.0)))
        usable.insert(0, True)
        if i == 0 and again:
            rows.append(row_of(path.points[1], Step(1.0, (gain / 2, -gain / 2)), eps=True))
            usable.insert(0, False)
    return rows
