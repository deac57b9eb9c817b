"""Noise axis: timestep -> (alpha, sigma), with x = alpha * x0 + sigma * eps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from genkit.errors import InputError

Array = np.ndarray


class Levels(NamedTuple):
    """Noise levels: timesteps as passed to the network, alpha and sigma; float64 arrays of one shape."""

    t: Array
    alpha: Array
    sigma: Array

    @property
    def ve_sigma(self) -> Array:
        """sigma / alpha, the sigma of Karras et al. 2022 and k-diffusion; infinite at pure noise."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha


@dataclasses.dataclass(frozen=True)
class Noise:
    """A noise schedule. at: (fractional) training timesteps -> levels; at_ve_sigma: sigma / alpha -> levels.

    table: the levels at the training timesteps 0 … N-1, least noise first.
    """

    table: Levels
    at: Callable[[Array], Levels]
    at_ve_sigma: Callable[[Array], Levels]


def _cosine(n: int, start: float, end: float) -> Array:
    """Betas of Nichol and Dhariwal 2021, equation 17 (squaredcos_cap_v2); start and end are not used."""
    t = np.arange(n + 1) / n
    bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


def check_betas(betas: Array) -> None:
    """Raise InputError for betas that are not finite, not within (0, 1), or fewer than two."""
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise InputError("betas: must be at least two numbers between 0 and 1")


def zero_terminal_snr(alpha_bar: Array) -> Array:
    """Shift and scale sqrt(alpha_bar) so that the last is 0 and the first unchanged (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(alpha_bar)
    scaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    # By way of the betas, as in training code: from a float32 alpha_bar this changes the noisiest values.
    return np.cumprod(1 - (1 - np.concatenate([scaled[:1], scaled[1:] / scaled[:-1]])))


def from_alpha_bar(alpha_bar: Array, linear_sigma: bool = False) -> Noise:
    """Variance-preserving noise, alpha^2 = alpha_bar; between timesteps log(sigma / alpha) is linear in t.

    linear_sigma: `at` interpolates sigma / alpha itself, as diffusers does; `at_ve_sigma` still its logarithm.
    """
    steps = np.arange(len(alpha_bar), dtype=float)
    table = Levels(steps, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    ve_sigmas = table.ve_sigma
    finite = np.isfinite(ve_sigmas)
    log_sigmas = np.log(ve_sigmas[finite])

    def levels(t: Array, ve_sigma: Array) -> Levels:
        alpha = 1 / np.sqrt(1 + ve_sigma**2)
        return Levels(t, alpha, np.sqrt(1 - alpha**2) if np.isinf(ve_sigma).any() else ve_sigma * alpha)

    def at(t: Array) -> Levels:
        whole = np.rint(t).astype(int)
        if np.array_equal(whole, t):
            return Levels(t, table.alpha[whole], table.sigma[whole])
        logarithmic = np.exp(np.interp(t, steps[finite], log_sigmas))
        between = np.interp(t, steps, ve_sigmas) if linear_sigma else logarithmic
        return levels(t, np.where(whole == t, ve_sigmas[whole], between))

    def at_ve_sigma(ve_sigma: Array) -> Levels:
        return levels(np.interp(np.log(np.maximum(ve_sigma, 1e-10)), log_sigmas, steps[finite]), ve_sigma)

    return Noise(table, at, at_ve_sigma)


def flow(n: int, shift: float) -> Noise:
    """Rectified flow: alpha = 1 - s, sigma = s; the network's timestep is n s.

    Training timestep t = 0 … n-1 is s = u shift / (1 + (shift - 1) u) with u = (t + 1) / n (Esser et al. 2024, eq. 23).
    """

    def levels(s: Array) -> Levels:
        return Levels(n * s, 1 - s, s)

    def at(t: Array) -> Levels:
        u = (t + 1) / n
        return levels(shift * u / (1 + (shift - 1) * u))

    return Noise(at(np.arange(n, dtype=float)), at, lambda ve_sigma: levels(1 - 1 / (1 + ve_sigma)))


def edm(n: int, low: float, high: float) -> Noise:
    """Variance-exploding noise of Karras et al. 2022: alpha = 1; the network's timestep is log(sigma) / 4."""

    def at_sigma(sigma: Array) -> Levels:
        return Levels(np.log(np.maximum(sigma, 1e-10)) / 4, np.ones_like(sigma), sigma)

    def at(t: Array) -> Levels:  # evenly spaced in sigma^(1/7), equation 5
        return at_sigma((low ** (1 / 7) + t / (n - 1) * (high ** (1 / 7) - low ** (1 / 7))) ** 7)

    return Noise(at(np.arange(n, dtype=float)), at, at_sigma)


# (num_train_timesteps, beta_start, beta_end) -> betas
BETAS: dict[str, Callable[[int, float, float], Array]] = {
    "linear": lambda n, start, end: np.linspace(start, end, n),  # Ho et al. 2020
    "scaled_linear": lambda n, start, end: np.linspace(start**0.5, end**0.5, n) ** 2,  # Rombach et al. 2022
    "cosine": _cosine,
    "sigmoid": lambda n, start, end: start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, n))),  # Xu et al. 2022
}
NOISES = (*BETAS, "flow", "edm")
