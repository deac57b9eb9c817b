"""Spacing axis: at which noise levels the network is called."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from genkit.errors import InputError
from genkit.schedulers.noise import Array, Levels, Noise

RHO = 7.0  # Karras et al. 2022, equation 5
BOUNDED = (0.0525, 12.2, 0.173)  # fitted to Gaussian mixtures, guided and not, for `pc`


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a spacing lays n points over `train` training steps.

    spare: lay n + 1 and drop the last, as DPM-Solver does. rounding: what is done to linspace's timesteps, told: to
    what the network is told. offset: added to `leading`. low, high: ends of `linspace`. ends: the spacing whose first
    and last level the spacings in sigma go between, None for those of the noise schedule. original: steps of LCM's
    training. given: explicit timesteps, or sigmas.
    """

    n: int
    train: int
    spare: bool = False
    rounding: Callable[[Array], Array] | None = None
    told: Callable[[Array], Array] | None = None
    offset: int = 0
    low: float = 0.0
    high: float = 0.0
    ends: str | None = None
    original: int = 50
    given: tuple[float, ...] = ()


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
    t = np.linspace(g.low, g.train - 1 + g.high, g.n + g.spare)[::-1][: g.n]
    return g.rounding(t) if g.rounding else t


def lcm(g: Grid) -> Array:
    """Every so many of the `original` timesteps that a consistency model was distilled on (Luo et al. 2023)."""
    origin = (np.arange(1, g.original + 1) * (g.train // g.original) - 1)[::-1]
    if g.n > g.original or g.original > g.train:
        raise InputError(f"num_inference_steps: {g.n} is more than the {g.original} of original_inference_steps")
    return origin[np.floor(np.linspace(0, len(origin), g.n, endpoint=False)).astype(int)].astype(float)


def timesteps(g: Grid) -> Array:
    """The timesteps that were given."""
    return np.array(g.given)


def karras(u: Array, high: float, low: float) -> Array:
    """Even in (sigma / alpha)^(1/7) (Karras et al. 2022, equation 5)."""
    return (high ** (1 / RHO) + u * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO


def exponential(u: Array, high: float, low: float) -> Array:
    """Even in log(sigma / alpha), the uniform log-SNR of Lu et al. 2022."""
    return np.exp(np.log(high) + u * (np.log(low) - np.log(high)))


def bounded(u: Array, high: float, low: float) -> Array:
    """Even in ((k + 0.0525) / (k + 12.2))^0.173, finite from pure noise to none; ends one step above none (ours)."""
    a, b, power = BOUNDED
    first, last = ((1.0 if np.isinf(k) else (k + a) / (k + b)) ** power for k in (high, 0.0))
    y = (first + u * (len(u) - 1) / len(u) * (last - first)) ** (1 / power)
    with np.errstate(divide="ignore"):
        return np.maximum(np.where(y < 1, (b * y - a) / (1 - y), np.inf), low)


def beta(u: Array, high: float, low: float) -> Array:
    """Quantiles of the distribution beta(0.6, 0.6), of sigma as diffusers has it (Lee et al. 2024)."""
    return low + _beta_quantile(1 - u) * (high - low)


def _beta_quantile(p: Array) -> Array:
    """Return the quantiles of beta(0.6, 0.6) at p: it is symmetric, and in y = x^0.6 smooth up to x = 1/2."""
    y = np.linspace(0, 0.5**0.6, 20_001)
    density = (1 - y ** (1 / 0.6)) ** -0.4
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    x = np.interp(np.minimum(p, 1 - p), mass / mass[-1] / 2, y) ** (1 / 0.6)
    return np.where(p > 0.5, 1 - x, x)


# Published levels sigma / alpha, n + 1 of them for n steps.
LEVELS: dict[str, Any] = json.loads(Path(__file__).with_name("tables.json").read_bytes())


def table(name: str, n: int) -> Array:
    """Return n levels of a published table; between its own lengths log sigma is interpolated, as its authors do."""
    row = next((row for row in LEVELS[name] if len(row) == n + 1), LEVELS[name][-1])
    places = np.linspace(0, len(row) - 1, n + 1)
    return np.exp(np.interp(places, np.arange(len(row)), np.log(row)))[:n]


IN_T: dict[str, Callable[[Grid], Array]] = {
    "leading": leading, "trailing": trailing, "linspace": linspace, "lcm": lcm, "timesteps": timesteps,
}  # fmt: skip
IN_K: dict[str, Callable[[Array, float, float], Array]] = {
    "karras": karras, "exponential": exponential, "lu": exponential, "beta": beta, "bounded": bounded,
}  # fmt: skip
SPACINGS = (*IN_T, *IN_K, *(name for name in LEVELS if name != "source"), "sigmas")


def levels(name: str, g: Grid, noise: Noise) -> Levels:
    """Return the n levels of the spacing `name`, most noise first."""
    if name in IN_T:
        found = noise.at(IN_T[name](g))
    elif name in IN_K:
        ends = noise.at(IN_T[g.ends](g)).k if g.ends else noise.table.k[::-1]
        ends = ends if name == "bounded" else ends[np.isfinite(ends)]
        found = noise.at_k(IN_K[name](np.linspace(0, 1, g.n) if g.n > 1 else np.zeros(1), ends[0], ends[-1]))
    else:
        found = noise.at_k(np.array(g.given) if name == "sigmas" else table(name, g.n))
    return found._replace(t=g.told(found.t)) if g.told else found
