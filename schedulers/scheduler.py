"""The scheduler that users hold: options on the four axes, and what is made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from genkit.errors import InputError, nearest, shown
from genkit.schedulers.diffusers_config import read_config, swap_solver, write_config
from genkit.schedulers.noise import Array, Levels
from genkit.schedulers.options import Options
from genkit.schedulers.plan import Plan
from genkit.schedulers.planning import make_plan, noise_schedule
from genkit.schedulers.solvers import SOLVERS


@dataclasses.dataclass(frozen=True)
class Scheduler(Options):
    """A noise schedule, a spacing, a prediction and a solver, with their `Options`. Makes plans; has no state."""

    @classmethod
    def from_config(cls, config: str | Path | Mapping[str, Any] | Any) -> Scheduler:
        """Read a diffusers scheduler: its config, a scheduler_config.json, the folder that holds it, or the object.

        Raises InputError for an unsupported class, an unknown key, or a value that cannot be expressed.
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
        """Return this scheduler with other options; what the network was trained with stays.

        A new solver drops the options that only the old one reads; timesteps and sigmas set the spacing. If this came
        from a diffusers config, the rest is what the new solver's class makes of it (`Other.from_config(old.config)`).
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
        """Return the noise levels at training timesteps (0 … num_train_timesteps - 1), of the same shape."""
        return noise_schedule(self).at(np.asarray(timesteps, dtype=float))

    def plan(self, num_inference_steps: int | None = None, strength: float = 1.0, tokens: int | None = None) -> Plan:
        """Return the plan of `num_inference_steps` steps, or of the last `strength` share of them from a noised image.

        tokens: of the image, for dynamic_shift. Raises InputError for more steps than the schedule has, a number other
        than that of the given timesteps or sigmas, or a strength that leaves no step.
        """
        return make_plan(self, num_inference_steps, strength, tokens)
