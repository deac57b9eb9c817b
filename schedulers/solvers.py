"""Solver axis: a solver is a function from the levels it passes to rows of coefficients, one row a network call.

    x' = cx x + c0 x0 + cr x0_raw + cn noise + c[0] h1 + c[1] h2 + ...

x0 is the clipped and x0_raw the unclipped prediction of this call; h1, h2, … are what earlier calls left behind, newest
first: their x0, or their eps = (x - alpha x0) / sigma for solvers that extrapolate that. Below, a prime marks the level
that a step leads to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

HISTORY = 4  # earlier predictions that a row can use


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


@dataclasses.dataclass(frozen=True)
class Row:
    """A network call at a level, and the coefficients of the step after it."""

    at: Point
    cx: float
    c0: float
    cr: float = 0.0
    cn: float = 0.0
    c: tuple[float, ...] = ()
    leaves_eps: bool = False  # for later calls, instead of x0


@dataclasses.dataclass(frozen=True)
class Path:
    """The levels that a trajectory passes: calls are made at points[0 … n-1], and points[n] is where it ends.

    targets: where step i aims; points[i + 1], but for diffusers' DDIM, whose stride ignores rounding.
    """

    points: tuple[Point, ...]
    targets: tuple[Point, ...]

    @property
    def n(self) -> int:
        return len(self.targets)


@dataclasses.dataclass(frozen=True)
class SolverOptions:
    """What solvers may be told, each reading only its own: see Scheduler for the meaning."""

    eta: float = 0.0
    order: int = 2
    variance: str = "fixed_small"
    easy_end: bool = True  # the last step is of first order even when it does not end at sigma 0
    noisy_end: bool = False  # ddpm adds noise in its last step too, unless that starts at t = 0


def _transfer(here: Point, to: Point, eta: float) -> tuple[float, float]:
    """Return (direction, noise) of x' = alpha' x0 + direction (x - alpha x0) + noise * unit noise.

    noise = eta sigma' sqrt(1 - (k'/k)^2), direction = sqrt(sigma'^2 - noise^2) / sigma: Song et al. 2021, equations
    12 and 16, in a form that holds for any alpha and sigma.
    """
    fresh = eta**2 * max(0.0, 1 - (to.k / here.k) ** 2)  # share of the new variance that is drawn anew
    return to.sigma / here.sigma * math.sqrt(1 - fresh), to.sigma * math.sqrt(fresh)


def ddim(path: Path, options: SolverOptions) -> list[Row]:
    """x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s noise, s = eta sigma' sqrt(1 - (k'/k)^2) (Song et al. 2021).

    A clip bounds x0 and leaves eps as it was predicted.
    """
    rows = []
    for here, to in zip(path.points, path.targets, strict=False):
        direction, noise = _transfer(here, to, options.eta)
        rows.append(Row(here, cx=direction, c0=to.alpha, cr=-here.alpha * direction, cn=noise))
    return rows


def euler(path: Path, options: SolverOptions) -> list[Row]:
    """Euler's step in k = sigma / alpha: DDIM without noise, but a clip changes eps with x0 (Karras et al. 2022)."""
    return _euler(path, eta=0.0)


def euler_ancestral(path: Path, options: SolverOptions) -> list[Row]:
    """Euler's step to less noise than wanted, then noise up to it (k-diffusion): DDIM with eta 1."""
    return _euler(path, eta=1.0)


def _euler(path: Path, eta: float) -> list[Row]:
    rows = []
    for here, to in zip(path.points, path.targets, strict=False):
        direction, noise = _transfer(here, to, eta)
        rows.append(Row(here, cx=direction, c0=to.alpha - here.alpha * direction, cn=noise))
    return rows


def ddpm(path: Path, options: SolverOptions) -> list[Row]:
    """The posterior of x' given x and x0 (Ho et al. 2020, equations 6 and 7) between any two levels.

    beta = sigma^2 - (alpha sigma'/alpha')^2; x' = (alpha/alpha') (sigma'/sigma)^2 x + alpha' beta/sigma^2 x0 + noise of
    variance beta (fixed_large) or beta (sigma'/sigma)^2 (fixed_small).
    """
    rows = []
    for i, (here, to) in enumerate(zip(path.points, path.targets, strict=False)):
        ratio, shrink = here.alpha / to.alpha, (to.sigma / here.sigma) ** 2
        beta = here.sigma**2 - (ratio * to.sigma) ** 2
        variance = {"fixed_small": beta * shrink, "fixed_large": beta}[options.variance]
        quiet = here.t == 0 if options.noisy_end else i == path.n - 1
        noise = 0.0 if quiet else math.sqrt(max(variance, 1e-20))
        rows.append(Row(here, cx=ratio * shrink, c0=to.alpha * beta / here.sigma**2, cn=noise))
    return rows


