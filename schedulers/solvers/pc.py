"""genkit's own predictor-corrector `pc`, finite from pure noise to the clean picture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from genkit.schedulers.solvers.rows import Level, Row, SolverOptions, Trajectory
from genkit.schedulers.solvers.steps import NODES, WEIGHTS, add, limit_orders, polynomial_weights

DATA_STD = 0.54  # standard deviation of the data, fitted to Gaussian mixtures with OFFSETS
OFFSETS = (1.15, 36.0)  # v is interpolated in log((s + 1.15) / (s + 36))


def pc(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """y' = y + int v da, y = x / r: v, the velocity of y, as a polynomial through the last calls; each step redone.

    r = sqrt((alpha DATA_STD)^2 + sigma^2) and a = atan(s / DATA_STD), so v = cos(a) eps - sin(a) x0 / DATA_STD is
    finite from pure noise to sigma 0, and so is log((s + 1.15) / (s + 36)), in which it is interpolated; the integral
    over a is by quadrature. The predictor has order `order`, the corrector one more: UniPC's structure (Zhao et al.
    2023) on the velocity. Used with the spacing `bounded`. Order 1 suits guided networks, 2 or (from 12 steps) 3
    smoother ones.
    """
    orders = limit_orders(trajectory, options, "none")
    rows: list[Row] = []
    before: tuple[float, ...] = ()
    for i, (here, to) in enumerate(trajectory.steps):
        radius, after = (math.hypot(level.alpha * DATA_STD, level.sigma) for level in (here, to))
        nodes = trajectory.levels[i::-1]
        w = predicted = _velocity_weights(here, to, nodes[: orders[i]])
        if i and options.corrector:
            redone = _velocity_weights(trajectory.levels[i - 1], here, nodes[: orders[i - 1] + 1])
            w = add(w, add(redone, (0.0, *before), -1.0), 1.0)
        before = predicted
        cosine, sine = here.alpha * DATA_STD / radius, here.sigma / radius
        x, x0 = cosine / here.sigma, -sine / DATA_STD - cosine * here.alpha / here.sigma
        first, *past = (after * weight for weight in w)
        rows.append(Row(here, after / radius + first * x, first * x0, c=tuple(past), history=(x, x0)))
    return rows


def _velocity_weights(here: Level, to: Level, nodes: tuple[Level, ...]) -> tuple[float, ...]:
    """Return the weights of v at `nodes` in its integral over the angle from `here` to `to`."""
    begin, end = (math.atan2(level.sigma, level.alpha * DATA_STD) for level in (here, to))
    angles = begin + (end - begin) * NODES
    sine, cosine = np.sin(angles), np.cos(angles)

    def axis(sigma: Any, alpha: Any) -> Any:
        return np.log((sigma + OFFSETS[0] * alpha) / (sigma + OFFSETS[1] * alpha))

    places = [float(axis(level.sigma, level.alpha)) for level in nodes]

    def integrals(size: int) -> np.ndarray:
        return (end - begin) * (WEIGHTS @ np.vander(axis(DATA_STD * sine, cosine), size, increasing=True))

    return polynomial_weights(places, integrals)
