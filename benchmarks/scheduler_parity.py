"""genkit's schedulers beside the diffusers classes that they were read from: every network input of a trajectory.

    python benchmarks/scheduler_parity.py [CLASS ...]

For every class, option set, prediction, spacing and 10, 25 and 50 steps it prints the largest difference of the two
trajectories, relative to the largest value at that call, with a smooth nonlinear stand-in for the network, in float64;
or why diffusers is left alone there. tests/schedulers/test_parity.py runs the same cases.
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from genkit.schedulers import Plan, Scheduler, sample

STEPS = (10, 25, 50)
SHAPE = (2, 3, 4, 5)
PLACE = torch.linspace(0, 6, 60, dtype=torch.float64).view(3, 4, 5)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
Trajectory = list[tuple[float, torch.Tensor]]  # (timestep, network input) of every call, and (0, the end)
Case = tuple[str, dict[str, Any]]
Choices = list[dict[str, Any]]


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    """A smooth nonlinear stand-in, different at every place and time."""
    phase = torch.as_tensor(t, dtype=torch.float64).view(-1, 1, 1, 1) / 170
    return torch.tanh(0.8 * x + 0.5 * torch.sin(phase + PLACE)) + 0.3 * torch.cos(2 * PLACE - phase)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noises(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """Return what makes a step draw its noise from `generator` in double precision."""
    if scheduler.config.get("algorithm_type", "").startswith("sde") and "variance_noise" in arguments(scheduler):
        return {"variance_noise": torch.randn(SHAPE, generator=generator, dtype=torch.float64)}
    return {"generator": generator} if "generator" in arguments(scheduler) else {}


def arguments(scheduler: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = scheduler.step.__code__.co_varnames
    return names


def brownian(generator: torch.Generator) -> Callable[[Any, Any], torch.Tensor]:
    """DPMSolverSDEScheduler's noise: increments of one Brownian motion in sigma, over two halves of a step."""
    last: list[Any] = []

    def between(high: Any, low: Any) -> torch.Tensor:
        fresh = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        if not last:
            last[:] = [float(low), fresh]
            return fresh
        middle, first = last
        last.clear()
        share = (float(high) - middle) / (float(high) - float(low))
        return math.sqrt(share) * first + math.sqrt(1 - share) * fresh

    return between


