"""Which plan a row follows: of a solver, by name or options, or one that `genkit tune` fitted to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genkit.errors import InputError
from genkit.files import place
from genkit.schedulers import Plan, Scheduler, scheduler_options
from genkit.schedulers.tuned import FILE, read_plans

TUNED = "tuned"


def is_tuned(value: Any) -> bool:
    """Whether a row's `scheduler` names a tuned plan: "tuned", or a path to a tuned_scheduler.json."""
    return isinstance(value, str) and (value == TUNED or Path(value).name == FILE)


def check_scheduler(value: Any) -> None:
    """Raise InputError for a row's `scheduler` that no model has."""
    if not is_tuned(value):
        scheduler_options(value)


def tuned_file(value: str, folder: Path | None) -> Path:
    """Return the file of tuned plans that `value` names, `folder` being the model's."""
    if value != TUNED:
        return Path(value)
    if folder is None:
        raise InputError(f"scheduler: {TUNED!r} needs a model that was loaded from a folder")
    return folder / "scheduler" / FILE


def plan_for(
    scheduler: Scheduler,
    value: str | dict[str, Any] | None,
    steps: int,
    strength: float = 1.0,
    guidance: float = 1.0,
    folder: Path | None = None,
) -> Plan:
    """Return the plan of a row whose `scheduler` is `value`, on a model in `folder` that was trained with `scheduler`.

    Raises InputError for what the solver cannot do, and for steps, strength or guidance that no plan was tuned for.
    """
    if not is_tuned(value):
        options = {} if value is None else scheduler_options(value)
        return scheduler.with_options(**options).plan(steps, strength=strength)
    path = tuned_file(str(value), folder)
    if not path.exists():
        raise InputError(f"scheduler: {place(path)} is not there; make it with: genkit tune MODEL --steps {steps}")
    plans = read_plans(path, scheduler, guidance=guidance)
    if strength < 1:
        raise InputError(f"scheduler: a tuned plan starts from noise and cannot begin within, at strength {strength}")
    if steps not in plans:
        known = " and ".join(map(str, plans))
        raise InputError(f"num_inference_steps: no plan for {steps} in {place(path)}, but for {known}")
    return plans[steps]
