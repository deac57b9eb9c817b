"""The four axes in one place: a noise schedule, a spacing, a prediction and a solver make plans."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from genkit.errors import InputError, nearest, shown
from genkit.schedulers import noise as noises
from genkit.schedulers.diffusers_config import read_config, swap_solver, write_config
from genkit.schedulers.noise import BETAS, NOISES, Array, Levels, Noise
from genkit.schedulers.plan import Plan, make_plan
from genkit.schedulers.prediction import PREDICTIONS
from genkit.schedulers.solvers import SOLVERS, Path, Point, SolverOptions
from genkit.schedulers.spacing import SPACINGS, TIMESTEPS, Grid

EASY = 15  # plans of fewer steps end in a first-order step (lower_order_final), as in diffusers' DPM-Solver


@dataclasses.dataclass(frozen=True)
class Style:
    """How diffusers' classes depart from the plain way of placing steps; the default is the plain way.

    single: betas in single precision. spare, rounding: see Grid. stride: step to t - N // n rather than to the next
    point, which differs from it by rounding. floor: the least alpha^2 under zero terminal SNR. inner: karras goes
    between the ends of another spacing. unscaled: `final` sigma_min leads to x0 + k eps. unit: start from unit noise,
    else from noise of the first level's sigma (but for leading). low: linspace ends at the least sigma shifted twice
    (flow). noisy_end: ddpm's last step adds noise, unless it starts at t = 0. idle_end: the last call may be made at
    the level where the plan ends, for nothing.
    """

    single: bool = True
    spare: bool = False
    rounding: Callable[[Array], Array] | None = None
    stride: bool = False
    floor: float = 0.0
    inner: bool = False
    unscaled: bool = False
    unit: bool = True
    low: bool = False
    noisy_end: bool = False
    idle_end: bool = True


STYLES = {
    "exact": Style(single=False, idle_end=False),
    "ddim": Style(rounding=np.round, stride=True),
    "ddpm": Style(rounding=np.round, noisy_end=True),
    "euler": Style(floor=2.0**-24, inner=True, unscaled=True, unit=False),
    "dpm": Style(spare=True, rounding=np.round, floor=2.0**-24),
    "flow": Style(low=True),
}


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A point on each axis, with the options that go with them. Makes plans; has no state.

    noise: linear, scaled_linear, cosine or flow; zero_snr rescales it to end in pure noise (Lin et al. 2024); shift is
    flow's; trained_betas replace the formula. spacing: leading (with steps_offset), trailing, linspace or karras.
    final: where the last step leads, "zero" noise or "sigma_min", the least trained. clip: bound on |x0|. eta: share of
    ancestral noise (ddim). variance: fixed_small or fixed_large (ddpm). order, lower_order_final, euler_at_final: of
    DPM-Solver++, its last step being of first order when it ends at sigma 0, below 15 steps, or always. style: "exact",
    or the family of diffusers classes whose way of placing steps is followed, as `from_config` does; ends: the spacing
    whose first and last point karras goes between in the style of diffusers' Euler. source: the config that this was
    read from. Raises InputError for a name or value that is not one of these.
    """

    noise: str = "scaled_linear"
    spacing: str = "trailing"
    prediction: str = "epsilon"
    solver: str = "ddim"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    trained_betas: tuple[float, ...] | None = None
    zero_snr: bool = False
    shift: float = 1.0
    steps_offset: int = 0
    final: str = "zero"
    clip: float | None = None
    eta: float = 0.0
    variance: str = "fixed_small"
    order: int = 2
    lower_order_final: bool = True
    euler_at_final: bool = False
    ends: str = "linspace"
    style: str = "exact"
    source: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for field, known in _NAMES.items():
            value = getattr(self, field)
            if not any(value == v and type(value) is type(v) for v in known):
                names = [str(v) for v in known]
                raise InputError(f"{field}: {shown(value)} is not one of {', '.join(names)}{nearest(value, names)}")
        for field, (kind, low, high) in _RANGES.items():
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (kind is float and isinstance(value, float))) or not low <= value <= high:
                noun = "whole number" if kind is int else "number"
                raise InputError(f"{field}: {shown(value)} is not a {noun} from {low:g} to {high:g}")
        if self.clip is not None and not (type(self.clip) in (int, float) and 0 < self.clip < 1e6):
            raise InputError(f"clip: {shown(self.clip)} is not a positive number")
        self._check_betas()

    def _check_betas(self) -> None:
        if self.trained_betas is not None:
            if not isinstance(self.trained_betas, tuple) or not all(isinstance(b, float) for b in self.trained_betas):
                raise InputError(f"trained_betas: {shown(self.trained_betas)} is not a tuple of numbers")
            if len(self.trained_betas) != self.num_train_timesteps:
                raise InputError(
                    f"trained_betas: {len(self.trained_betas)} for num_train_timesteps {self.num_train_timesteps}"
                )
            noises.check_betas(np.array(self.trained_betas))
        elif self.beta_end < self.beta_start:
            raise InputError(f"beta_end: {self.beta_end} is less than beta_start {self.beta_start}")

    @classmethod
    def from_config(cls, config: str | FilePath | Mapping[str, Any]) -> Scheduler:
        """Read a diffusers scheduler config: a dictionary, a scheduler_config.json, or the folder that holds it.

        Raises InputError for an unsupported class, an unknown key, or a value that this does not express.
        """
        options, stated = read_config(config)
        return cls(**options, source=stated)

    def to_config(self) -> dict[str, Any]:
        """Return a diffusers scheduler config, which `from_config` reads back as this scheduler in diffusers' style.

        Raises InputError for an option that diffusers has no key for.
        """
        return write_config(self)

    def with_options(self, **changes: Any) -> Scheduler:
        """Return this scheduler with other options: what the network was trained for stays.

        A new solver drops the options that only the old one reads. When this scheduler came from a diffusers config,
        the rest is what that solver's class makes of the same config (`Other.from_config(old.config)` in diffusers).
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in changes:
            if name not in fields or name == "source":
                raise InputError(f"{shown(name)}: no option of a scheduler{nearest(name, fields)}")
        solver = changes.get("solver", self.solver)
        if solver == self.solver or not isinstance(solver, str) or solver not in SOLVERS:
            return dataclasses.replace(self, **changes)
        read, plain = SOLVERS[solver].options, {f.name: f.default for f in dataclasses.fields(self)}
        dropped = {o for s in SOLVERS.values() for o in s.options} - {*read}
        if self.source is None:
            return Scheduler(**{**fields, **{o: plain[o] for o in dropped}, **changes})
        before = {**plain, **read_config(self.source)[0]}
        changed = {name: value for name, value in fields.items() if value != before[name] and name != "source"}
        kept = {name: value for name, value in changed.items() if name not in (*dropped, "style", "solver")}
        return Scheduler(**{**swap_solver(self.source, solver), **kept, **changes}, source=self.source)

    def levels(self, timesteps: Array) -> Levels:
        """Return alpha and sigma at training timesteps (0 … num_train_timesteps - 1), and what the network is told."""
        return self._noise().at(np.asarray(timesteps, dtype=float))

    def plan(self, num_inference_steps: int, strength: float = 1.0) -> Plan:
        """Return the plan of `num_inference_steps` steps, or of the last `strength` share of them from a noised image.

        Raises InputError for more steps than the schedule has, or a strength that leaves none.
        """
        n = num_inference_steps
        if type(n) is not int or not 1 <= n <= self.num_train_timesteps:
            raise InputError(
                f"num_inference_steps: {shown(n)} is not a whole number from 1 to {self.num_train_timesteps}"
            )
        if not 0 < strength <= 1:
            raise InputError(f"strength: {shown(strength)} is not above 0 and at most 1")
        skip = n - int(n * strength)
        if skip == n:
            raise InputError(f"strength: {strength} of {n} steps leaves none; the least is {1 / n:.3g}")
        path = self._path(n, skip)
        first = path.points[0]
        if self.prediction == "epsilon" and first.alpha == 0:
            raise InputError("prediction: epsilon says nothing about the picture at pure noise (zero_snr, or flow)")
        rows = SOLVERS[self.solver].rows(path, self._solver_options(n))
        start = (first.alpha, first.sigma) if strength < 1 else (0.0, self._first_scale(first))
        return make_plan(rows, path.points[-1], self.prediction, self.clip, start)

    def _solver_options(self, n: int) -> SolverOptions:
        easy = self.euler_at_final or (self.lower_order_final and n < EASY)
        return SolverOptions(self.eta, self.order, self.variance, easy, STYLES[self.style].noisy_end)

    def _first_scale(self, first: Point) -> float:
        """The scale of unit noise: in diffusers' Euler family sigma_max, and sqrt(sigma_max^2 + 1) for leading."""
        spacing = self.ends if self.spacing == "karras" else self.spacing
        return 1.0 if STYLES[self.style].unit or spacing == "leading" else first.sigma

    def _path(self, n: int, skip: int) -> Path:
        style, noise, train = STYLES[self.style], self._noise(), self.num_train_timesteps
        low = train * float(noise.table.sigma[0]) - 1 if style.low else 0.0
        ends = self.ends if style.inner else None
        grid = Grid(n, train, style.spare, style.rounding, self.steps_offset, low, ends)
        table = _points(noise.table)
        least = Point(table[0].t, 1.0, table[0].k) if style.unscaled else table[0]
        end = Point(0.0, 1.0, 0.0) if self.final == "zero" else least
        points = _points(SPACINGS[self.spacing](grid, noise))
        if math.isclose(points[-1].k, end.k) and n < train and not style.idle_end:
            points = _points(SPACINGS[self.spacing](dataclasses.replace(grid, n=n + 1), noise))[:n]
        targets = [*points[1:], end]
        if style.stride and self.spacing != "karras":
            strides = [int(p.t) - train // n for p in points]
            targets = [table[t] if t >= 0 else end for t in strides]
        return Path((*points[skip:], end), tuple(targets[skip:]))

    def _noise(self) -> Noise:
        n = self.num_train_timesteps
        if self.noise == "flow":
            return noises.flow(n, self.shift)
        formula = BETAS[self.noise](n, self.beta_start, self.beta_end)
        betas = formula if self.trained_betas is None else np.array(self.trained_betas)
        bar = np.cumprod(1 - betas)
        if STYLES[self.style].single:  # the table with which networks were trained
            bar = np.cumprod(1 - betas.astype(np.float32), dtype=float).astype(np.float32)
        if self.zero_snr:
            bar = noises.zero_terminal_snr(bar)
            bar[-1] = STYLES[self.style].floor
        return noises.from_alpha_bar(bar.astype(float))


def _points(levels: Levels) -> list[Point]:
    return [Point(*map(float, level)) for level in zip(*levels, strict=True)]


_NAMES: dict[str, tuple[Any, ...]] = {
    "noise": NOISES,
    "spacing": tuple(SPACINGS),
    "ends": tuple(TIMESTEPS),
    "prediction": tuple(PREDICTIONS),
    "solver": tuple(SOLVERS),
    "final": ("zero", "sigma_min"),
    "variance": ("fixed_small", "fixed_large"),
    "style": tuple(STYLES),
    "zero_snr": (False, True),
    "lower_order_final": (False, True),
    "euler_at_final": (False, True),
}
_RANGES: dict[str, tuple[type, float, float]] = {
    "num_train_timesteps": (int, 2, 100_000),
    "beta_start": (float, 1e-9, 0.999),
    "beta_end": (float, 1e-9, 0.999),
    "shift": (float, 1e-3, 1e3),
    "steps_offset": (int, 0, 1000),
    "eta": (float, 0, 1),
    "order": (int, 1, 2),
}