def theirs(scheduler: Any, steps: int, strength: float = 1.0) -> Trajectory:
    """The loop of diffusers' pipelines, text-to-image or image-to-image."""
    scheduler.set_timesteps(steps, **({"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}))
    for name in (
        "alphas_cumprod",
        "final_alpha_cumprod",
        "sigmas",
    ):  # the same table, without rounding at every operation
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
    generator = torch.Generator().manual_seed(5)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = brownian(generator)
    calls: Trajectory = []
    for t in timesteps:
        given = scheduler.scale_model_input(x, t).double() if hasattr(scheduler, "scale_model_input") else x.double()
        calls.append((float(t), given))
        x = scheduler.step(network(given, t), t, x, **noises(scheduler, generator)).prev_sample
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
    # In diffusers' EDM and variance-exploding scales x itself grows with sigma; the network's input does not
    return max(float((x - y).abs().max() / y.abs().max()) for (_, x), (_, y) in zip(a, b, strict=True))


def key(name: str, *values: Any) -> Choices:
    return [{name: value} for value in values]


def product(name: str, common: dict[str, Any], *axes: Choices) -> list[Case]:
    """All combinations of some choices, as configs of a class."""
    return [(name, {**common, **{k: v for c in choice for k, v in c.items()}}) for choice in itertools.product(*axes)]


SPACING = key("timestep_spacing", "leading", "trailing", "linspace")
PREDICTION = key("prediction_type", "epsilon", "v_prediction")
ALL_PREDICTIONS = key("prediction_type", "epsilon", "v_prediction", "sample")
OFFSET = key("steps_offset", 0, 1)
SIGMAS: Choices = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
LU: Choices = [*SIGMAS, {"use_lu_lambdas": True}]
MIN: Choices = [{"final_sigmas_type": "sigma_min"}]
MULTI, SINGLE, UNIPC = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
CASES: list[Case] = [
    *product("DDIMScheduler", {}, SPACING, ALL_PREDICTIONS),
    *product("DDIMScheduler", {**SD, "clip_sample": False}, SPACING, key("set_alpha_to_one", True, False), OFFSET),
    *product("DDIMScheduler", {**ZERO, "clip_sample": False}, SPACING),
    *product("DDIMScheduler", {**COSINE, "clip_sample_range": 0.7}, PREDICTION),
    *product("DDIMScheduler", {"thresholding": True, "sample_max_value": 1.5}, PREDICTION),
    *product("DDIMParallelScheduler", {}, PREDICTION),
    *product("DDPMScheduler", {}, SPACING, ALL_PREDICTIONS),
    *product("DDPMScheduler", COSINE, key("variance_type", "fixed_small", "fixed_large", "fixed_small_log"), SPACING),
    *product("DDPMScheduler", {**ZERO, "clip_sample": False}, SPACING),
    *product("DDPMScheduler", {"beta_schedule": "sigmoid"}, PREDICTION),
    *product("DDPMScheduler", {"thresholding": True, "sample_max_value": 2.0}, PREDICTION),
    *product("DDPMParallelScheduler", {}, PREDICTION),
    *product("PNDMScheduler", {**SD, "skip_prk_steps": True}, SPACING[:1], OFFSET),
    *product("EulerDiscreteScheduler", SD, SPACING, ALL_PREDICTIONS, SIGMAS),
    *product("EulerDiscreteScheduler", {**SD, "final_sigmas_type": "sigma_min"}, SPACING),
    *product("EulerDiscreteScheduler", ZERO, SPACING, SIGMAS[:2]),
    *product("EulerAncestralDiscreteScheduler", SD, SPACING, PREDICTION),
    *product("EulerAncestralDiscreteScheduler", ZERO, SPACING),
    *product("HeunDiscreteScheduler", SD, SPACING, ALL_PREDICTIONS, SIGMAS),
    *product("HeunDiscreteScheduler", {"beta_schedule": "linear", "clip_sample": True}, SPACING),
    *product("LMSDiscreteScheduler", SD, SPACING, ALL_PREDICTIONS, SIGMAS),
    *product("KDPM2DiscreteScheduler", SD, SPACING, PREDICTION, SIGMAS),
    *product("KDPM2AncestralDiscreteScheduler", SD, SPACING, PREDICTION, SIGMAS),
    *product("DPMSolverSDEScheduler", SD, SPACING, PREDICTION, SIGMAS),
    *product(MULTI, SD, SPACING, ALL_PREDICTIONS, key("algorithm_type", "dpmsolver++", "sde-dpmsolver++"), LU),
    *product(MULTI, {**SD, "algorithm_type": "dpmsolver++"}, key("solver_order", 1, 2, 3),
             key("lower_order_final", False, True), key("euler_at_final", False, True),
             key("final_sigmas_type", "sigma_min", "zero"), key("solver_type", "midpoint", "heun")),
    *product(MULTI, {**SD, "solver_type": "heun"}, key("algorithm_type", "sde-dpmsolver++"), LU),
    *product(MULTI, {**SD, **MIN[0]}, key("algorithm_type", "dpmsolver", "sde-dpmsolver"), key("solver_order", 1, 2),
             key("solver_type", "midpoint", "heun"), SIGMAS[:2]),
    *product(MULTI, {**SD, **MIN[0], "algorithm_type": "dpmsolver", "solver_order": 3}, ALL_PREDICTIONS, SIGMAS[:2]),
    *product(MULTI, {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}, SIGMAS[:2]),
    *product(MULTI, {**SD, "thresholding": True, "sample_max_value": 2.0}, key("solver_order", 2, 3), PREDICTION),
    *product(MULTI, ZERO, SPACING, key("solver_order", 2, 3), SIGMAS[:2]),
    *product(MULTI, COSINE, PREDICTION, [{}, {"use_karras_sigmas": True}]),
    *product(MULTI, FLOW, key("flow_shift", 1.0, 3.0), key("solver_order", 1, 2, 3)),
    *product(SINGLE, SD, key("solver_order", 1, 2, 3), key("solver_type", "midpoint", "heun"), PREDICTION, SIGMAS),
    *product(SINGLE, SD, key("solver_order", 1, 2, 3), key("lower_order_final", False, True), MIN),
    *product(SINGLE, {**SD, **MIN[0], "algorithm_type": "dpmsolver"}, key("solver_order", 2, 3),
             key("solver_type", "midpoint", "heun")),
    *product(SINGLE, {**SD, "algorithm_type": "sde-dpmsolver++"}, key("solver_type", "midpoint", "heun"), SIGMAS),
    *product(SINGLE, FLOW, key("flow_shift", 1.0, 3.0), key("solver_order", 2, 3)),
    *product("DEISMultistepScheduler", SD, key("solver_order", 1, 2, 3), SPACING, ALL_PREDICTIONS),
    *product("DEISMultistepScheduler", SD, key("solver_order", 2, 3), SIGMAS[1:]),
    *product("DEISMultistepScheduler", FLOW, key("flow_shift", 3.0)),
    *product(UNIPC, SD, key("solver_order", 1, 2, 3), key("solver_type", "bh1", "bh2"), SPACING, SIGMAS, MIN),
    *product(UNIPC, SD, key("solver_order", 1, 2, 3), ALL_PREDICTIONS, SIGMAS[:2]),
    *product(UNIPC, {**SD, "predict_x0": False, **MIN[0]}, key("solver_order", 1, 2, 3),
             key("solver_type", "bh1", "bh2")),
    *product(UNIPC, {**SD, "lower_order_final": False, **MIN[0]}, key("solver_order", 2, 3)),
    *product(UNIPC, {**SD, "solver_type": "bh1"}, key("solver_order", 2)),
    *product(UNIPC, ZERO, SPACING, key("solver_order", 2, 3), SIGMAS[:2]),
    *product(UNIPC, FLOW, key("flow_shift", 1.0, 3.0), key("solver_order", 2, 3)),
    *product("SASolverScheduler", SD, SPACING, ALL_PREDICTIONS),
    *product("SASolverScheduler", SD, key("predictor_order", 1, 2, 3), key("corrector_order", 1, 2, 3, 4), SIGMAS[:2]),
    *product("LCMScheduler", {}, ALL_PREDICTIONS, key("original_inference_steps", 50, 100)),
    *product("TCDScheduler", {}, ALL_PREDICTIONS, key("original_inference_steps", 50, 100)),
    *product("EDMEulerScheduler", {}, PREDICTION, key("sigma_schedule", "karras", "exponential"),
             key("final_sigmas_type", "zero", "sigma_min")),
    *product("EDMDPMSolverMultistepScheduler", {}, PREDICTION, key("sigma_schedule", "karras", "exponential"),
             key("solver_order", 1, 2, 3), key("solver_type", "midpoint", "heun")),
    *product("FlowMatchEulerDiscreteScheduler", {}, key("shift", 1.0, 3.0, 6.5)),
    *product("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True},
             key("time_shift_type", "exponential", "linear")),
    *product("FlowMatchHeunDiscreteScheduler", {}, key("shift", 1.0, 3.0)),
]  # fmt: skip


# Where diffusers is left alone, and why: (class, options that are among the case's, reason).
DIFFERENT: list[tuple[str, dict[str, Any], str]] = [
    (MULTI, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
     "diffusers subtracts 1/2 where the integral adds it (k-diffusion has it right): it gets worse with more steps"),
    (MULTI, {**COSINE, "use_karras_sigmas": True},
     "diffusers cuts timesteps to whole ones here: the network is told 998 at the level of 999"),
    ("DEISMultistepScheduler", {"use_flow_sigmas": True},
     "diffusers repeats the last level instead of stepping to the picture: noise of 0.1 to 0.25 stays in it"),
    (UNIPC, {"solver_type": "bh1", "final_sigmas_type": "zero"},
     "diffusers multiplies infinity by 0 in the last step: every picture is NaN"),
]  # fmt: skip


def reason(case: Case) -> str | None:
    """Return why diffusers is not to be matched in a case, None where it is."""
    name, options = case
    for wanted, marks, why in DIFFERENT:
        if wanted == name and marks.items() <= {"final_sigmas_type": "zero", **options}.items():
            return why
    return None


def compare(case: Case, steps: int, strength: float = 1.0) -> float:
    """Return the gap of genkit's trajectory and the class's own, NaN where the latter cannot be followed."""
    import diffusers

    name, options = case
    plan = Scheduler.from_config({"_class_name": name, **options}).plan(steps, strength)
    return gap(ours(plan), theirs(getattr(diffusers, name)(**options), steps, strength))


def label(case: Case) -> str:
    name, options = case
    words = [f"{k.removeprefix('use_').removesuffix('_type')}={v}" for k, v in options.items() if k not in SD]
    return " ".join([name.removesuffix("Scheduler"), *words]).replace("=True", "")


def main(wanted: Iterable[str] = ()) -> None:
    import diffusers

    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    cases = [c for c in CASES if not wanted or any(w.lower() in c[0].lower() for w in wanted)]
    print(f"{'relative difference at steps':100} " + " ".join(f"{n:>7}" for n in STEPS))
    worst, equal = 0.0, 0
    for case in cases:
        why = reason(case)
        if why:
            print(f"{label(case):100} {why}")
            continue
        found = [compare(case, n) for n in STEPS]
        worst, equal = max(worst, *found), equal + 1
        print(f"{label(case):100} " + " ".join(f"{v:7.0e}" for v in found))
    print(f"{equal} of {len(cases)} option sets at {len(STEPS)} step counts: at most {worst:.1e} apart; "
          f"{len(cases) - equal} where diffusers is left alone")  # fmt: skip
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, float64")


if __name__ == "__main__":
    main(sys.argv[1:])
