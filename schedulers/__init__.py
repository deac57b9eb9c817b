"""Schedulers on four axes: noise, spacing, prediction, solver. Needs numpy; torch only where tensors come in."""

from __future__ import annotations

from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.schedulers.noise import NOISES
from genkit.schedulers.plan import COLUMNS, Plan, sample, step
from genkit.schedulers.prediction import PREDICTIONS
from genkit.schedulers.scheduler import Scheduler
from genkit.schedulers.solvers import HISTORY, SOLVERS
from genkit.schedulers.spacing import SPACINGS

__all__ = [
    "COLUMNS", "HISTORY", "NOISES", "PREDICTIONS", "SOLVERS", "SPACINGS",
    "Plan", "Scheduler", "sample", "scheduler_options", "step",
]  # fmt: skip

# What users of other tools type, and the solver it is here.
ALIASES = {
    "euler_a": "euler_ancestral", "k_euler": "euler", "k_euler_a": "euler_ancestral", "dpm++_2m": "dpmpp_2m",
    "dpmsolver++": "dpmpp_2m", "dpmpp_2m_sde": "sde-dpmpp_2m", "dpm++_2m_sde": "sde-dpmpp_2m",
    "sde-dpmsolver++": "sde-dpmpp_2m", "plms": "pndm", "dpm++_3m": "dpmpp_3m", "dpmpp_3m_sde": "sde-dpmpp_3m",
    "dpm++_3m_sde": "sde-dpmpp_3m", "dpm++_sde": "dpmpp_sde", "dpm++_2s": "dpmpp_2s", "dpm2_a": "dpm2_ancestral",
    "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_ancestral", "k_dpm_2": "dpm2", "k_dpm_2_a": "dpm2_ancestral",
    "k_lms": "lms", "k_heun": "heun", "uni_pc": "unipc", "sa_solver": "sa", "dpmsolver": "dpmsolver_2m",
}  # fmt: skip
NAMED = tuple(s for s in SPACINGS if s not in ("timesteps", "sigmas"))  # these may follow a solver's name
# What may be chosen at each generation; the rest is what the network was trained with.
CHOICES = (
    "solver", "spacing", "final", "timesteps", "sigmas", "original_inference_steps",
    *sorted({o for s in SOLVERS.values() for o in s.options}),
)  # fmt: skip


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
