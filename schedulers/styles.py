"""Conventions by which families of diffusers classes place noise levels, so that their configs give the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from genkit.schedulers.noise import Array


@dataclasses.dataclass(frozen=True)
class Style:
    """The conventions of one family; STYLES["exact"] is genkit's own.

    float32_schedule: betas in float32, and sigma / alpha linear between timesteps. extra_point: leading and linspace
    place one more point and drop the last. timestep_rounding: {spacing, or "flow": function}; linspace rounds before
    the noise levels are computed, others only the timesteps passed to the network. fixed_stride: step to t - N // n,
    not to the next level, which differs from it by rounding. min_alpha_bar: alpha^2 of the last timestep under zero
    terminal SNR. sigma_range_from_ends: spacings in sigma go between the first and last level of the spacing `ends`.
    final_alpha_one: a plan with `final` sigma_min ends at alpha 1. unit_start: start from noise of variance 1, else of
    the first level's sigma (but for leading). noisy_last_step: ddpm's last step adds noise, unless it starts at t = 0.
    idle_last_call: the last call may be at the level where the plan ends, and change nothing. halved_second_moment: in
    dpmpp_3m. flow_ends: for flow, added to the ends of linspace; None: the low end is the least sigma, shifted a second
    time. flow_min_alpha: for flow, the least alpha of the first level.
    """

    float32_schedule: bool = True
    extra_point: bool = False
    timestep_rounding: Mapping[str, Callable[[Array], Array]] = dataclasses.field(default_factory=dict)
    fixed_stride: bool = False
    min_alpha_bar: float = 0.0
    sigma_range_from_ends: bool = False
    final_alpha_one: bool = False
    unit_start: bool = True
    noisy_last_step: bool = False
    idle_last_call: bool = True
    halved_second_moment: bool = False
    flow_ends: tuple[int, int] | None = (0, 0)
    flow_min_alpha: float = 0.0


def _truncate(t: Array) -> Array:
    """Floor, as a cast to integers does after float32 has left whole timesteps just below themselves."""
    return np.floor(np.maximum(t - 1e-3, 0))


def _floor(t: Array) -> Array:
    return np.floor(t + 1e-9)


_DPM: dict[str, Callable[[Array], Array]] = {
    "linspace": np.round, "karras": np.round, "lu": np.round, "exponential": _truncate, "beta": _truncate,
}  # fmt: skip
STYLES = {
    "exact": Style(float32_schedule=False, idle_last_call=False),
    "ddim": Style(timestep_rounding={"linspace": np.round}, fixed_stride=True),
    "ddpm": Style(timestep_rounding={"linspace": np.round}, noisy_last_step=True),
    "lcm": Style(),
    "euler": Style(min_alpha_bar=2.0**-24, sigma_range_from_ends=True, final_alpha_one=True, unit_start=False),
    "dpm2": Style(
        min_alpha_bar=2.0**-24, sigma_range_from_ends=True, unit_start=False, timestep_rounding={"karras": np.round}
    ),
    "dpm": Style(extra_point=True, timestep_rounding=_DPM, min_alpha_bar=2.0**-24, halved_second_moment=True),
    "singlestep": Style(extra_point=True, timestep_rounding=_DPM, min_alpha_bar=2.0**-24),
    "flow": Style(flow_ends=None),
    "flow-dpm": Style(
        extra_point=True, timestep_rounding={"flow": _floor}, flow_ends=(-1, -1), halved_second_moment=True
    ),
    "flow-unipc": Style(extra_point=True, timestep_rounding={"flow": _floor}, flow_min_alpha=1e-6),
    "edm": Style(halved_second_moment=True),
}
