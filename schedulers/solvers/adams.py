"""PNDM and iPNDM: DDIM's step with eps extrapolated by Adams-Bashforth weights (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from genkit.schedulers.solvers.rows import HISTORY, Row, SolverOptions, Step, Trajectory
from genkit.schedulers.solvers.steps import first_eps_row, limit_orders, row

# Weights by order, newest eps first: Liu et al. 2022, equation 12, and its lower orders.
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """x' = alpha'/alpha x + (sigma' - alpha' sigma/alpha) sum_j w_j eps_j, w the weights for evenly spaced calls.

    Of order 2 where the steps are not even.
    """
    return _adams(trajectory, limit_orders(trajectory, options, "none"), repeat_first=False)


def pndm(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """PLMS: ipndm, with the first step repeated in the second call, with the mean of the eps at both of its ends.

    Without Runge-Kutta steps; later steps do not use the repeated call. A step from pure noise is not repeated.
    """
    repeat = trajectory.num_steps > 1 and trajectory.levels[0].alpha > 0
    return _adams(trajectory, [HISTORY] * trajectory.num_steps, repeat)


def _adams(trajectory: Trajectory, orders: Sequence[int], repeat_first: bool) -> list[Row]:
    rows: list[Row] = []
    usable: list[bool] = []  # whether later steps use a history entry, newest first
    for i, (here, to) in enumerate(trajectory.strides):
        gain = to.sigma - to.alpha / here.alpha * here.sigma if here.alpha else 0.0
        if here.alpha:
            weights = iter(ADAMS[min(sum(usable) + 1, orders[i]) - 1])
            past = tuple(next(weights, 0.0) * gain if use else 0.0 for use in (True, *usable[:HISTORY]))
            rows.append(row(here, Step(to.alpha / here.alpha, past), eps=True))
        else:
            rows.append(first_eps_row(here, to))
        usable.insert(0, True)
        if i == 0 and repeat_first:
            rows.append(row(trajectory.levels[1], Step(1.0, (gain / 2, -gain / 2)), eps=True))
            usable.insert(0, False)
    return rows
