"""Solver axis: a solver is a function from the levels it passes to rows of coefficients, one row a network call.

    x' = cx x + c0 x0 + cr x0_raw + cn noise + c[0] h1 + c[1] h2 + ...

x0 is the clipped and x0_raw the unclipped prediction of this call; h1, h2, … are what earlier calls left behind, newest
first: their x0, or their eps = (x - alpha x0) / sigma for the solvers that extrapolate in eps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from genkit.schedulers.noise import Levels

HISTORY = 4  # earlier predictions that a row can use


@dataclasses.dataclass(frozen=True)
class Row:
    """One network call at point `at` of the path, and the coefficients of the step after it."""

    at: int
    cx: float
    c0: float
    cr: float = 0.0
    cn: float = 0.0
    c: tuple[float, ...] = ()
    eps: bool = False  # leave eps behind, not x0


@dataclasses.dataclass(frozen=True)
class Path:
    """The levels that a trajectory passes: point i is where call i is made, point i + 1 where its step leads.

    alpha, sigma: n + 1 values, the last is where it ends. to_alpha, to_sigma: n values, where step i aims: the next
    point, but for diffusers' DDIM, whose stride ignores rounding. t: n values.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    to_alpha: np.ndarray
    to_sigma: np.ndarray

    @property
    def n(self) -> int:
        return len(self.t)

    @property
    def k(self) -> np.ndarray:
        return Levels(self.t, self.alpha, self.sigma).k

    @property
    def lam(self) -> np.ndarray:
        """log(alpha / sigma), half the log signal-to-noise ratio: -inf at pure noise, +inf at the picture."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)


@dataclasses.dataclass(frozen=True)
class SolverOptions:
    """eta: share of ancestral noise (ddim). order: 1 or 2 (dpmpp). variance: fixed_small or fixed_large (ddpm).

    easy_end: the last step is of first order, even when it does not end at sigma 0 (dpmpp).
    """

    eta: float = 0.0
    order: int = 2
    variance: str = "fixed_small"
    easy_end: bool = True


def ddim(path: Path, options: SolverOptions) -> list[Row]:
    """x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s noise, s = eta sigma'/sigma sqrt(1 - alpha^2/alpha'^2).

    Song et al. 2021, equations 12 and 16. With eta = 0 the Euler step of Karras et al. in sigma / alpha, with eta = 1
    k-diffusion's Euler ancestral.
    """
    rows = []
    for i in range(path.n):
        a, s, a2, s2 = path.alpha[i], path.sigma[i], path.to_alpha[i], path.to_sigma[i]
        # sigma'^2 (1 - k'^2 / k^2), which for alpha^2 + sigma^2 = 1 is Song's variance
        std = options.eta * s2 * np.sqrt(max(0.0, 1 - (s2 * a / (a2 * s)) ** 2))
        direction = np.sqrt(s2**2 - std**2) / s
        rows.append(Row(i, cx=direction, c0=a2, cr=-a * direction, cn=std))
    return rows


def euler(path: Path, options: SolverOptions) -> list[Row]:
    """DDIM without noise."""
    return ddim(path, dataclasses.replace(options, eta=0.0))


def euler_ancestral(path: Path, options: SolverOptions) -> list[Row]:
    """DDIM with all of its noise."""
    return ddim(path, dataclasses.replace(options, eta=1.0))


def ddpm(path: Path, options: SolverOptions) -> list[Row]:
    """The posterior mean and variance of Ho et al. 2020, equations 6 and 7, between any two levels."""
    rows = []
    for i in range(path.n):
        bar, bar2 = path.alpha[i] ** 2, path.to_alpha[i] ** 2
        alpha = bar / bar2
        beta = 1 - alpha
        small = max((1 - bar2) / (1 - bar) * beta, 1e-20)
        variance = {"fixed_small": small, "fixed_large": beta}[options.variance]
        noise = np.sqrt(variance) if path.t[i] > 0 else 0.0
        rows.append(Row(i, cx=np.sqrt(alpha) * (1 - bar2) / (1 - bar), c0=path.to_alpha[i] * beta / (1 - bar), cn=noise))
    return rows


def heun(path: Path, options: SolverOptions) -> list[Row]:
    """The trapezoid rule in k = sigma / alpha (Karras et al. 2022, algorithm 1), two calls a step.

    x_mid = k'/k x + (1 - k'/k) x0, then x' = x_mid + (k' - k) / (2 k') (x0 - x0_mid), all over alpha. Steps from pure
    noise (k infinite) and to sigma 0 are Euler's.
    """
    rows = []
    k = path.k
    for i, first in enumerate(euler(path, options)):
        rows.append(dataclasses.replace(first, at=i))
        if np.isfinite(k[i]) and k[i + 1] > 0:
            g = path.alpha[i + 1] * (k[i + 1] - k[i]) / (2 * k[i + 1])
            rows.append(Row(i + 1, cx=1.0, c0=-g, c=(g,)))
    return rows


def dpmpp_2m(path: Path, options: SolverOptions) -> list[Row]:
    """x' = sigma'/sigma x - alpha' (e^-h - 1) D, D = x0 + (x0 - x0_prev) h / (2 h_prev) (Lu et al. 2022b, algorithm 2)."""
    return _multistep(path, options, stochastic=False)


def sde_dpmpp_2m(path: Path, options: SolverOptions) -> list[Row]:
    """x' = sigma'/sigma e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) noise, with D as in dpmpp_2m."""
    return _multistep(path, options, stochastic=True)


def _multistep(path: Path, options: SolverOptions, stochastic: bool) -> list[Row]:
    lam, rows = path.lam, []
    for i in range(path.n):
        h = lam[i + 1] - lam[i]
        a2, s2 = path.alpha[i + 1], path.sigma[i + 1]
        gain = a2 * -np.expm1(-2 * h if stochastic else -h)
        last = i == path.n - 1 and (s2 == 0 or options.easy_end)
        # h / h_prev is 0 after a step from pure noise, whose h is infinite: first order there
        ratio = 0.0 if i == 0 or last or options.order == 1 else 0.5 * h / (lam[i] - lam[i - 1])
        cx = s2 / path.sigma[i] * (np.exp(-h) if stochastic else 1.0)
        noise = s2 * np.sqrt(-np.expm1(-2 * h)) if stochastic else 0.0
        rows.append(Row(i, cx=cx, c0=gain * (1 + ratio), cn=noise, c=(-gain * ratio,)))
    return rows


# Adams-Bashforth weights for eps, newest first (Liu et al. 2022, equation 12 and its lower orders)
_ADAMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def pndm(path: Path, options: SolverOptions) -> list[Row]:
    """Linear multistep in eps with DDIM's transfer x' = alpha'/alpha x + (sigma' - alpha' sigma/alpha) eps (PLMS).

    The second call repeats the first step with the mean of both ends' eps: its eps is not used again. Stable
    Diffusion 1's default.
    """
    rows: list[Row] = []
    for i in range(path.n):
        a, s = path.alpha[i], path.sigma[i]
        ratio = path.to_alpha[i] / a
        gain = path.to_sigma[i] - ratio * s
        # The repeated call sits in the history between the newest eps and the first: its weight there is 0.
        weights = list(_ADAMS[min(i + 1, 4)])
        if path.n > 1 and 1 <= i <= 3:
            weights.insert(i, 0.0)
        here, past = weights[0] * gain, tuple(w * gain for w in weights[1:])
        rows.append(Row(i, cx=ratio + here / s, c0=-here * a / s, c=past, eps=True))
        if i == 0 and path.n > 1:
            a2, s2 = path.alpha[1], path.sigma[1]
            half = gain / 2
            rows.append(Row(1, cx=1 + half / s2, c0=-half * a2 / s2, c=(-half,), eps=True))
    return rows


@dataclasses.dataclass(frozen=True)
class Solver:
    """rows: the coefficients; style: the diffusers class whose way of placing steps goes with it; deterministic order."""

    rows: Callable[[Path, SolverOptions], list[Row]]
    style: str
    order: int


SOLVERS = {
    "ddim": Solver(ddim, "ddim", 1),
    "ddpm": Solver(ddpm, "ddpm", 1),
    "euler": Solver(euler, "euler", 1),
    "euler_ancestral": Solver(euler_ancestral, "euler", 1),
    "heun": Solver(heun, "euler", 2),
    "dpmpp_2m": Solver(dpmpp_2m, "dpm", 2),
    "sde-dpmpp_2m": Solver(sde_dpmpp_2m, "dpm", 2),
    "pndm": Solver(pndm, "ddim", 2),
}
