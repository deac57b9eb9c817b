"""The options of a scheduler: a name on each axis and the values that go with it, checked when they are made."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from genkit.errors import InputError, nearest, shown
from genkit.schedulers.noise import NOISES, check_betas
from genkit.schedulers.prediction import PREDICTIONS
from genkit.schedulers.solvers import SOLVERS
from genkit.schedulers.spacing import IN_T, SPACINGS
from genkit.schedulers.styles import STYLES, Style


def _one_of(default: Any, *choices: Any) -> Any:
    return dataclasses.field(default=default, metadata={"choices": choices})


def _within(default: Any, low: float, high: float) -> Any:
    """A number of the default's type, or a whole number, from low to high."""
    return dataclasses.field(default=default, metadata={"range": (type(default), low, high)})


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a Scheduler. Raises InputError for a name or value that is not allowed.

    noise: linear, scaled_linear, cosine or sigmoid betas from beta_start to beta_end (or trained_betas), flow or edm.
    zero_snr rescales betas to zero terminal SNR (Lin et al. 2024). shift is flow's; dynamic_shift computes it from the
    image size: (base, max, tokens at base, tokens at max, "exponential" or "linear"). sigma_min, sigma_max: of edm.
    spacing: see SPACINGS; leading reads steps_offset, lcm original_inference_steps, timesteps and sigmas (sigma /
    alpha) the levels of the same name. final: where the last step leads, "zero" noise or "sigma_min", the least trained
    level. clip: bound on |x0|. threshold: (quantile, max) of dynamic thresholding. eta: 0 … 1, stochasticity (ddim,
    tcd). variance: of ddpm. order: a number, or one for each step; lower_order_final, euler_at_final: see
    `limit_orders`. solver_type: midpoint, heun (DPM-Solver), bh1, bh2 (unipc). corrector, predict_eps, corrector_order,
    tau: see `unipc` and `sa`. style: "exact", or the diffusers family whose conventions are followed, as `from_config`
    sets it; ends: see `Style.sigma_range_from_ends`. source: the diffusers config that this was read from.
    """

    noise: str = _one_of("scaled_linear", *NOISES)
    spacing: str = _one_of("trailing", *SPACINGS)
    prediction: str = _one_of("epsilon", *PREDICTIONS)
    solver: str = _one_of("ddim", *SOLVERS)
    num_train_timesteps: int = _within(1000, 2, 100_000)
    beta_start: float = _within(0.00085, 1e-9, 0.999)
    beta_end: float = _within(0.012, 1e-9, 0.999)
    trained_betas: tuple[float, ...] | None = None
    zero_snr: bool = _one_of(False, False, True)
    shift: float = _within(1.0, 1e-3, 1e3)
    dynamic_shift: tuple[float, float, int, int, str] | None = None
    sigma_min: float = _within(0.002, 1e-6, 1e3)
    sigma_max: float = _within(80.0, 1e-6, 1e5)
    steps_offset: int = _within(0, 0, 1000)
    original_inference_steps: int = _within(50, 1, 1000)
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    final: str = _one_of("zero", "zero", "sigma_min")
    clip: float | None = None
    threshold: tuple[float, float] | None = None
    eta: float = _within(0.0, 0, 1)
    variance: str = _one_of("fixed_small", "fixed_small", "fixed_large")
    order: int | tuple[int, ...] | None = None
    solver_type: str | None = _one_of(None, None, "midpoint", "heun", "bh1", "bh2")
    corrector: bool = _one_of(True, False, True)
    corrector_order: int = _within(2, 1, 4)
    tau: float = _within(1.0, 0, 10)
    predict_eps: bool = _one_of(False, False, True)
    lower_order_final: bool = _one_of(True, False, True)
    euler_at_final: bool = _one_of(False, False, True)
    ends: str = _one_of("linspace", *IN_T)
    style: str = _one_of("exact", *STYLES)
    source: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, known = getattr(self, field.name), field.metadata
            if "choices" in known and not any(value == v and type(value) is type(v) for v in known["choices"]):
                names = [str(v) for v in known["choices"] if v is not None]
                close = f"{', '.join(names)}{nearest(value, names)}"
                raise InputError(f"{field.name}: {shown(value)} is not one of {close}")
            if "range" in known:
                check_number(field.name, value, *known["range"])
        if self.clip is not None:
            check_number("clip", self.clip, float, 1e-6, 1e6)
        for name, least in (("timesteps", 0.0), ("sigmas", 1e-6)):
            self._check_list(name, least)
        self._check_order()
        self._check_betas()

    def _check_list(self, name: str, least: float) -> None:
        given = getattr(self, name)
        if (given is None) != (self.spacing != name):
            raise InputError(f"{name}: go with spacing {name!r}; spacing is {self.spacing!r}")
        if given is None:
            return
        if not isinstance(given, list | tuple):
            raise InputError(f"{name}: {shown(given)} is not a list of numbers")
        for value in given:
            check_number(name, value, float, least, 1e5 if name == "sigmas" else self.num_train_timesteps - 1)
        if not given or any(b >= a for a, b in itertools.pairwise(given)):
            raise InputError(f"{name}: {shown(list(given))} is not a falling list")

    def _check_order(self) -> None:
        most = SOLVERS[self.solver].orders[1]
        if self.order is not None and "order" in SOLVERS[self.solver].options:
            for value in self.order if isinstance(self.order, tuple) and self.order else (self.order,):
                check_number("order", value, int, 1, most)
        if self.threshold is not None:
            if not isinstance(self.threshold, list | tuple) or len(self.threshold) != 2:
                raise InputError(f"threshold: {shown(self.threshold)} is not a quantile and a bound, as in [0.995, 1]")
            check_number("threshold", self.threshold[0], float, 1e-6, 1)
            check_number("threshold", self.threshold[1], float, 1, 1e6)

    def _check_betas(self) -> None:
        if self.trained_betas is not None:
            if not isinstance(self.trained_betas, tuple) or not all(isinstance(b, float) for b in self.trained_betas):
                raise InputError(f"trained_betas: {shown(self.trained_betas)} is not a tuple of numbers")
            if (given := len(self.trained_betas)) != self.num_train_timesteps:
                raise InputError(f"trained_betas: {given} for num_train_timesteps {self.num_train_timesteps}")
            check_betas(np.array(self.trained_betas))
        elif self.beta_end < self.beta_start:
            raise InputError(f"beta_end: {self.beta_end} is less than beta_start {self.beta_start}")
        if self.sigma_max <= self.sigma_min:
            raise InputError(f"sigma_max: {self.sigma_max} is not above sigma_min {self.sigma_min}")

    @property
    def conventions(self) -> Style:
        return STYLES[self.style]

    @property
    def order_or_default(self) -> int | tuple[int, ...]:
        """The order asked for, else the solver's own."""
        return SOLVERS[self.solver].orders[0] if self.order is None else self.order


def check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    """Raise InputError unless value is of the kind int or float (which takes whole numbers) and within low … high."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not low <= value <= high:
        noun = "whole number" if kind is int else "number"
        raise InputError(f"{name}: {shown(value)} is not a {noun} from {low:g} to {high:g}")
