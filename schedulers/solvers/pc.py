"""The predictor-corrector `pc`: the velocity of the normalised sample, integrated over an angle (genkit's own)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from genkit.schedulers.solvers.rows import Path, Point, Row, SolverOptions, add
from genkit.schedulers.solvers.rule import NODES, WEIGHTS, step_orders

STD = 0.54  # of the data, as `pc` takes it


AXIS = (1.15, 36.0)  # `pc` interpolates in log((k + first) / (k + second)): finite from pure noise to none


def pc(path: Path, s: SolverOptions) -> list[Row]:
    """y' = y + int v da: v, the turning of y = x / r, as a polynomial through the last calls; each step redone (ours).

    r = sqrt((alpha std)^2 + sigma^2), a = atan(k / std), so that v = cos(a) eps - sin(a) x0 / std is finite from pure
    noise to none, and so is log((k + 1.15) / (k + 36)), in which it is interpolated; the quadrature over a is exact.
    The predictor has order `order`, the corrector one more: UniPC's structure (Zhao et al. 2023) on the velocity. Goes
    with the spacing `bounded`. Order 1 suits guided networks, 2 or (from 12 steps) 3 smoother ones.
    """
    orders = step_orders(path, s, "none")
    rows: list[Row] = []
    before: tuple[float, ...] = ()
    for i, (here, to) in enumerate(path.steps):
        radius, after = (math.hypot(p.alpha * STD, p.sigma) for p in (here, to))
        w = _turn(here, to, path.points[i::-1][: orders[i]])
        predicted = w
        if i and s.corrector:
            again = _turn(path.points[i - 1], here, path.points[i::-1][: orders[i - 1] + 1])
            w = add(w, add(again, (0.0, *before), -1.0), 1.0)
        before = predicted
        cosine, sine = here.alpha * STD / radius, here.sigma / radius
        x, x0 = cosine / here.sigma, -sine / STD - cosine * here.alpha / here.sigma
        first, *past = (after * weight for weight in w)
        rows.append(Row(here, after / radius + first * x, first * x0, c=tuple(past), leaves=(x, x0)))
    return rows


def _turn(here: Point, to: Point, nodes: Sequence[Point]) -> tuple[float, ...]:
    """Return the weights of v at `nodes` in the integral over the angle from `here` to `to`."""
    begin, end = (math.atan2(p.sigma, p.alpha * STD) for p in (here, to))
    angles = begin + (end - begin) * NODES
    sine, cosine = np.sin(angles), np.cos(angles)

    def axis(sigma: Any, alpha: Any) -> Any:
        return np.log((sigma + AXIS[0] * alpha) / (sigma + AXIS[1] * alpha))

    at = [float(axis(p.sigma, p.alpha)) for p in nodes]
    used = [j for j in range(len(at)) if at[j] not in at[:j]]
    powers = np.vander([at[j] for j in used], increasing=True).T
    values = np.vander(axis(STD * sine, cosine), len(used), increasing=True)
    w = np.zeros(len(nodes))
    w[used] = np.linalg.solve(powers, (end - begin) * (WEIGHTS @ values))
    return tuple(map(float, w))
