"""What solvers share: noise levels, trajectories, rows of coefficients, and the formulas of a single Euler step."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from genkit.schedulers.noise import Noise

HISTORY = 4  # earlier predictions that a row can use
FEW_STEPS = 15  # lower_order_final applies to fewer steps than this, as in diffusers' DPM-Solver

_nodes, _weights = np.polynomial.legendre.leggauss(40)
QUADRATURE_NODES, QUADRATURE_WEIGHTS = 0.5 * (1 + _nodes), 0.5 * _weights  # Gauss-Legendre, on the interval [0, 1]


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


@dataclasses.dataclass(frozen=True)
class Solver:
    """An entry of SOLVERS. style: its diffusers classes, in STYLES. options: those of Scheduler that it reads.

    orders: (default, greatest). spacing: the one that comes with it when none is chosen.
    """

    rows: Callable[[Trajectory, SolverOptions], list[Row]]
    style: str
    options: tuple[str, ...] = ()
    orders: tuple[int, int] = (1, 1)
    spacing: str | None = None


class Step(NamedTuple):
    """x' = cx x + w[0] m_0 + w[1] m_1 + … + cn noise, m_i the x0 (or eps) predicted i calls ago."""

    cx: float
    w: tuple[float, ...]
    cn: float = 0.0


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


def distinct(nodes: Sequence[float]) -> list[int]:
    """Return the places of the finite nodes, each value once."""
    return [j for j, node in enumerate(nodes) if math.isfinite(node) and node not in nodes[:j]]


def polynomial_weights(nodes: Sequence[float], used: Sequence[int], integrals: np.ndarray) -> tuple[float, ...]:
    """Return the weights of values at `nodes` in the integral of the polynomial through those that are `used`.

    integrals: of 1, u, u^2, …, one for each node used.
    """
    w = np.zeros(len(nodes))
    w[[*used]] = np.linalg.solve(np.vander([nodes[j] for j in used], increasing=True).T, integrals)
    return tuple(map(float, w))
