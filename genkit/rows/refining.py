"""SDXL's refiner: which refiner fits a model, and the sampling plan of the two together.

The first steps of a plan are the model's, those below a noise level the refiner's, as with diffusers' denoising_end and
denoising_start (Podell et al. 2023, section 2.5).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.errors import InputError
from genkit.rows.plans import is_tuned, scheduler_options
from genkit.schedulers import Plan, Scheduler

if TYPE_CHECKING:
    from genkit.components import ModelInfo

START = 0.8  # the fraction of the timesteps that the base model denoises
# Options of the noise schedule that both must share: a timestep then is the same noise level for both
SCHEDULE = ("noise", "num_train_timesteps", "beta_start", "beta_end", "trained_betas", "zero_snr")


def check_refiner(model: ModelInfo, refiner: ModelInfo, start: float) -> ModelInfo:
    """Return the refiner without its VAE, which is not used. Raises InputError unless it can follow the model.

    start: the fraction of the timesteps at which it takes over, more than 0 and less than 1.
    """
    if not 0 < start < 1:
        raise InputError(f"--refiner-start: {start:g} is not more than 0 and less than 1")
    if not refiner.refines:
        raise InputError(f"--refiner: {refiner.name} is not SDXL's refiner, but a model of kind {refiner.kind}")
    g, own = model.geometry, refiner.geometry
    assert g is not None and own is not None
    if not g.sized or g.refines:
        kind = "is a refiner itself" if g.refines else "is not SDXL"
        raise InputError(f"--refiner: finishes pictures of SDXL, and {model.name} {kind}")
    if g.inpaints or g.guidance_width:
        lacks = "the mask" if g.inpaints else "the guidance scale"
        raise InputError(f"--refiner: does not read {lacks}, as {model.name} does")
    if (g.channels, g.scale) != (own.channels, own.scale):
        raise InputError(
            f"--refiner: {refiner.name} has latents of {own.channels} channels at 1/{own.scale}, {model.name} of "
            f"{g.channels} at 1/{g.scale}"
        )
    one, two = (Scheduler.from_config(info.scheduler_config) for info in (model, refiner))
    for name in SCHEDULE:
        if getattr(one, name) != getattr(two, name):
            raise InputError(
                f"--refiner: was trained on other noise: {name} {getattr(two, name)}, and {getattr(one, name)} of "
                f"{model.name}"
            )
    return dataclasses.replace(refiner, parts={name: part for name, part in refiner.parts.items() if name != "vae"})


def handover(plan: Plan, start: float, timesteps: int) -> int:
    """Return how many calls of a plan the base model makes if the refiner takes over at the fraction `start`."""
    return int((plan.timesteps >= round(timesteps - start * timesteps)).sum())


def refined_plan(
    plan: Plan, scheduler: Scheduler, value: str | dict[str, Any] | None, steps: int, start: float, prediction: str
) -> Plan:
    """Return a row's plan whose last calls are the refiner's; the solver restarts there, without history.

    plan: without the refiner. scheduler: of the base model. value: the row's `scheduler`. prediction: what the
    refiner's network predicts. Raises InputError if either network gets no step, and for solvers of several calls a
    step.
    """
    if is_tuned(value):
        raise InputError("scheduler: a tuned plan is made for one network, and the refiner is another")
    own = scheduler.with_options(**({} if value is None else scheduler_options(value)))
    at = handover(plan, start, scheduler.num_train_timesteps)
    if at in (0, plan.nfe):
        which = "the refiner" if at else "the model"
        raise InputError(
            f"num_inference_steps: of {plan.nfe} steps the refiner's start, {start:g}, leaves {which} none"
        )
    rest = plan.nfe - at
    if own.prediction != prediction:
        own = own.with_options(prediction=prediction)
    second = own.plan(steps, strength=(rest + 0.5) / steps)
    if plan.nfe > steps or second.nfe != rest or not np.array_equal(second.timesteps, plan.timesteps[at:]):
        raise InputError(
            f"scheduler: {own.solver} calls the network several times a step, which a refiner cannot split"
        )
    return Plan(
        np.concatenate([plan.table[:at], second.table]),
        np.concatenate([plan.alphas[:at], second.alphas]),
        np.concatenate([plan.sigmas[:at], second.sigmas]),
        plan.start,
        np.concatenate([plan.consumes_noise[:at], second.consumes_noise]),
    )
