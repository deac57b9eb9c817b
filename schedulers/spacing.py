"""Spacing axis: at which noise levels the network is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from genkit.schedulers.noise import Levels, Noise

Array = np.ndarray
RHO = 7.0  # Karras et al. 2022, equation 5


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a spacing lays n points over N training steps.

    spare: lay n + 1 and drop the last, as DPM-Solver does. whole: timesteps are rounded to whole numbers. offset: added
    to `leading`. low: where `linspace` ends. inner: the spacing that gives Karras' end points, None for the whole schedule.
    """

    n: int
    train: int
    spare: bool = False
    whole: bool = False
    offset: int = 0
    low: float = 0.0
    inner: str | None = None


def leading(g: Grid) -> Array:
    """0, r, 2r, … from below, r = N // n: never reaches pure noise. Table 2 of Lin et al. 2024, like the next two."""
    count = g.n + g.spare
    return (np.arange(count) * (g.train // count))[::-1][: g.n].astype(float) + g.offset


def trailing(g: Grid) -> Array:
    """N, N - N/n, … rounded, less 1: starts at pure noise."""
    return np.round(np.arange(g.train, 0, -g.train / g.n))[: g.n] - 1


def linspace(g: Grid) -> Array:
    """Even from N - 1 to 0, both of them points."""
    t = np.linspace(g.low, g.train - 1, g.n + g.spare)[::-1][: g.n]
    return np.round(t) if g.whole else t


def karras(g: Grid, noise: Noise) -> Levels:
    """Even in (sigma / alpha)^(1/7)."""
    ends = noise.at(TIMESTEPS[g.inner](g)).k if g.inner else noise.table.k[::-1]
    finite = ends[np.isfinite(ends)]
    high, low = finite[0] ** (1 / RHO), finite[-1] ** (1 / RHO)
    levels = noise.at_k((high + np.linspace(0, 1, g.n) * (low - high)) ** RHO)
    return dataclasses.replace(levels, t=np.round(levels.t)) if g.whole else levels


TIMESTEPS: dict[str, Callable[[Grid], Array]] = {"leading": leading, "trailing": trailing, "linspace": linspace}
SPACINGS: dict[str, Callable[[Grid, Noise], Levels]] = {
    "leading": lambda g, noise: noise.at(leading(g)),
    "trailing": lambda g, noise: noise.at(trailing(g)),
    "linspace": lambda g, noise: noise.at(linspace(g)),
    "karras": karras,
}
