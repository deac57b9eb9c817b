"""The four axes in one place: a noise schedule, a spacing, a prediction and a solver make plans."""

from __future__ import annotations

import dataclasses
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from genkit.errors import InputError, nearest, shown
from genkit.schedulers import noise as noises
from genkit.schedulers.noise import BETAS, NOISES, Noise
from genkit.schedulers.plan import Plan, make_plan
from genkit.schedulers.prediction import PREDICTIONS
from genkit.schedulers.solvers import SOLVERS, Path, SolverOptions
from genkit.schedulers.spacing import SPACINGS, TIMESTEPS, Grid


@dataclasses.dataclass(frozen=True)
class Style:
    """How steps are placed on the schedule, where diffusers' classes differ from each other and from the plain way.

    spare, whole, inner: see Grid. stride: step to t - N // n rather than to the next point, which differs from it by
    rounding. floor: the least alpha^2 under zero terminal SNR. unit: start from unit noise, else from noise of the first
    level's sigma.
    """

    spare: bool = False
    whole: bool = False
    inner: bool = False
    stride: bool = False
    floor: float = 0.0
    unit: bool = True


EASY = 15  # plans of fewer steps end in a first-order step (easy_end), as diffusers' DPM-Solver does

STYLES = {
    "exact": Style(),
    "ddim": Style(whole=True, stride=True),
    "ddpm": Style(whole=True),
    "euler": Style(inner=True, floor=2.0**-24, unit=False),
    "dpm": Style(spare=True, whole=True, floor=2.0**-24),
    "flow": Style(),
}


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A point on each axis, with the options that go with them. Makes plans; has no state.

    noise: linear, scaled_linear, cosine or flow; zero_snr rescales it to end in pure noise (Lin et al. 2024); shift is
    flow's; trained_betas replace the formula. spacing: leading, trailing, linspace or karras. final: where the last step
    leads, "zero" noise or "sigma_min", the least trained. clip: bound on |x0|. eta, order, variance, easy_end: see
    SolverOptions. ends: the spacing whose first and last point karras goes between, in the style of diffusers' Euler. style: "exact", or the diffusers family whose way of placing steps is followed (`from_config` does).
    Raises InputError for a name or value that is not one of these.
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
    order: int = 2
    variance: str = "fixed_small"
    easy_end: bool = True
    ends: str = "linspace"
    style: str = "exact"

    def __post_init__(self) -> None:
        for field, known in _NAMES.items():
            value = getattr(self, field)
            if value not in known:
                raise InputError(f"{field}: {shown(value)} is not one of {', '.join(map(str, known))}{nearest(value, map(str, known))}")
        for field, (low, high) in _RANGES.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise InputError(f"{field}: {shown(value)} is not a number from {low} to {high}")
        if self.clip is not None and not (isinstance(self.clip, int | float) and 0 < self.clip < 1e6):
            raise InputError(f"clip: {shown(self.clip)} is not a positive number")
        if self.trained_betas is None and self.noise in ("linear", "scaled_linear") and self.beta_end < self.beta_start:
            raise InputError(f"beta_end: {self.beta_end} is less than beta_start {self.beta_start}")
        self._noise()

    @classmethod
    def from_config(cls, config: str | FilePath | dict[str, Any]) -> Scheduler:
        """Read a diffusers scheduler config: a dictionary, a scheduler_config.json, or the folder that holds it.

        Raises InputError for an unsupported class, an unknown key, or a value that this does not express.
        """
        from genkit.schedulers.diffusers_config import read_config

        return cls(**read_config(config))

    def to_config(self) -> dict[str, Any]:
        """Return a diffusers scheduler config that `from_config` reads back as this scheduler."""
        from genkit.schedulers.diffusers_config import write_config

        return write_config(self)

    def with_options(self, **changes: Any) -> Scheduler:
        """Return this scheduler with other options: noise and prediction, which the network was trained for, stay.

        A new solver takes its family's way of placing steps when this scheduler follows diffusers, and drops the
        options of the old one.
        """
        fields = {f.name: f.default for f in dataclasses.fields(self)}
        for name in changes:
            if name not in fields:
                raise InputError(f"{shown(name)}: no option of a scheduler{nearest(name, fields)}")
        solver = changes.get("solver", self.solver)
        if solver != self.solver and solver in SOLVERS:
            old = {name: fields[name] for name in ("eta", "order", "variance", "easy_end", "clip", "final")}
            style = self.style if self.style in ("exact", "flow") else SOLVERS[solver].style
            changes = {**old, "style": style, **changes}
        return dataclasses.replace(self, **changes)

    def plan(self, num_inference_steps: int, strength: float = 1.0) -> Plan:
        """Return the plan of `num_inference_steps` steps, or of the last `strength` share of them from a noised picture.

        Raises InputError for more steps than the schedule has, or a strength that leaves none.
        """
        n = num_inference_steps
        if not 1 <= n <= self.num_train_timesteps:
            raise InputError(f"num_inference_steps: {n} is not within 1 to {self.num_train_timesteps}")
        skip = n - min(int(n * strength), n)
        if skip == n:
            raise InputError(f"strength: {strength} of {n} steps leaves none; the least is {1 / n:.3g}")
        path = self._path(n, skip)
        options = SolverOptions(self.eta, self.order, self.variance, self.easy_end and n < EASY)
        with np.errstate(divide="ignore", invalid="ignore"):
            rows = SOLVERS[self.solver].rows(path, options)
            alpha, sigma = float(path.alpha[0]), float(path.sigma[0])
            start = (alpha, sigma) if skip else (0.0, self._first_scale(path))
            plan = make_plan(rows, path, self.prediction, self.clip, start if strength == 1.0 else (alpha, sigma))
        if not np.isfinite(plan["px"]).all() or not np.isfinite(plan["cx"]).all():
            raise InputError(f"prediction: {self.prediction} says nothing about the picture at pure noise (zero SNR)")
        return plan

    def _first_scale(self, path: Path) -> float:
        """diffusers' Euler family starts at sigma_max for the spacings that begin at the noise end, else at unit variance."""
        spacing = self.ends if self.spacing == "karras" else self.spacing
        return 1.0 if STYLES[self.style].unit or spacing == "leading" else float(path.sigma[0])

    def _path(self, n: int, skip: int) -> Path:
        style, noise, train = STYLES[self.style], self._noise(), self.num_train_timesteps
        low = train * float(noise.table.sigma[0]) - 1 if self.style == "flow" else 0.0  # diffusers shifts its end twice
        inner = self.ends if style.inner else None
        levels = SPACINGS[self.spacing](Grid(n, train, style.spare, style.whole, self.steps_offset, low, inner), noise)
        levels = noises.Levels(*(np.asarray(v)[skip:] for v in (levels.t, levels.alpha, levels.sigma)))
        least = noise.table.k[0] if style.inner else None  # diffusers' Euler family ends unscaled: x0 + k eps
        end = (float(noise.table.alpha[0]), float(noise.table.sigma[0])) if least is None else (1.0, float(least))
        if self.final == "zero":
            end = 1.0, 0.0
        alpha, sigma = np.append(levels.alpha, end[0]), np.append(levels.sigma, end[1])
        to = alpha[1:], sigma[1:]
        if style.stride and self.spacing != "karras":
            target = levels.t.astype(int) - train // n
            inside = np.maximum(target, 0)
            to = (np.where(target < 0, end[0], noise.table.alpha[inside]), np.where(target < 0, end[1], noise.table.sigma[inside]))
        return Path(levels.t, alpha, sigma, *to)

    def _noise(self) -> Noise:
        n = self.num_train_timesteps
        if self.noise == "flow":
            return noises.flow(n, self.shift)
        betas = BETAS[self.noise](n, self.beta_start, self.beta_end)
        if self.trained_betas is not None:
            betas = np.array(self.trained_betas, dtype=float)
        noises.check_betas(betas)
        if self.style != "exact":  # diffusers' tables, with which networks were trained, are in single precision
            betas = betas.astype(np.float32)
        bar = np.cumprod(1 - betas)
        if self.zero_snr:
            bar = noises.zero_terminal_snr(bar)
            bar[-1] = STYLES[self.style].floor
        return noises.from_alpha_bar(bar.astype(float))


_NAMES: dict[str, Any] = {
    "noise": NOISES,
    "spacing": tuple(SPACINGS),
    "ends": tuple(TIMESTEPS),
    "prediction": tuple(PREDICTIONS),
    "solver": tuple(SOLVERS),
    "final": ("zero", "sigma_min"),
    "variance": ("fixed_small", "fixed_large"),
    "style": tuple(STYLES),
    "zero_snr": (False, True),
    "easy_end": (False, True),
}
_RANGES = {
    "num_train_timesteps": (2, 100_000),
    "beta_start": (1e-9, 0.999),
    "beta_end": (1e-9, 0.999),
    "shift": (1e-3, 1e3),
    "steps_offset": (0, 1000),
    "eta": (0.0, 1.0),
    "order": (1, 2),
}