def heun(path: Path, options: SolverOptions) -> list[Row]:
    """The trapezoid rule in k = sigma / alpha, two calls a step (Karras et al. 2022, algorithm 1).

    With x_mid where Euler's step leads, x' = x_mid + alpha' (k' - k) / (2 k') (x0 - x0_mid). Steps from pure noise (k
    infinite) and to sigma 0 are Euler's.
    """
    rows = []
    for first, to in zip(_euler(path, eta=0.0), path.targets, strict=True):
        rows.append(first)
        if math.isfinite(first.at.k) and to.k > 0:
            half = to.alpha * (to.k - first.at.k) / (2 * to.k)
            rows.append(Row(to, cx=1.0, c0=-half, c=(half,)))
    return rows


def dpmpp_2m(path: Path, options: SolverOptions) -> list[Row]:
    """x' = sigma'/sigma x + alpha' (1 - e^-h) D, D = x0 + (x0 - x0_prev) h / (2 h_prev), h = lambda' - lambda.

    Lu et al. 2022 (DPM-Solver++), algorithm 2; order 1 takes D = x0, which is DDIM.
    """
    return _multistep(path, options, stochastic=False)


def sde_dpmpp_2m(path: Path, options: SolverOptions) -> list[Row]:
    """x' = sigma'/sigma e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) noise, D and h as in dpmpp_2m."""
    return _multistep(path, options, stochastic=True)


def _multistep(path: Path, options: SolverOptions, stochastic: bool) -> list[Row]:
    rows, before = [], 0.0
    for i, (here, to) in enumerate(zip(path.points, path.points[1:], strict=False)):
        h = max(0.0, to.lam - here.lam)  # rounding may put equal levels in the wrong order
        decay = h if stochastic else 0.0
        gain = to.alpha * -math.expm1(-h - decay)
        first_order = options.order == 1 or i == 0 or (i == path.n - 1 and (to.sigma == 0 or options.easy_end))
        # before is infinite after a step from pure noise: this one is then of first order too
        extra = 0.5 * h / before if before and not first_order else 0.0
        noise = to.sigma * math.sqrt(-math.expm1(-2 * h)) if stochastic else 0.0
        cx = to.sigma / here.sigma * math.exp(-decay)
        rows.append(Row(here, cx=cx, c0=gain * (1 + extra), cn=noise, c=(-gain * extra,)))
        before = h
    return rows


# Adams-Bashforth weights, newest first: Liu et al. 2022, equation 12, and its lower orders.
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(path: Path, options: SolverOptions) -> list[Row]:
    """DDIM's step with eps extrapolated from up to four calls (Liu et al. 2022, without Runge-Kutta steps: PLMS).

    x' = alpha'/alpha x + (sigma' - alpha' sigma/alpha) sum_j w_j eps_j. The second call repeats the first step with the
    mean of the eps at both of its ends, and is not used again. From pure noise the first step is DDIM's, unrepeated.
    """
    rows: list[Row] = []
    usable: list[bool] = []  # which calls of the history count, newest first
    for i, (here, to) in enumerate(zip(path.points, path.targets, strict=False)):
        if not here.alpha:
            rows.append(dataclasses.replace(*_euler(Path((here,), (to,)), eta=0.0), leaves_eps=True))
            usable.insert(0, True)
            continue
        weights = iter(ADAMS[min(sum(usable), 3)])
        ratio = to.alpha / here.alpha
        gain = to.sigma - ratio * here.sigma
        now = next(weights) * gain / here.sigma
        past = tuple(next(weights, 0.0) * gain if counts else 0.0 for counts in usable[:HISTORY])
        rows.append(Row(here, cx=ratio + now, c0=-now * here.alpha, c=past, leaves_eps=True))
        usable.insert(0, True)
        if i == 0 and path.n > 1:
            again, half = path.points[1], gain / 2
            now = half / again.sigma
            rows.append(Row(again, cx=1 + now, c0=-now * again.alpha, c=(-half,), leaves_eps=True))
            usable.insert(0, False)
    return rows


@dataclasses.dataclass(frozen=True)
class Solver:
    """rows: the coefficients. style: the family of diffusers classes it is in, see STYLES. options: those it reads."""

    rows: Callable[[Path, SolverOptions], list[Row]]
    style: str
    options: tuple[str, ...] = ()


SOLVERS = {
    "ddim": Solver(ddim, "ddim", ("eta", "clip")),
    "ddpm": Solver(ddpm, "ddpm", ("variance", "clip")),
    "euler": Solver(euler, "euler", ("clip",)),
    "euler_ancestral": Solver(euler_ancestral, "euler", ("clip",)),
    "heun": Solver(heun, "euler", ("clip",)),
    "dpmpp_2m": Solver(dpmpp_2m, "dpm", ("order", "lower_order_final", "euler_at_final", "clip")),
    "sde-dpmpp_2m": Solver(sde_dpmpp_2m, "dpm", ("order", "lower_order_final", "euler_at_final", "clip")),
    "pndm": Solver(pndm, "ddim"),
}
