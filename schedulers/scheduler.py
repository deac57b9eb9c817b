"""The four axes in one place: a noise schedule, a spacing, a prediction and a solver make plans."""

from __future__ import annotations

import dataclasses
import itertools
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
from genkit.schedulers.spacing import IN_K, IN_T, SPACINGS, Grid, levels


@dataclasses.dataclass(frozen=True)
class Style:
    """How diffusers' classes depart from the plain way of placing steps; the default is the plain way.

    single: betas in single precision, and sigma / alpha straight between timesteps. spare, told: see Grid. stride: step
    to t - N // n rather than to the next point, which differs from it by rounding. floor: the least alpha^2 under zero
    terminal SNR. inner: spacings in sigma go between the ends of another one. unscaled: `final` sigma_min leads to
    x0 + k eps. unit: start from unit noise, else from noise of the first level's sigma (but for leading). noisy_end:
    ddpm's last step adds noise, unless it starts at t = 0. idle_end: the last call may be made at the level where the
    plan ends, for nothing. half: of dpmpp_3m's second moment. flow: for flow, the ends of linspace, below its plain
    ones; None: it ends at the least sigma shifted twice. near: for flow, the least alpha.
    """

    single: bool = True
    spare: bool = False
    told: Mapping[str, Callable[[Array], Array]] = dataclasses.field(default_factory=dict)
    stride: bool = False
    floor: float = 0.0
    inner: bool = False
    unscaled: bool = False
    unit: bool = True
    noisy_end: bool = False
    idle_end: bool = True
    half: bool = False
    flow: tuple[int, int] | None = (0, 0)
    near: float = 0.0


def _cut(t: Array) -> Array:
    """Cut to whole timesteps what rounding left just below them, as a cast to integers does."""
    return np.floor(np.maximum(t - 1e-3, 0))


def _whole(t: Array) -> Array:
    return np.floor(t + 1e-9)


_ROUNDED: dict[str, Callable[[Array], Array]] = {"linspace": np.round, "karras": np.round, "lu": np.round}
_DPM = {**_ROUNDED, "exponential": _cut, "beta": _cut}
STYLES = {
    "exact": Style(single=False, idle_end=False),
    "ddim": Style(told={"linspace": np.round}, stride=True),
    "ddpm": Style(told={"linspace": np.round}, noisy_end=True),
    "lcm": Style(),
    "euler": Style(floor=2.0**-24, inner=True, unscaled=True, unit=False),
    "dpm2": Style(floor=2.0**-24, inner=True, unit=False, told={"karras": np.round}),
    "dpm": Style(spare=True, told=_DPM, floor=2.0**-24, half=True),
    "singlestep": Style(spare=True, told=_DPM, floor=2.0**-24),
    "flow": Style(flow=None),
    "flow-dpm": Style(spare=True, told={"flow": _whole}, flow=(-1, -1), half=True),
    "flow-unipc": Style(spare=True, told={"flow": _whole}, near=1e-6),
    "edm": Style(half=True),
}


def _one_of(default: Any, *choices: Any) -> Any:
    return dataclasses.field(default=default, metadata={"choices": choices})


