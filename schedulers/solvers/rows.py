"""What solvers are made of: noise levels, trajectories, options and rows of coefficients."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from genkit.schedulers.noise import Noise

HISTORY = 4  # earlier predictions that a row can use


class Level(NamedTuple):
    """One noise level: the timestep passed to the network, alpha and sigma."""

    t: float
    alpha: float
    sigma: float

    @property
    def ve_sigma(self) -> float:
        """sigma / alpha, the sigma of k-diffusion: infinite at pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def lam(self) -> float:
        """lambda = log(alpha / sigma), half the log SNR (Lu et al. 2022): -inf at pure noise, +inf at sigma 0."""
        return -math.log(self.ve_sigma) if self.ve_sigma else math.inf


@dataclasses.dataclass(frozen=True)
class Row:
    """A network call at `level` and the coefficients of the step after it (see the package's docstring).

    c: weights of the history entries, newest first. history: (x, x0) weights of the entry that this call adds.
    consumes_noise: draw noise even where cn is 0, as diffusers does.
    """

    level: Level
    cx: float
    c0: float
    cr: float = 0.0
    cn: float = 0.0
    c: tuple[float, ...] = ()
    history: tuple[float, float] = (0.0, 1.0)
    consumes_noise: bool = False


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The noise levels of one plan: the network is called at levels[0 … num_steps - 1]; levels[num_steps] is the end.

    targets: the level that each step leads to; levels[i + 1], except for diffusers' DDIM with its fixed stride.
    plan_steps: steps of the whole plan, before `strength` cut it.
    """

    levels: tuple[Level, ...]
    targets: tuple[Level, ...]
    plan_steps: int
    noise: Noise

    @property
    def num_steps(self) -> int:
        return len(self.targets)

    @property
    def steps(self) -> list[tuple[Level, Level]]:
        return list(itertools.pairwise(self.levels))

    @property
    def strides(self) -> list[tuple[Level, Level]]:
        """The steps, to `targets`."""
        return list(zip(self.levels, self.targets, strict=False))

    def at_ve_sigma(self, ve_sigma: float) -> Level:
        return Level(*map(float, self.noise.at_ve_sigma(np.array(ve_sigma))))


@dataclasses.dataclass(frozen=True)
class SolverOptions:
    """The options of a Scheduler, and the conventions of its style, that solvers read.

    order: a number, or one for each step. flow: whether the noise schedule is rectified flow. noisy_last_step,
    halved_second_moment: see `Style`.
    """

    order: int | tuple[int, ...]
    eta: float
    variance: str
    solver_type: str | None
    corrector: bool
    corrector_order: int
    tau: float
    predict_eps: bool
    lower_order_final: bool
    euler_at_final: bool
    flow: bool
    noisy_last_step: bool
    halved_second_moment: bool


Rows = Callable[..., list[Row]]  # of a Trajectory and SolverOptions


@dataclasses.dataclass(frozen=True)
class Solver:
    """An entry of SOLVERS. style: its diffusers classes, in STYLES. options: those of Scheduler that it reads.

    orders: (default, greatest). spacing: the one that comes with it when none is chosen.
    """

    rows: Rows
    style: str
    options: tuple[str, ...] = ()
    orders: tuple[int, int] = (1, 1)
    spacing: str | None = None


class Step(NamedTuple):
    """x' = cx x + w[0] m_0 + w[1] m_1 + … + cn noise, m_i the x0 (or eps) predicted i calls ago."""

    cx: float
    w: tuple[float, ...]
    cn: float = 0.0
