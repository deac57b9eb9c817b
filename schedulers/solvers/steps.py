"""Formulas that several solvers share: Euler's step, the orders of multistep solvers, interpolation weights."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from genkit.schedulers.solvers.rows import HISTORY, Level, Row, SolverOptions, Step, Trajectory

FEW_STEPS = 15  # lower_order_final applies to fewer steps than this, as in diffusers' DPM-Solver
_nodes, _weights = np.polynomial.legendre.leggauss(40)
NODES, WEIGHTS = 0.5 * (1 + _nodes), 0.5 * _weights  # Gauss-Legendre, on the interval [0, 1]


def row(level: Level, step: Step, eps: bool = False, consumes_noise: bool = False) -> Row:
    """Return the row of a step whose w[0] weighs the x0, or eps = (x - alpha x0) / sigma, of the call at `level`."""
    first, *past = step.w
    if not eps:
        return Row(level, step.cx, first, 0.0, step.cn, tuple(past), consumes_noise=consumes_noise)
    x, x0 = 1 / level.sigma, -level.alpha / level.sigma
    return Row(level, step.cx + first * x, first * x0, 0.0, step.cn, tuple(past), (x, x0), consumes_noise)


def add(first: Sequence[float], second: Sequence[float], scale: float) -> tuple[float, ...]:
    """Return first + scale * second, the shorter of the two padded with zeros."""
    return tuple(p + scale * q for p, q in itertools.zip_longest(first, second, fillvalue=0.0))


def transfer(here: Level, to: Level, eta: float) -> tuple[float, float]:
    """Return (direction, noise) of x' = alpha' x0 + direction (x - alpha x0) + noise * unit noise.

    noise = eta sigma' sqrt(1 - (s'/s)^2), direction = sqrt(sigma'^2 - noise^2) / sigma: Song et al. 2021, equations
    12 and 16, written so that they hold for any alpha and sigma.
    """
    fresh = eta**2 * max(0.0, 1 - (to.ve_sigma / here.ve_sigma) ** 2)  # share of the new variance that is drawn anew
    return to.sigma / here.sigma * math.sqrt(1 - fresh), to.sigma * math.sqrt(fresh)


def euler_row(here: Level, to: Level, eta: float = 0.0) -> Row:
    direction, noise = transfer(here, to, eta)
    return Row(here, cx=direction, c0=to.alpha - here.alpha * direction, cn=noise)


def first_eps_row(here: Level, to: Level) -> Row:
    """Return Euler's step from pure noise for solvers that extrapolate eps: there eps = x / sigma."""
    return dataclasses.replace(euler_row(here, to), history=(1 / here.sigma, 0.0))


def stages(calls: Sequence[Level], steps: Sequence[Step], eps: bool) -> list[Row]:
    """Return the rows of steps that all start at calls[0]; step j uses the predictions at calls[0 … j], newest first.

    Only the last step may add noise, since each row recovers the start from the result of the step before.
    """
    rows, before = [], Step(1.0, ())
    for level, step in zip(calls, steps, strict=True):
        ratio = step.cx / before.cx
        rows.append(row(level, Step(ratio, add(step.w, (0.0, *before.w), -ratio), step.cn), eps))
        before = step
    return rows


def limit_orders(trajectory: Trajectory, options: SolverOptions, final: str) -> list[int]:
    """Return the order of every step: as asked, at most the number of calls so far, and lower at the end by `final`.

    "dpm": 1 in the last step when it leads to sigma 0, or when euler_at_final or (below FEW_STEPS) lower_order_final
    ask for it, and with the latter 2 in the step before. "remaining": with lower_order_final at most the number of
    steps that remain. "none": no limit.
    """
    n, order = trajectory.num_steps, options.order
    asked = [order] * n if isinstance(order, int) else [*order, *[order[-1]] * n]
    few, remaining = options.lower_order_final and trajectory.plan_steps < FEW_STEPS, range(n, 0, -1)
    if final == "dpm":
        euler = options.euler_at_final or few or not trajectory.levels[-1].sigma
        most = [1 if left == 1 and euler else 2 if left == 2 and few else HISTORY for left in remaining]
    else:
        most = [*remaining] if final == "remaining" and options.lower_order_final else [HISTORY] * n
    return [min(asked[i], i + 1, most[i]) for i in range(n)]


def polynomial_weights(nodes: Sequence[float], integrals: Callable[[int], np.ndarray]) -> tuple[float, ...]:
    """Return the weights of values at `nodes` in the integral of the polynomial through them.

    integrals(n): of 1, u, …, u^(n-1). Nodes that are infinite, or repeat one, get no weight.
    """
    used = [j for j, node in enumerate(nodes) if math.isfinite(node) and node not in nodes[:j]]
    w = np.zeros(len(nodes))
    w[used] = np.linalg.solve(np.vander([nodes[j] for j in used], increasing=True).T, integrals(len(used)))
    return tuple(map(float, w))
