"""Spacing axis: at which noise levels the network is called. Here sigma is sigma / alpha, as in k-diffusion."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from genkit.errors import InputError
from genkit.schedulers.noise import Array, Levels, Noise
from genkit.schedulers.styles import Style

RHO = 7.0  # exponent of Karras et al. 2022, equation 5
BOUNDED = (0.0525, 12.2, 0.173)  # offsets and exponent of `bounded`, fitted to Gaussian mixtures, guided and not


@dataclasses.dataclass(frozen=True)
class Grid:
    """The parameters by which a spacing places `steps` noise levels among `train_steps` training timesteps.

    flow: whether the noise schedule is rectified flow. offset: added to `leading`. low, high: added to the ends of
    `linspace`. sigma_range: the spacing in t whose first and last sigma the spacings in sigma go between; None: those
    of the noise schedule. original_steps: of LCM's training. given: explicit timesteps, or sigmas.
    """

    steps: int
    train_steps: int
    style: Style
    flow: bool
    offset: int
    low: float
    high: float
    sigma_range: str | None
    original_steps: int
    given: tuple[float, ...]


def leading(g: Grid) -> Array:
    """0, r, 2r, …, descending, r = N // n: never reaches pure noise (Lin et al. 2024, table 2, like the next two)."""
    count = g.steps + g.style.extra_point
    t = (np.arange(count) * (g.train_steps // count))[::-1][: g.steps].astype(float) + g.offset
    if count > g.train_steps or t[0] >= g.train_steps:
        raise InputError(
            f"num_inference_steps: {g.steps} with steps_offset {g.offset} do not fit {g.train_steps} timesteps, leading"
        )
    return t


def trailing(g: Grid) -> Array:
    """N, N - N/n, … rounded, less 1: starts at pure noise."""
    return np.round(np.arange(g.train_steps, 0, -g.train_steps / g.steps))[: g.steps] - 1


def linspace(g: Grid) -> Array:
    """Evenly spaced from N - 1 to 0, both included."""
    t = np.linspace(g.low, g.train_steps - 1 + g.high, g.steps + g.style.extra_point)[::-1][: g.steps]
    rounding = None if g.flow else g.style.timestep_rounding.get("linspace")
    return rounding(t) if rounding else t


def lcm(g: Grid) -> Array:
    """A subset of the `original_steps` timesteps that a consistency model was distilled on (Luo et al. 2023)."""
    origin = (np.arange(1, g.original_steps + 1) * (g.train_steps // g.original_steps) - 1)[::-1]
    if g.steps > g.original_steps or g.original_steps > g.train_steps:
        raise InputError(
            f"num_inference_steps: {g.steps} is more than the {g.original_steps} of original_inference_steps"
        )
    return origin[np.floor(np.linspace(0, len(origin), g.steps, endpoint=False)).astype(int)].astype(float)


def karras(u: Array, high: float, low: float) -> Array:
    """Evenly spaced in sigma^(1/7) (Karras et al. 2022, equation 5); u from 0 to 1, sigma from high to low."""
    return (high ** (1 / RHO) + u * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO


def exponential(u: Array, high: float, low: float) -> Array:
    """Evenly spaced in log(sigma), the uniform log SNR of Lu et al. 2022."""
    return np.exp(np.log(high) + u * (np.log(low) - np.log(high)))


def bounded(u: Array, high: float, low: float) -> Array:
    """Evenly spaced in ((sigma + 0.0525) / (sigma + 12.2))^0.173, finite for sigma 0 … infinity (genkit's own).

    Its last level is one step above sigma 0.
    """
    a, b, power = BOUNDED
    first, last = ((1.0 if np.isinf(sigma) else (sigma + a) / (sigma + b)) ** power for sigma in (high, 0.0))
    y = (first + u * (len(u) - 1) / len(u) * (last - first)) ** (1 / power)
    with np.errstate(divide="ignore"):
        return np.maximum(np.where(y < 1, (b * y - a) / (1 - y), np.inf), low)


def beta(u: Array, high: float, low: float) -> Array:
    """Quantiles of the beta(0.6, 0.6) distribution, scaled to sigma as in diffusers (Lee et al. 2024)."""
    return low + _beta_quantile(1 - u) * (high - low)


def _beta_quantile(p: Array) -> Array:
    """Return the quantiles of beta(0.6, 0.6) at p, by the trapezoidal rule in y = x^0.6 for x < 1/2, and symmetry."""
    y = np.linspace(0, 0.5**0.6, 20_001)
    density = (1 - y ** (1 / 0.6)) ** -0.4
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    x = np.interp(np.minimum(p, 1 - p), mass / mass[-1] / 2, y) ** (1 / 0.6)
    return np.where(p > 0.5, 1 - x, x)


# Published schedules of sigma / alpha, n + 1 values for n steps.
LEVELS: dict[str, Any] = json.loads(Path(__file__).with_name("tables.json").read_bytes())


def table(name: str, steps: int) -> Array:
    """Return the sigmas of a published schedule; for other numbers of steps log sigma is interpolated, as published."""
    sigmas = next((row for row in LEVELS[name] if len(row) == steps + 1), LEVELS[name][-1])
    places = np.linspace(0, len(sigmas) - 1, steps + 1)
    return np.exp(np.interp(places, np.arange(len(sigmas)), np.log(sigmas)))[:steps]


IN_T: dict[str, Callable[[Grid], Array]] = {
    "leading": leading, "trailing": trailing, "linspace": linspace, "lcm": lcm,
    "timesteps": lambda g: np.array(g.given),
}  # fmt: skip
IN_SIGMA: dict[str, Callable[[Array, float, float], Array]] = {
    "karras": karras, "exponential": exponential, "lu": exponential, "beta": beta, "bounded": bounded,
}  # fmt: skip
SPACINGS = (*IN_T, *IN_SIGMA, *(name for name in LEVELS if name != "source"), "sigmas")


def levels(name: str, g: Grid, noise: Noise) -> Levels:
    """Return the levels of the spacing `name`, most noise first, (steps,)."""
    if name in IN_T:
        found = noise.at(IN_T[name](g))
    elif name in IN_SIGMA:
        ends = noise.at(IN_T[g.sigma_range](g)).ve_sigma if g.sigma_range else noise.table.ve_sigma[::-1]
        ends = ends if name == "bounded" else ends[np.isfinite(ends)]
        u = np.linspace(0, 1, g.steps) if g.steps > 1 else np.zeros(1)
        found = noise.at_ve_sigma(IN_SIGMA[name](u, ends[0], ends[-1]))
    else:
        found = noise.at_ve_sigma(np.array(g.given) if name == "sigmas" else table(name, g.steps))
    rounding = g.style.timestep_rounding.get("flow" if g.flow else name if name in IN_SIGMA else "")
    return found._replace(t=rounding(found.t)) if rounding else found
