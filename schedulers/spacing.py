"""Spacing axis: at which noise levels the network is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from genkit.errors import InputError
from genkit.schedulers.noise import Array, Levels, Noise

RHO = 7.0  # Karras et al. 2022, equation 5


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a spacing lays n points over `train` training steps.

    spare: lay n + 1 and drop the last, as DPM-Solver does. rounding: what makes timesteps whole numbers, if anything.
    offset: added to `leading`. low: where `linspace` ends. ends: the spacing that karras takes its end points from,
    None for the ends of the noise schedule.
    """

    n: int
    train: int
    spare: bool = False
    rounding: Callable[[Array], Array] | None = None
    offset: int = 0
    low: float = 0.0
    ends: str | None = None

    def rounded(self, t: Array) -> Array:
        return t if self.rounding is None else self.rounding(t)


def leading(g: Grid) -> Array:
    """0, r, 2r, … from below, r = N // n: never reaches pure noise. Table 2 of Lin et al. 2024, like the next two."""
    count = g.n + g.spare
    t = (np.arange(count) * (g.train // count))[::-1][: g.n].astype(float) + g.offset
    if count > g.train or t[0] >= g.train:
        raise InputError(
            f"num_inference_steps: {g.n} with steps_offset {g.offset} do not fit {g.train} timesteps, leading"
        )
    return t


def trailing(g: Grid) -> Array:
    """N, N - N/n, … rounded, less 1: starts at pure noise."""
    return np.round(np.arange(g.train, 0, -g.train / g.n))[: g.n] - 1


def linspace(g: Grid) -> Array:
    """Even from N - 1 to 0, both of them points."""
    return g.rounded(np.linspace(g.low, g.train - 1, g.n + g.spare)[::-1][: g.n])


def karras(g: Grid, noise: Noise) -> Levels:
    """Even in (sigma / alpha)^(1/7), from the largest finite level (Karras et al. 2022, equation 5)."""
    ends = noise.at(TIMESTEPS[g.ends](g)).k if g.ends else noise.table.k[::-1]
    finite = ends[np.isfinite(ends)]
    high, low = finite[0] ** (1 / RHO), finite[-1] ** (1 / RHO)
    levels = noise.at_k((high + np.linspace(0, 1, g.n) * (low - high)) ** RHO)
    return levels._replace(t=g.rounded(levels.t))


TIMESTEPS: dict[str, Callable[[Grid], Array]] = {"leading": leading, "trailing": trailing, "linspace": linspace}
SPACINGS: dict[str, Callable[[Grid, Noise], Levels]] = {
    "leading": lambda g, noise: noise.at(leading(g)),
    "trailing": lambda g, noise: noise.at(trailing(g)),
    "linspace": lambda g, noise: noise.at(linspace(g)),
    "karras": karras,
}
