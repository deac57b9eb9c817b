"""Diffusion schedulers on four axes: noise, spacing, prediction, solver. Needs numpy; torch only where tensors come in."""

from __future__ import annotations

from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.schedulers.plan import COLUMNS, Plan, sample, step
from genkit.schedulers.scheduler import Scheduler
from genkit.schedulers.solvers import HISTORY, SOLVERS
from genkit.schedulers.spacing import SPACINGS

__all__ = ["COLUMNS", "HISTORY", "SOLVERS", "SPACINGS", "Plan", "Scheduler", "sample", "scheduler_options", "step"]

# What users of other tools type, and the solver it is here.
ALIASES = {
    "euler_a": "euler_ancestral", "k_euler": "euler", "k_euler_a": "euler_ancestral", "dpm++_2m": "dpmpp_2m",
    "dpmsolver++": "dpmpp_2m", "dpmpp_2m_sde": "sde-dpmpp_2m", "dpm++_2m_sde": "sde-dpmpp_2m",
    "sde-dpmsolver++": "sde-dpmpp_2m", "plms": "pndm",
}  # fmt: skip


def scheduler_options(value: str | dict[str, Any]) -> dict[str, Any]:
    """Return a row's `scheduler` as options of a Scheduler: "dpmpp_2m", "dpmpp_2m_karras" or {"solver": …, "spacing": …}.

    Raises InputError naming the nearest solver, spacing or option.
    """
    if isinstance(value, dict):
        options = dict(value)
        if "solver" in options:
            options |= _named(options["solver"]) if isinstance(options["solver"], str) else {}
        Scheduler().with_options(**options)
        return options
    return _named(value)


def _named(name: str) -> dict[str, Any]:
    for spacing in ("", *SPACINGS):
        solver = name.removesuffix(f"_{spacing}") if spacing else name
        solver = ALIASES.get(solver, solver)
        if solver in SOLVERS and (not spacing or name.endswith(f"_{spacing}")):
            return {"solver": solver, **({"spacing": spacing} if spacing else {})}
    raise InputError(f"{shown(name)}: no solver{nearest(name, [*SOLVERS, *ALIASES])}; there are {', '.join(SOLVERS)}")
