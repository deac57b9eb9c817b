"""Noise axis: timestep -> (alpha, sigma), with x = alpha * x0 + sigma * eps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from genkit.errors import InputError

Array = np.ndarray


class Levels(NamedTuple):
    """Noise levels at some timesteps: what the network is told, alpha and sigma; float64 arrays of one shape."""

    t: Array
    alpha: Array
    sigma: Array

    @property
    def k(self) -> Array:
        """sigma / alpha, the level in the terms of Karras et al. 2022; infinite at pure noise."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha


@dataclasses.dataclass(frozen=True)
class Noise:
    """A noise schedule: `at` gives the levels at (fractional) timesteps, `at_k` those with given sigma / alpha.

    table: levels at the training timesteps 0 … N-1, least noise first.
    """

    table: Levels
    at: Callable[[Array], Levels]
    at_k: Callable[[Array], Levels]


def linear(n: int, start: float, end: float) -> Array:
    """Betas of Ho et al. 2020: linear in t."""
    return np.linspace(start, end, n)


def scaled_linear(n: int, start: float, end: float) -> Array:
    """Betas of Rombach et al. 2022 (Stable Diffusion): linear in t after a square root."""
    return np.linspace(start**0.5, end**0.5, n) ** 2


def cosine(n: int, start: float, end: float) -> Array:
    """Betas of Nichol and Dhariwal 2021, equation 17 (squaredcos_cap_v2); start and end have no part in it."""
    t = np.arange(n + 1) / n
    bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


def sigmoid(n: int, start: float, end: float) -> Array:
    """Betas of GeoDiff (Xu et al. 2022): from start to end along a sigmoid of -6 … 6."""
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, n)))


def check_betas(betas: Array) -> None:
    """Refuse betas that no diffusion has: not within (0, 1), not finite, or fewer than two."""
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise InputError("betas: must be at least two numbers between 0 and 1")


def zero_terminal_snr(alpha_bar: Array) -> Array:
    """Shift and scale sqrt(alpha_bar) so that the last is 0 and the first stays (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(alpha_bar)
    scaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    # Once through the betas and back, as networks were trained: in single precision that moves the noisy end.
    return np.cumprod(1 - (1 - np.concatenate([scaled[:1], scaled[1:] / scaled[:-1]])))


def from_alpha_bar(alpha_bar: Array, straight: bool = False) -> Noise:
    """Variance-preserving noise, alpha^2 = alpha_bar; between timesteps log(sigma / alpha) is linear in t.

    straight: `at` takes sigma / alpha itself as linear in t, as diffusers does (but not for the way back).
    """
    steps = np.arange(len(alpha_bar), dtype=float)
    table = Levels(steps, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    finite = np.isfinite(table.k)
    log_k = np.log(table.k[finite])

    def level(t: Array, k: Array) -> Levels:
        alpha = 1 / np.sqrt(1 + k**2)
        return Levels(t, alpha, np.sqrt(1 - alpha**2) if np.isinf(k).any() else k * alpha)

    def at(t: Array) -> Levels:
        whole = np.rint(t).astype(int)
        if np.array_equal(whole, t):
            return Levels(t, table.alpha[whole], table.sigma[whole])
        between = np.interp(t, steps, table.k) if straight else np.exp(np.interp(t, steps[finite], log_k))
        return level(t, np.where(whole == t, table.k[whole], between))

    def at_k(k: Array) -> Levels:
        return level(np.interp(np.log(np.maximum(k, 1e-10)), log_k, steps[finite]), k)

    return Noise(table, at, at_k)


def flow(n: int, shift: float) -> Noise:
    """Rectified flow: alpha = 1 - s, sigma = s, and the network is told n s.

    Training step t = 0 … n-1 is s = u shift / (1 + (shift - 1) u) with u = (t + 1) / n (Esser et al. 2024, eq. 23).
    """

    def level(s: Array) -> Levels:
        return Levels(n * s, 1 - s, s)

    def at(t: Array) -> Levels:
        u = (t + 1) / n
        return level(shift * u / (1 + (shift - 1) * u))

    return Noise(at(np.arange(n, dtype=float)), at, lambda k: level(1 - 1 / (1 + k)))


def edm(n: int, low: float, high: float) -> Noise:
    """Variance-exploding noise of Karras et al. 2022: alpha = 1; the network is told log(sigma) / 4."""

    def at_k(k: Array) -> Levels:
        return Levels(np.log(np.maximum(k, 1e-10)) / 4, np.ones_like(k), k)

    def at(t: Array) -> Levels:  # even in sigma^(1/7), equation 5
        return at_k((low ** (1 / 7) + t / (n - 1) * (high ** (1 / 7) - low ** (1 / 7))) ** 7)

    return Noise(at(np.arange(n, dtype=float)), at, at_k)


BETAS: dict[str, Callable[[int, float, float], Array]] = {
    "linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "sigmoid": sigmoid,
}  # fmt: skip
NOISES = (*BETAS, "flow", "edm")