def _within(default: Any, low: float, high: float) -> Any:
    """A number of the default's kind; None and whole numbers besides where the default is None."""
    return dataclasses.field(default=default, metadata={"range": (type(default), low, high)})


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A point on each axis, with the options that go with them. Makes plans; has no state.

    noise: linear, scaled_linear, cosine, sigmoid, flow or edm; zero_snr rescales betas to end in pure noise (Lin et al.
    2024); shift is flow's, dynamic_shift makes it from the picture's size: (base, greatest, tokens at base, tokens at
    the greatest, "exponential" or "linear"); trained_betas replace the formula; edm's sigma goes from sigma_min to
    sigma_max. spacing: see SPACINGS; leading reads steps_offset, lcm original_inference_steps; timesteps or sigmas
    (sigma / alpha) say them one by one. final: where the last step leads, "zero" noise or "sigma_min", the least
    trained. clip: bound on |x0|. threshold: (quantile, greatest) of dynamic thresholding. eta: share of ancestral noise
    (ddim, tcd). variance: fixed_small or fixed_large (ddpm). order: a number, or one for each step; lower_order_final,
    euler_at_final: fewer at the end, see `step_orders`. solver_type: midpoint, heun (dpm), bh1, bh2 (unipc). corrector,
    corrector_order, tau, predict_eps: see `unipc` and `sa`. style: "exact", or the family of diffusers classes whose
    way of placing steps is followed, as `from_config` does; ends: the spacing whose first and last level spacings in
    sigma go between in the style of diffusers' Euler. source: the config that this was read from. Raises InputError for
    a name or value that is not one of these.
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
                _check_number(field.name, value, *known["range"])
        if self.clip is not None:
            _check_number("clip", self.clip, float, 1e-6, 1e6)
        for name, least in (("timesteps", 0.0), ("sigmas", 1e-6)):
            self._check_list(name, least)
        self._check_order()
        self._check_betas()

    def _check_list(self, name: str, least: float) -> None:
        given = getattr(self, name)
        if (given is None) != (self.spacing != name):
            raise InputError(f"{name}: go with spacing {name!r}; spacing is {self.spacing!r}")
        for value in given or ():
            _check_number(name, value, float, least, 1e5 if name == "sigmas" else self.num_train_timesteps - 1)
        if given is not None and (not given or any(b >= a for a, b in itertools.pairwise(given))):
            raise InputError(f"{name}: {shown(list(given))} is not a falling list")

    def _check_order(self) -> None:
        most = SOLVERS[self.solver].orders[1]
        if self.order is not None and "order" in SOLVERS[self.solver].options:
            for value in self.order if isinstance(self.order, tuple) and self.order else (self.order,):
                _check_number("order", value, int, 1, most)
        if self.threshold is not None:
            _check_number("threshold", self.threshold[0], float, 1e-6, 1)
            _check_number("threshold", self.threshold[1], float, 1, 1e6)

    def _check_betas(self) -> None:
        if self.trained_betas is not None:
            if not isinstance(self.trained_betas, tuple) or not all(isinstance(b, float) for b in self.trained_betas):
                raise InputError(f"trained_betas: {shown(self.trained_betas)} is not a tuple of numbers")
            if (given := len(self.trained_betas)) != self.num_train_timesteps:
                raise InputError(f"trained_betas: {given} for num_train_timesteps {self.num_train_timesteps}")
            noises.check_betas(np.array(self.trained_betas))
        elif self.beta_end < self.beta_start:
            raise InputError(f"beta_end: {self.beta_end} is less than beta_start {self.beta_start}")
        if self.sigma_max <= self.sigma_min:
            raise InputError(f"sigma_max: {self.sigma_max} is not above sigma_min {self.sigma_min}")

    @property
    def placing(self) -> Style:
        return STYLES[self.style]

    @property
    def order_or_default(self) -> int | tuple[int, ...]:
        """The order asked for, else the solver's own."""
        return SOLVERS[self.solver].orders[0] if self.order is None else self.order

    @classmethod
    def from_config(cls, config: str | FilePath | Mapping[str, Any] | Any) -> Scheduler:
        """Read a diffusers scheduler: its config, a scheduler_config.json, the folder that holds it, or the object.

        Raises InputError for an unsupported class, an unknown key, or a value that this does not express.
        """
        options, stated = read_config(config)
        return cls(**options, source=stated)

    def to_config(self) -> dict[str, Any]:
        """Return a diffusers scheduler config, which `from_config` reads back as this scheduler in diffusers' style.

        Raises InputError for an option that diffusers has no key for.
        """
        return write_config(self)

    def as_diffusers(self) -> Any:
        """Return a diffusers scheduler that takes this one's steps: `pipeline.scheduler = scheduler.as_diffusers()`."""
        from genkit.schedulers.as_diffusers import PlanScheduler

        return PlanScheduler(self)

    def with_options(self, **changes: Any) -> Scheduler:
        """Return this scheduler with other options: what the network was trained for stays.

        A new solver drops the options that only the old one reads, timesteps and sigmas set the spacing. When this came
        from a diffusers config, the rest is what that solver's class makes of it (`Other.from_config(old.config)`).
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in changes:
            if name not in fields or name == "source":
                raise InputError(f"{shown(name)}: no option of a scheduler{nearest(name, fields)}")
        for name in ("timesteps", "sigmas"):
            if changes.get(name) is not None:
                changes = {"spacing": name, **changes}
            elif "spacing" in changes and changes["spacing"] != name:
                changes = {**changes, name: None}
        solver = changes.get("solver", self.solver)
        if solver == self.solver or not isinstance(solver, str) or solver not in SOLVERS:
            return dataclasses.replace(self, **changes)
        if SOLVERS[solver].spacing:
            changes = {"spacing": SOLVERS[solver].spacing, **changes}
        read, plain = SOLVERS[solver].options, {f.name: f.default for f in dataclasses.fields(self)}
        dropped = {o for s in SOLVERS.values() for o in s.options} - {*read} | {"order", "solver_type"}
        if self.source is None:
            return Scheduler(**{**fields, **{o: plain[o] for o in dropped}, **changes})
        before = {**plain, **read_config(self.source)[0]}
        changed = {name: value for name, value in fields.items() if value != before[name] and name != "source"}
        kept = {name: value for name, value in changed.items() if name not in (*dropped, "style", "solver")}
        return Scheduler(**{**swap_solver(self.source, solver), **kept, **changes}, source=self.source)

    def levels(self, timesteps: Array) -> Levels:
        """Return alpha and sigma at training timesteps (0 … num_train_timesteps - 1), and what the network is told."""
        return self._noise(None).at(np.asarray(timesteps, dtype=float))

    def plan(self, num_inference_steps: int | None = None, strength: float = 1.0, tokens: int | None = None) -> Plan:
        """Return the plan of `num_inference_steps` steps, or of the last `strength` share of them from a noised image.

        tokens: of the picture, for dynamic_shift. Raises InputError for more steps than the schedule has, other than
        the timesteps or sigmas given, or a strength that leaves none.
        """
        given = self.timesteps or self.sigmas
        n = num_inference_steps if num_inference_steps is not None else len(given or ())
        _check_number("num_inference_steps", n, int, 1, self.num_train_timesteps)
        if given and n != len(given):
            raise InputError(f"num_inference_steps: {n}, and {len(given)} {self.spacing} are given")
        if not 0 < strength <= 1:
            raise InputError(f"strength: {strength} is not above 0 and at most 1")
        skip = n - int(n * strength)
        if skip == n:
            raise InputError(f"strength: {strength} of {n} steps leaves none; the least is {1 / n:.3g}")
        path = self._path(n, skip, tokens)
        first = path.points[0]
        if self.prediction == "epsilon" and first.alpha == 0:
            raise InputError("prediction: epsilon says nothing about the picture at pure noise (zero_snr, or flow)")
        rows = SOLVERS[self.solver].rows(path, self._solver_options())
        start = (first.alpha, first.sigma) if strength < 1 else (0.0, self._first_scale(first))
        return make_plan(rows, path.points[-1], self.prediction, start, self.clip, self.threshold)

    def _solver_options(self) -> SolverOptions:
        return SolverOptions(
            self.solver, self.noise, self.order_or_default, SOLVERS[self.solver].rule, self.eta, self.variance,
            self.solver_type, self.corrector, self.corrector_order, self.tau, self.predict_eps,
            self.lower_order_final, self.euler_at_final, self.placing.noisy_end, self.placing.half,
        )  # fmt: skip

    def _first_scale(self, first: Point) -> float:
        """The scale of unit noise: in diffusers' Euler family sigma_max, and sqrt(sigma_max^2 + 1) for leading."""
        if self.noise == "edm":
            return math.hypot(first.sigma, 1)
        placed = self.spacing if self.spacing in IN_T else self.ends
        return 1.0 if self.placing.unit or placed == "leading" else first.sigma

    def _path(self, n: int, skip: int, tokens: int | None) -> Path:
        style, noise, train = self.placing, self._noise(tokens), self.num_train_timesteps
        low, high = map(float, (style.flow or (0, 0)) if self.noise == "flow" else (0, 0))
        if style.flow is None and self.dynamic_shift is None and self.noise == "flow":
            low = train * float(noise.table.sigma[0]) - 1
        given = tuple(self.timesteps or self.sigmas or ())
        rounding, told = style.told.get("linspace"), style.told.get(self.spacing if self.spacing in IN_K else "")
        if self.noise == "flow":
            rounding, told = None, style.told.get("flow")
        ends = self.ends if style.inner and self.spacing not in IN_T else None
        where = (self.steps_offset, low, high, ends, self.original_inference_steps, given)
        grid = Grid(n, train, style.spare, rounding, told, *where)
        table = _points(noise.table)
        least = Point(table[0].t, 1.0, table[0].k) if style.unscaled else table[0]
        end = Point(0.0, 1.0, 0.0) if self.final == "zero" else least
        points = _points(levels(self.spacing, grid, noise))
        if math.isclose(points[-1].k, end.k) and n < train and not style.idle_end and not given:
            points = _points(levels(self.spacing, dataclasses.replace(grid, n=n + 1), noise))[:n]
        if style.near and points[0].alpha < style.near:
            points[0] = Point(train - 1, style.near, 1 - style.near)
        targets = [*points[1:], end]
        if style.stride and self.spacing in IN_T and not given:
            strides = [int(p.t) - train // n for p in points]
            targets = [table[t] if t >= 0 else end for t in strides]
        return Path((*points[skip:], end), tuple(targets[skip:]), n, noise)

    def _noise(self, tokens: int | None) -> Noise:
        n = self.num_train_timesteps
        if self.noise == "edm":
            return noises.edm(n, self.sigma_min, self.sigma_max)
        if self.noise == "flow":
            return noises.flow(n, self._shift(tokens))
        formula = BETAS[self.noise](n, self.beta_start, self.beta_end)
        betas = formula if self.trained_betas is None else np.array(self.trained_betas)
        bar = np.cumprod(1 - betas)
        if self.placing.single:  # the table with which networks were trained
            bar = np.cumprod(1 - betas.astype(np.float32), dtype=float).astype(np.float32)
        if self.zero_snr:
            bar = noises.zero_terminal_snr(bar)
            bar[-1] = self.placing.floor
        return noises.from_alpha_bar(bar.astype(float), straight=self.placing.single)

    def _shift(self, tokens: int | None) -> float:
        """Flow's shift: `shift`, or from the number of tokens of the picture (Esser et al. 2024, section 5.3.2)."""
        if self.dynamic_shift is None:
            return self.shift
        base, most, few, many, kind = self.dynamic_shift
        mu = base + ((few if tokens is None else tokens) - few) * (most - base) / (many - few)
        return math.exp(mu) if kind == "exponential" else mu


def _check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not low <= value <= high:
        noun = "whole number" if kind is int else "number"
        raise InputError(f"{name}: {shown(value)} is not a {noun} from {low:g} to {high:g}")


def _points(levels: Levels) -> list[Point]:
    return [Point(*map(float, level)) for level in zip(*levels, strict=True)]
