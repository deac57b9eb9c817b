"""Every diffusers scheduler that `from_config` reads, step for step, with a smooth nonlinear network in float64."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch

from genkit.schedulers import Plan, Scheduler, sample

SHAPE = (2, 3, 4, 4)
CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
]
NO_ZERO_SNR = ("HeunDiscreteScheduler",)
# The Euler family computes in sigma / alpha, in single precision: at cosine's noise end, some 20,000, that keeps few
# digits of x0. DPM-Solver's Karras timesteps are cut to whole numbers for cosine, where for other noise they are rounded.
NO_COSINE = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    s = t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000
    return 0.8 * torch.tanh(1.3 * x + s) + 0.1 * s * torch.sin(3 * x)


def noise_and_generator() -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64), generator


def theirs(config: dict[str, Any], steps: int, strength: float) -> list[torch.Tensor]:
    """The trajectory of the diffusers class, as its pipelines run it, in its own scale."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    noise, generator = noise_and_generator()
    timesteps, x = scheduler.timesteps, noise * getattr(scheduler, "init_noise_sigma", 1.0)
    if strength < 1:
        begin = (steps - min(int(steps * strength), steps)) * scheduler.order
        timesteps = timesteps[begin:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x = scheduler.add_noise(torch.full_like(noise, 0.3), noise, timesteps[:1])
    path = []
    for t in timesteps:
        output = model(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t[None])
        extra: dict[str, Any] = {}
        if config.get("algorithm_type") == "sde-dpmsolver++":  # draws in single precision of its own accord
            extra["variance_noise"] = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        elif "generator" in scheduler.step.__code__.co_varnames:
            extra["generator"] = generator
        x = scheduler.step(output, t, x, **extra).prev_sample
        path.append(x)
    return path


def ours(plan: Plan, strength: float) -> list[torch.Tensor]:
    """The samples that the network was called with, in the same order, and the last one."""
    seen: list[torch.Tensor] = []

    def watched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return model(x, t)

    noise, generator = noise_and_generator()
    x0 = None if strength == 1 else torch.full_like(noise, 0.3)
    last = sample(watched, noise, plan, generator, x0)
    return [*seen[1:], last]


def cases() -> list[Any]:
    found = []
    for (name, extra), spacing, prediction, steps in itertools.product(
        CLASSES, ("leading", "trailing", "linspace"), ("epsilon", "v_prediction", "sample"), (10, 15, 25, 50)
    ):
        cosine = name not in NO_COSINE and not extra.get("use_karras_sigmas")
        noise = "linear" if steps == 25 else "squaredcos_cap_v2" if steps == 50 and cosine else "scaled_linear"
        if name == "EulerAncestralDiscreteScheduler" and prediction == "sample":
            continue  # they have none
        config = {
            "_class_name": name, "beta_schedule": noise, "beta_start": 0.00085, "beta_end": 0.012,
            "prediction_type": prediction, "timestep_spacing": spacing, **extra,
        }  # fmt: skip
        if prediction != "epsilon" and steps < 25 and name not in NO_ZERO_SNR:
            config["rescale_betas_zero_snr"] = True
        found.append(pytest.param(config, steps, 1.0, id=f"{name}-{extra}-{spacing}-{prediction}-{noise}-{steps}"))
        if steps == 15 and prediction == "epsilon":
            found += [pytest.param(config, steps, s, id=f"{name}-{extra}-{spacing}-from-{s}") for s in (0.3, 0.6)]
    for shift, steps in itertools.product((1.0, 3.0), (10, 25, 50)):
        config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
        found.append(pytest.param(config, steps, 1.0, id=f"flow-shift-{shift}-{steps}"))
    for steps in (10, 15, 25, 50):  # Stable Diffusion 1's config
        config = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                  "beta_end": 0.012, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
        found.append(pytest.param(config, steps, 1.0, id=f"PNDM-{steps}"))
    return found


@pytest.mark.parametrize(("config", "steps", "strength"), cases())
def test_same_samples_as_diffusers(config: dict[str, Any], steps: int, strength: float) -> None:
    expected = theirs(config, steps, strength)
    found = ours(Scheduler.from_config(config).plan(steps, strength), strength)
    assert len(found) == len(expected)
    if config["_class_name"] in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"):
        found, expected = found[-1:], expected[-1:]  # on the way theirs are scaled by 1 / alpha
    # Their coefficients are in single precision, which shows at the noise end of cosine, where alpha^2 is 2e-9
    bound = 5e-5 if config.get("beta_schedule") == "squaredcos_cap_v2" else 1e-5
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= bound * max(1.0, float(b.abs().max()))


def test_there_are_at_least_150_combinations() -> None:
    assert len(cases()) >= 150


@pytest.mark.parametrize("config", [{"_class_name": n, **e} for n, e in CLASSES], ids=str)
def test_config_round_trips(config: dict[str, Any]) -> None:
    scheduler = Scheduler.from_config(config)
    written = scheduler.to_config()
    assert Scheduler.from_config(written) == scheduler
    getattr(diffusers, written.pop("_class_name"))(**written)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_another_solver_on_a_config_is_what_diffusers_makes_of_it(name: str) -> None:
    base = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
            "clip_sample": False}  # fmt: skip
    config = dict(getattr(diffusers, name).from_config(base).config)
    config = {"_class_name": name, **{k: v for k, v in config.items() if k in own_keys(name)}}
    solver = {"EulerDiscreteScheduler": "euler", "DPMSolverMultistepScheduler": "dpmpp_2m"}[name]
    found = ours(Scheduler.from_config(base).with_options(solver=solver).plan(20), 1.0)
    assert (found[-1] - theirs(config, 20, 1.0)[-1]).abs().max() <= 1e-5


def own_keys(name: str) -> set[str]:
    import inspect

    return set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
