"""The sampling plan of a row: of a solver, by name or options, or one that `genkit tune` fitted to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.files import place
from genkit.schedulers import SOLVERS, SPACINGS, Plan, Scheduler
from genkit.schedulers.tuned import FILE, read_plans

TUNED = "tuned"
# Names in other tools, and the solvers they mean.
ALIASES = {
    "euler_a": "euler_ancestral", "k_euler": "euler", "k_euler_a": "euler_ancestral", "dpm++_2m": "dpmpp_2m",
    "dpmsolver++": "dpmpp_2m", "dpmpp_2m_sde": "sde-dpmpp_2m", "dpm++_2m_sde": "sde-dpmpp_2m",
    "sde-dpmsolver++": "sde-dpmpp_2m", "plms": "pndm", "dpm++_3m": "dpmpp_3m", "dpmpp_3m_sde": "sde-dpmpp_3m",
    "dpm++_3m_sde": "sde-dpmpp_3m", "dpm++_sde": "dpmpp_sde", "dpm++_2s": "dpmpp_2s", "dpm2_a": "dpm2_ancestral",
    "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_ancestral", "k_dpm_2": "dpm2", "k_dpm_2_a": "dpm2_ancestral",
    "k_lms": "lms", "k_heun": "heun", "uni_pc": "unipc", "sa_solver": "sa", "dpmsolver": "dpmsolver_2m",
}  # fmt: skip
# Spacings that may be appended to a solver's name, as in dpmpp_2m_karras
NAMED = tuple(s for s in SPACINGS if s not in ("timesteps", "sigmas"))
# Options of a row; the others describe how the network was trained.
CHOICES = (
    "solver", "spacing", "final", "timesteps", "sigmas", "original_inference_steps",
    *sorted({o for s in SOLVERS.values() for o in s.options}),
)  # fmt: skip


def is_tuned(value: Any) -> bool:
    """Whether a row's `scheduler` names a tuned plan: "tuned", or a path to a tuned_scheduler.json."""
    return isinstance(value, str) and (value == TUNED or Path(value).name == FILE)


def check_scheduler(value: Any) -> None:
    """Raise InputError for a row's `scheduler` that is invalid for every model."""
    if not is_tuned(value):
        scheduler_options(value)


def tuned_file(value: str, folder: Path | None) -> Path:
    """Return the file of tuned plans that `value` names. folder: of the model."""
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
    """Return the plan of a row whose `scheduler` is `value`. scheduler, folder: of the model.

    Raises InputError for settings that the solver does not support, and for steps, strength or guidance without a tuned
    plan.
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


def scheduler_options(value: str | dict[str, Any]) -> dict[str, Any]:
    """Return a row's `scheduler` as a Scheduler's options: "dpmpp_2m", "dpmpp_2m_karras" or {"solver": …, "eta": …}.

    Raises InputError naming the nearest solver, spacing or option.
    """
    if isinstance(value, str):
        return _named(value)
    if not isinstance(value, dict):
        raise InputError(f"{shown(value)}: is neither the name of a solver nor options")
    for name in value:
        if name not in CHOICES:
            raise InputError(
                f"{shown(name)}: no option of a solver{nearest(name, CHOICES)}; there are {', '.join(CHOICES)}"
            )
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
    if "solver" in options:
        named = _named(options.pop("solver"))
        if "spacing" in options and named.get("spacing", options["spacing"]) != options["spacing"]:
            raise InputError(f"spacing: {shown(options['spacing'])} and the solver's name says {named['spacing']}")
        options = named | options
    Scheduler().with_options(**options)
    return options


def _named(name: object) -> dict[str, Any]:
    for spacing in ("", *NAMED):
        solver = str(name).removesuffix(f"_{spacing}") if spacing else str(name)
        if isinstance(name, str) and (solver != name or not spacing) and (solver in SOLVERS or solver in ALIASES):
            return {"solver": ALIASES.get(solver, solver), **({"spacing": spacing} if spacing else {})}
    full = [f"{solver}_{spacing}" for solver in SOLVERS for spacing in NAMED]
    close = nearest(str(name).lower(), [*SOLVERS, *ALIASES, *full])
    raise InputError(f"{shown(name)}: no solver{close}; there are {', '.join(SOLVERS)}, also with _karras and the like")
