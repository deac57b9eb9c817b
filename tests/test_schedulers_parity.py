"""Scheduler.from_config against the diffusers classes themselves: every network input of a trajectory, and its end."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch

from genkit.schedulers import Plan, Scheduler, sample
from genkit.schedulers.diffusers_config import DIFFUSERS

SHAPE = (2, 3, 4, 5)
PLACE = torch.linspace(0, 6, 60, dtype=torch.float64).view(3, 4, 5)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Trajectory = list[tuple[float, torch.Tensor]]  # (timestep, network input) of every call, and (0, the end)


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    """A smooth nonlinear stand-in, different at every place and time."""
    phase = torch.as_tensor(t, dtype=torch.float64).view(-1, 1, 1, 1) / 170
    return torch.tanh(0.8 * x + 0.5 * torch.sin(phase + PLACE)) + 0.3 * torch.cos(2 * PLACE - phase)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(scheduler: Any, steps: int, strength: float = 1.0) -> Trajectory:
    """The loop of diffusers' pipelines, text-to-image or image-to-image."""
    scheduler.set_timesteps(steps)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):  # the same table, without rounding at every operation
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    begin = (steps - min(int(steps * strength), steps)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    timesteps = scheduler.timesteps[begin:]
    x = draw(0) * getattr(scheduler, "init_noise_sigma", 1.0)
    if strength < 1:
        first = timesteps[:1].repeat(2)
        flow = hasattr(scheduler, "scale_noise")
        x = scheduler.scale_noise(draw(1), first, draw(0)) if flow else scheduler.add_noise(draw(1), draw(0), first)
    takes, generator = scheduler.step.__code__.co_varnames, torch.Generator().manual_seed(5)
    calls: Trajectory = []
    for t in timesteps:
        given = scheduler.scale_model_input(x, t).double() if hasattr(scheduler, "scale_model_input") else x.double()
        calls.append((float(t), given))
        random: dict[str, Any] = {"generator": generator} if "generator" in takes else {}
        if "variance_noise" in takes and scheduler.config.get("algorithm_type", "").startswith("sde"):
            # its own noise is in single precision whatever the network's
            random = {"variance_noise": torch.randn(SHAPE, generator=generator, dtype=torch.float64)}
        x = scheduler.step(network(given, t), t, x, **random).prev_sample
    return [*calls, (0.0, x.double())]


def ours(plan: Plan) -> Trajectory:
    calls: Trajectory = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append((float(t[0]), x))
        return network(x, t)

    end = sample(model, draw(0), plan, generator=torch.Generator().manual_seed(5), x0=draw(1))
    return [*calls, (0.0, end)]


def gap(a: Trajectory, b: Trajectory) -> float:
    """The largest difference of two trajectories at any call, relative to the largest value there."""
    assert len(a) == len(b)
    told = [(s, t) for (s, _), (t, _) in zip(a, b, strict=True) if abs(s - t) > 1e-2]
    assert not told, f"told other timesteps: {told}"
    return max(float((x - y).abs().max() / y.abs().max()) for (_, x), (_, y) in zip(a, b, strict=True))


Choices = list[dict[str, Any]]


def key(name: str, *values: Any) -> Choices:
    return [{name: value} for value in values]


def product(name: str, common: dict[str, Any], *axes: Choices) -> list[tuple[str, dict[str, Any]]]:
    """All combinations of some choices, as configs of a class."""
    return [(name, {**common, **{k: v for c in choice for k, v in c.items()}}) for choice in itertools.product(*axes)]


SPACING = key("timestep_spacing", "leading", "trailing", "linspace")
PREDICTION = key("prediction_type", "epsilon", "v_prediction")
ALL_PREDICTIONS = key("prediction_type", "epsilon", "v_prediction", "sample")
OFFSET = key("steps_offset", 0, 1)
KARRAS = key("use_karras_sigmas", False, True)
ZERO = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
DPM = "DPMSolverMultistepScheduler"
CONFIGS = [
    *product("DDIMScheduler", {}, SPACING, ALL_PREDICTIONS),
    *product("DDIMScheduler", {**SD, "clip_sample": False}, SPACING, key("set_alpha_to_one", True, False), OFFSET),
    *product("DDIMScheduler", {**ZERO, "clip_sample": False}, SPACING),
    *product("DDIMScheduler", {**COSINE, "clip_sample_range": 0.7}, PREDICTION),
    *product("DDPMScheduler", {}, SPACING, ALL_PREDICTIONS),
    *product("DDPMScheduler", COSINE, key("variance_type", "fixed_small", "fixed_large", "fixed_small_log"), SPACING),
    *product("DDPMScheduler", {**ZERO, "clip_sample": False}, SPACING),
    *product("PNDMScheduler", {**SD, "skip_prk_steps": True}, SPACING[:1], OFFSET),
    *product("EulerDiscreteScheduler", SD, SPACING, ALL_PREDICTIONS, KARRAS),
    *product("EulerDiscreteScheduler", {**SD, "final_sigmas_type": "sigma_min"}, SPACING),
    *product("EulerDiscreteScheduler", ZERO, SPACING, KARRAS),
    *product("EulerAncestralDiscreteScheduler", SD, SPACING, PREDICTION),
    *product("EulerAncestralDiscreteScheduler", ZERO, SPACING),
    *product("HeunDiscreteScheduler", SD, SPACING, ALL_PREDICTIONS, KARRAS),
    *product("HeunDiscreteScheduler", {"beta_schedule": "linear", "clip_sample": True}, SPACING),
    *product(DPM, SD, SPACING, ALL_PREDICTIONS, key("algorithm_type", "dpmsolver++", "sde-dpmsolver++"), KARRAS),
    *product(DPM, SD, key("solver_order", 1, 2), key("lower_order_final", False, True),
             key("euler_at_final", False, True), key("final_sigmas_type", "sigma_min", "zero")),
    *product(DPM, ZERO, SPACING, KARRAS),
    *product(DPM, COSINE, PREDICTION),  # theirs cuts Karras' timesteps here: x at 999 is told 998
    *product("FlowMatchEulerDiscreteScheduler", {}, key("shift", 1.0, 3.0, 6.5)),
]  # fmt: skip


def name_of(config: Any) -> str:
    return "-".join([config[0].replace("Scheduler", ""), *(f"{k}={v}" for k, v in config[1].items() if k not in SD)])


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_from_config_equals_the_class(config: tuple[str, dict[str, Any]]) -> None:
    name, options = config
    scheduler = Scheduler.from_config({"_class_name": name, **options})
    # Where diffusers' PNDM is left alone: image-to-image tells the network a level that x is not at; other spacings
    # repeat the first step from a level that x is not at; v is extrapolated as if it did not turn, which is of first
    # order
    strengths = (1.0,) if name == "PNDMScheduler" else (1.0, 0.3, 0.6)
    found = {
        (steps, strength): gap(
            ours(scheduler.plan(steps, strength)), theirs(getattr(diffusers, name)(**options), steps, strength)
        )
        for steps, strength in itertools.product((10, 15, 25, 50), strengths)
    }
    # Euler ancestral's sigma_down is the root of a difference of two squares, in single precision
    assert max(found.values()) <= (2e-5 if name == "EulerAncestralDiscreteScheduler" else 1e-5), found


def test_another_solver_on_a_folder_is_what_diffusers_makes_of_it() -> None:
    """Other.from_config(old.config) keeps what the folder states and takes the new class's default for the rest."""
    stable_diffusion_1 = {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **SD, "num_train_timesteps": 1000,
        "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None,
    }  # fmt: skip
    xl = {
        "_class_name": "EulerDiscreteScheduler", **SD, "clip_sample": False, "interpolation_type": "linear",
        "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
    }  # fmt: skip
    emoji = {
        "_class_name": "DDIMScheduler", **ZERO, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1,
        "thresholding": False, "dynamic_thresholding_ratio": 0.995, "timestep_spacing": "trailing",
    }  # fmt: skip
    pixels = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "clip_sample": True}
    for config, solver in itertools.product((stable_diffusion_1, xl, emoji, pixels), DIFFUSERS):
        if config is emoji and solver in ("heun", "pndm"):
            continue  # diffusers' have no zero SNR and would ask a network of another noise schedule
        name, keys = DIFFUSERS[solver]
        old = getattr(diffusers, str(config["_class_name"])).from_config(config)
        new = getattr(diffusers, name).from_config({**old.config, **keys})
        plan = Scheduler.from_config(config).with_options(solver=solver).plan(20)
        assert gap(ours(plan), theirs(new, 20)) <= 1e-5, (config["_class_name"], solver)


def test_options_chosen_before_a_swap_stay_when_the_new_solver_has_them() -> None:
    base = Scheduler.from_config({"_class_name": "DDIMScheduler", **SD})
    swapped = base.with_options(spacing="karras", eta=0.5, clip=3.0).with_options(solver="heun")
    assert (swapped.spacing, swapped.eta, swapped.clip, swapped.style) == ("karras", 0.0, 3.0, "euler")
    assert swapped.with_options(solver="ddim").clip == 3.0
