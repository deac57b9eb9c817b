"""Rows of coefficients: what every solver is written in."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from genkit.schedulers.noise import Noise

HISTORY = 4  # earlier predictions that a row can use


FEW = 15  # plans of fewer steps end in steps of lower order (lower_order_final), as in diffusers' DPM-Solver


class Point(NamedTuple):
    """One noise level: what the network is told there, alpha and sigma."""

    t: float
    alpha: float
    sigma: float

    @property
    def k(self) -> float:
        """sigma / alpha: infinite at pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def lam(self) -> float:
        """log(alpha / sigma), half the log signal-to-noise ratio: -inf at pure noise, +inf at the picture."""
        return -math.log(self.k) if self.k else math.inf


X0 = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Row:
    """A network call at a level, and the coefficients of the step after it. leaves: (x, x0) parts of its h."""

    at: Point
    cx: float
    c0: float
    cr: float = 0.0
    cn: float = 0.0
    c: tuple[float, ...] = ()
    leaves: tuple[float, float] = X0
    draws: bool = False  # noise also where cn is 0, as diffusers does


@dataclasses.dataclass(frozen=True)
class Path:
    """The levels that a trajectory passes: calls are made at points[0 … n-1], and points[n] is where it ends.

    targets: where step i aims; points[i + 1], but for diffusers' DDIM, whose stride ignores rounding. total: steps of
    the whole plan, before `strength` cut it.
    """

    points: tuple[Point, ...]
    targets: tuple[Point, ...]
    total: int
    noise: Noise

    @property
    def n(self) -> int:
        return len(self.targets)

    @property
    def steps(self) -> list[tuple[Point, Point]]:
        return list(itertools.pairwise(self.points))

    def at(self, k: float) -> Point:
        return Point(*map(float, self.noise.at_k(np.array(k))))


class Step(NamedTuple):
    """x' = cx x + w[0] m_0 + w[1] m_1 + … + cn noise, with m the x0 (or eps) of the calls it uses, newest first."""

    cx: float
    w: tuple[float, ...]
    cn: float = 0.0


def row_of(at: Point, step: Step, eps: bool = False, draws: bool = False) -> Row:
    """Return the row of a step whose w[0] belongs to this call's x0, or eps."""
    first, *past = step.w
    if not eps:
        return Row(at, cx=step.cx, c0=first, cn=step.cn, c=tuple(past), draws=draws)
    x, x0 = 1 / at.sigma, -at.alpha / at.sigma
    return Row(at, step.cx + first * x, first * x0, cn=step.cn, c=tuple(past), leaves=(x, x0), draws=draws)


def add(first: Sequence[float], second: Sequence[float], scale: float) -> tuple[float, ...]:
    return tuple(p + scale * q for p, q in itertools.zip_longest(first, second, fillvalue=0.0))


@dataclasses.dataclass(frozen=True)
class SolverOptions:
    """What a solver reads of its Scheduler; the fields mean what they mean there.

    noise: name of the noise schedule. rule: of multistep and singlestep solvers. noisy_end, half: see Style.
    """

    solver: str
    noise: str
    order: int | tuple[int, ...]
    rule: Any
    eta: float
    variance: str
    solver_type: str | None
    corrector: bool
    corrector_order: int
    tau: float
    predict_eps: bool
    lower_order_final: bool
    euler_at_final: bool
    noisy_end: bool
    half: bool
