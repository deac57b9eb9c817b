"""Tuned plans, the file that keeps them beside the model, and the checkpoint of a fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.durable import disk, write_whole
from genkit.errors import InputError, shown
from genkit.files import place, read_json
from genkit.schedulers.plan import Plan, plan_from_rows
from genkit.schedulers.scheduler import Scheduler
from genkit.schedulers.solvers import HISTORY, Level, Row

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

FILE = "tuned_scheduler.json"
FORMAT = 1
SAVE_EVERY = 5.0  # seconds, or 20 times as long as saving takes
NAMES = ("t", "alpha", "sigma", "cx", "c0", *(f"c{i + 1}" for i in range(HISTORY)))  # columns of the file
# The options that a network was trained with: a tuned plan is valid for these only.
TRAINED = (
    "noise", "prediction", "num_train_timesteps", "beta_start", "beta_end", "trained_betas", "zero_snr", "shift",
    "dynamic_shift", "sigma_min", "sigma_max", "clip",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
    """The result of a fit. plan: the fitted one if it is better on the held-out noises, else the stock plan.

    stock, fitted: {"mean", "p99"} over those noises of each plan's error, the root mean square distance from the end of
    the teacher's trajectory. better: whether the fitted plan was taken.
    """

    plan: Plan
    stock: dict[str, float]
    fitted: dict[str, float]
    better: bool

    @property
    def timesteps(self) -> list[int]:
        """The plan's levels as whole, strictly falling timesteps, for diffusers' `set_timesteps(timesteps=…)`."""
        whole = np.rint(self.plan.timesteps).astype(int)
        below = np.arange(len(whole))[::-1]  # how many timesteps must still fit below each
        return [int(t) for t in np.maximum(np.minimum.accumulate(whole + below[::-1]) - below[::-1], below)]


def plan_of(rows: list[list[float]], scheduler: Scheduler) -> Plan:
    """Return the plan whose rows have the columns NAMES; it starts from noise and ends at sigma 0."""
    made = [Row(Level(*row[:3]), cx=row[3], c0=row[4], c=tuple(row[5:])) for row in rows]
    start = 0.0, math.hypot(made[0].level.alpha, made[0].level.sigma)  # std of x there, for data of unit variance
    return plan_from_rows(made, Level(0.0, 1.0, 0.0), scheduler.prediction, start, scheduler.clip)


def write_plan(
    path: str | os.PathLike[str], tuned: Tuned, scheduler: Scheduler, *, guidance: float = 1.0, identity: str = ""
) -> None:
    """Add a tuned plan to the file `path` (FILE, beside the model), which holds one for each number of steps.

    identity: of the weights, for instance their hash. Raises InputError for a stock plan, or for a file of another
    model, scheduler or guidance.
    """
    path, steps = Path(path), tuned.plan.nfe
    if not tuned.better:
        raise InputError(f"{steps} steps: the stock plan was not beaten; there is nothing to write")
    about = _about(scheduler) | {"model": identity, "guidance": float(guidance)}
    kept = _read(path, about)["plans"] if path.exists() else {}
    levels = np.stack([tuned.plan.timesteps, tuned.plan.alphas[:-1], tuned.plan.sigmas[:-1]], axis=1)
    rows = np.concatenate([levels, np.stack([tuned.plan[name] for name in NAMES[3:]], axis=1)], axis=1).tolist()
    errors = {"stock": tuned.stock, "tuned": tuned.fitted}
    plans = kept | {str(steps): {"errors": errors, "columns": list(NAMES), "rows": rows}}
    whole = about | {"plans": dict(sorted(plans.items(), key=lambda item: int(item[0])))}
    with disk(path):
        write_whole(path, (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())


def read_plans(
    path: str | os.PathLike[str], scheduler: Scheduler, *, guidance: float | None = None, identity: str | None = None
) -> dict[int, Plan]:
    """Return the plans of a file by number of steps; guidance, identity: what they must be tuned for, if given.

    Raises InputError naming the file, and what in it is invalid or different.
    """
    about = _about(scheduler)
    about |= {} if guidance is None else {"guidance": float(guidance)}
    about |= {} if identity is None else {"model": identity}
    return {int(steps): plan_of(plan["rows"], scheduler) for steps, plan in _read(Path(path), about)["plans"].items()}


def _about(scheduler: Scheduler) -> dict[str, Any]:
    trained = {name: getattr(scheduler, name) for name in TRAINED}
    return {"format": FORMAT, "trained": json.loads(json.dumps(trained))}  # as read back: lists for tuples


def _read(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return the file's content. Raises InputError for a malformed one, or values other than those of `about`."""
    where, found = place(path), read_json(path)
    if "trained" in about and isinstance(found.get("trained"), dict):
        for name, value in about["trained"].items():
            if found["trained"].get(name) != value:
                given = shown(found["trained"].get(name))
                raise InputError(f"{where}: is for a model trained with {name} {given}, not {shown(value)}")
    for name, value in about.items():
        if found.get(name) != value:
            raise InputError(f"{where}: {name}: is {shown(found.get(name))}, not {shown(value)}")
    plans = found.get("plans")
    if not isinstance(plans, dict):
        raise InputError(f"{where}: plans: is absent")
    for steps, plan in plans.items():
        rows = plan.get("rows") if isinstance(plan, dict) else None
        if not isinstance(rows, list) or plan.get("columns") != list(NAMES) or str(len(rows)) != steps or not rows:
            raise InputError(f"{where}: plans: {shown(steps)}: is not a table of so many rows of {', '.join(NAMES)}")
        whole = all(isinstance(row, list) and len(row) == len(NAMES) and all(map(_number, row)) for row in rows)
        if not whole or not all(row[1] >= 0 and row[2] > 0 for row in rows):
            raise InputError(f"{where}: plans: {shown(steps)}: has a row that is not {len(NAMES)} numbers of a step")
        levels = [row[2] / max(row[1], 1e-300) for row in rows]
        if any(after >= before for before, after in itertools.pairwise(levels)):
            raise InputError(f"{where}: plans: {shown(steps)}: sigma / alpha does not fall")
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


class Checkpoint:
    """The state of a fit on disk. state: that of a stopped fit with the same fingerprint, else empty. path: or None.

    Raises InputError for a file of another kind.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint, self.due = path, fingerprint, time.monotonic() + SAVE_EVERY
        self.state: State = {}
        if path is not None and path.exists():
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, "pt") as file:
                    found = (file.metadata() or {}).get("tuning")
                    names = file.keys() if found == fingerprint else []
                    self.state = {name: file.get_tensor(name) for name in names}
            except (SafetensorError, OSError):
                found = None
            if found is None:
                raise InputError(f"{place(path)}: is not the state of a fit; name another file")

    def save(self, state: State, last: bool = False) -> None:
        """Write the state if SAVE_EVERY has passed, and at the end."""
        began = time.monotonic()
        if self.path is not None and (last or began >= self.due):
            from safetensors.torch import save

            with disk(self.path):
                data = save({k: v.contiguous() for k, v in state.items()}, {"tuning": self.fingerprint})
                write_whole(self.path, data)
            self.due = time.monotonic() + (max(SAVE_EVERY, 20 * (time.monotonic() - began)) if SAVE_EVERY else 0)
