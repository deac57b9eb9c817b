"""The sampling plan of a row: of a solver, by name or options, or one that `genkit tune` fitted to the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.files import place
from genkit.schedulers import SOLVERS, SPACINGS, Plan, Scheduler
from genkit.schedulers.diffusers_config import CLASSES
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
    "dpmpp_2m_sde_gpu": "sde-dpmpp_2m", "dpmpp_3m_sde_gpu": "sde-dpmpp_3m", "dpmpp_sde_gpu": "dpmpp_sde",
}  # fmt: skip
# Schedules of noise beside a sampler, in AUTOMATIC1111 ("Schedule type") and ComfyUI ("scheduler"), and their spacings;
# None is the model's own.
_SCHEDULED = {
    "automatic": None, "normal": None, "simple": "trailing", "sgm_uniform": "trailing", "uniform": None,
    "ddim_uniform": "leading", "karras": "karras", "exponential": "exponential", "beta": "beta",
    "align_your_steps": "align_your_steps", "align_your_steps_gits": "gits",
}  # fmt: skip
# Spacings that may be appended to a solver's name, as in dpmpp_2m_karras
NAMED = tuple(s for s in SPACINGS if s not in ("timesteps", "sigmas"))
# Options of a row; the others describe how the network was trained.
_SOLVER_OPTIONS = {option for solver in SOLVERS.values() for option in solver.options}
CHOICES = (
    "solver", "spacing", "final", "timesteps", "sigmas", "original_inference_steps", *sorted(_SOLVER_OPTIONS),
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
        return with_read_options(scheduler, options).plan(steps, strength=strength)
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


def with_read_options(scheduler: Scheduler, options: Mapping[str, Any]) -> Scheduler:
    """Return the scheduler with other options. Raises InputError for one that its solver or spacing does not read."""
    scheduler = scheduler.with_options(**options)
    read = SOLVERS[scheduler.solver].options
    for name, value in options.items():
        if value == getattr(Scheduler, name):  # the default of every solver
            continue
        if name in _SOLVER_OPTIONS and name not in read and name not in ("clip", "threshold"):  # those act on any x0
            known = f"; it reads {', '.join(read)}" if read else ""
            raise InputError(f"scheduler: {name}: {shown(value)}: {scheduler.solver} does not read it{known}")
        if name == "original_inference_steps" and scheduler.spacing != "lcm":
            raise InputError(f"scheduler: {name}: {shown(value)}: is read with spacing 'lcm' only")
    return scheduler


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
        if "spacing" in options and "spacing" in named and named["spacing"] != options["spacing"]:
            raise InputError(f"spacing: {shown(options['spacing'])} and the solver's name says {named['spacing']}")
        options = named | options
    Scheduler().with_options(**options)
    return options


def is_schedule(value: Any) -> bool:
    """Whether a row's `scheduler` is a schedule of noise alone, as in ComfyUI, where the solver is `sampler_name`."""
    return isinstance(value, str) and _plain(value) in _SCHEDULED


def with_schedule(scheduler: Any, schedule: Any) -> dict[str, Any]:
    """Return {"scheduler": a row's solver with a schedule of noise as its spacing}, or {} if neither says anything."""
    if not is_schedule(schedule):
        raise InputError(f"scheduler: {shown(schedule)}: no schedule of noise{nearest(str(schedule), _SCHEDULED)}")
    spacing = _SCHEDULED[_plain(schedule)]
    if spacing is None:
        return {} if scheduler is None else {"scheduler": scheduler}
    options = {} if scheduler is None else scheduler_options(scheduler)
    if options.get("spacing", spacing) != spacing:
        raise InputError(f"scheduler: {shown(scheduler)} and {shown(schedule)} name two schedules of noise")
    return {"scheduler": {**options, "spacing": spacing}}


def _plain(name: str) -> str:
    """Return a name in one spelling: "DPM++ 2M Karras" is dpm++_2m_karras."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _named(name: object) -> dict[str, Any]:
    plain = _plain(name) if isinstance(name, str) else ""
    for spacing in ("", *NAMED):
        solver = plain.removesuffix(f"_{spacing}") if spacing else plain
        if (solver != plain or not spacing) and solver in _SPELT:
            return {"solver": _SPELT[solver], **({"spacing": spacing} if spacing else {})}
    cls = next((c for c in _CLASSES if plain in (c.lower(), c.removesuffix("Scheduler").lower())), None)
    if cls is not None:  # a class of diffusers
        return {"solver": CLASSES[cls]["solver"]}
    full = [f"{solver}_{spacing}" for solver in SOLVERS for spacing in NAMED]
    close = nearest(plain or str(name), [*SOLVERS, *ALIASES, *full])
    raise InputError(f"{shown(name)}: no solver{close}; there are {', '.join(SOLVERS)}, also with _karras and the like")


_SPELT = {**{_plain(solver): solver for solver in SOLVERS}, **{_plain(k): v for k, v in ALIASES.items()}}
_CLASSES = [name for name, made in CLASSES.items() if made["style"] not in ("edm", "flow")]
