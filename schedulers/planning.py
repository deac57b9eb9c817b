"""From options to a plan: the noise schedule, the trajectory of noise levels on it, and the solver's rows."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from genkit.errors import InputError
from genkit.schedulers import noise as noises
from genkit.schedulers.noise import BETAS, Levels, Noise
from genkit.schedulers.options import Options, check_number
from genkit.schedulers.plan import Plan, plan_from_rows
from genkit.schedulers.solvers import SOLVERS, Level, SolverOptions, Trajectory
from genkit.schedulers.spacing import IN_T, Grid, levels


def least_strength(steps: int) -> float:
    """Return the least strength that leaves one of `steps`, rounded up to 4 digits."""
    return math.ceil(1e4 / steps) / 1e4


def make_plan(options: Options, num_inference_steps: int | None, strength: float, tokens: int | None) -> Plan:
    """Return the plan of `Scheduler.plan`."""
    given = options.timesteps or options.sigmas
    n = num_inference_steps if num_inference_steps is not None else len(given or ())
    check_number("num_inference_steps", n, int, 1, options.num_train_timesteps)
    if given and n != len(given):
        raise InputError(f"num_inference_steps: {n}, and {len(given)} {options.spacing} are given")
    if not 0 < strength <= 1:
        raise InputError(f"strength: {strength} is not above 0 and at most 1")
    skip = n - int(n * strength)
    if skip == n:
        raise InputError(f"strength: {strength} of {n} steps leaves none; the least is {least_strength(n):g}")
    trajectory = _trajectory(options, n, skip, tokens)
    first = trajectory.levels[0]
    if options.prediction == "epsilon" and first.alpha == 0:
        raise InputError("prediction: epsilon says nothing about the picture at pure noise (zero_snr, or flow)")
    rows = SOLVERS[options.solver].rows(trajectory, _solver_options(options))
    start = (first.alpha, first.sigma) if strength < 1 else (0.0, _noise_scale(options, first))
    return plan_from_rows(rows, trajectory.levels[-1], options.prediction, start, options.clip, options.threshold)


def noise_schedule(options: Options, tokens: int | None = None) -> Noise:
    """Return the noise schedule of the options; tokens: of the image, for dynamic_shift."""
    n = options.num_train_timesteps
    if options.noise == "edm":
        return noises.edm(n, options.sigma_min, options.sigma_max)
    if options.noise == "flow":
        return noises.flow(n, _shift(options, tokens))
    formula = BETAS[options.noise](n, options.beta_start, options.beta_end)
    betas = formula if options.trained_betas is None else np.array(options.trained_betas)
    alpha_bar = np.cumprod(1 - betas)
    style = options.conventions
    if style.float32_schedule:  # the table that networks are trained with
        alpha_bar = np.cumprod(1 - betas.astype(np.float32), dtype=float).astype(np.float32)
    if options.zero_snr:
        alpha_bar = noises.zero_terminal_snr(alpha_bar)
        alpha_bar[-1] = style.min_alpha_bar
    return noises.from_alpha_bar(alpha_bar.astype(float), linear_sigma=style.float32_schedule)


def _shift(options: Options, tokens: int | None) -> float:
    """Flow's shift: `shift`, or from the image's number of tokens (Esser et al. 2024, section 5.3.2)."""
    if options.dynamic_shift is None:
        return options.shift
    base, most, few, many, kind = options.dynamic_shift
    mu = base + ((few if tokens is None else tokens) - few) * (most - base) / (many - few)
    return math.exp(mu) if kind == "exponential" else mu


def _trajectory(options: Options, n: int, skip: int, tokens: int | None) -> Trajectory:
    """Return the levels of n steps without the first `skip` of them, and the end."""
    style, noise, train = options.conventions, noise_schedule(options, tokens), options.num_train_timesteps
    given, grid = options.timesteps or options.sigmas or (), _grid(options, n, noise)
    table = _levels(noise.table)
    least = Level(table[0].t, 1.0, table[0].ve_sigma) if style.final_alpha_one else table[0]
    end = Level(0.0, 1.0, 0.0) if options.final == "zero" else least
    calls = _levels(levels(options.spacing, grid, noise))
    if math.isclose(calls[-1].ve_sigma, end.ve_sigma) and n < train and not style.idle_last_call and not given:
        calls = _levels(levels(options.spacing, dataclasses.replace(grid, steps=n + 1), noise))[:n]
    if style.flow_min_alpha and calls[0].alpha < style.flow_min_alpha:
        calls[0] = Level(train - 1, style.flow_min_alpha, 1 - style.flow_min_alpha)
    targets = [*calls[1:], end]
    if style.fixed_stride and options.spacing in IN_T and not given:
        strides = [int(level.t) - train // n for level in calls]
        targets = [table[t] if t >= 0 else end for t in strides]
    return Trajectory((*calls[skip:], end), tuple(targets[skip:]), n, noise)


def _grid(options: Options, n: int, noise: Noise) -> Grid:
    style, train, flow = options.conventions, options.num_train_timesteps, options.noise == "flow"
    low, high = map(float, (style.flow_ends or (0, 0)) if flow else (0, 0))
    if flow and style.flow_ends is None and options.dynamic_shift is None:
        low = train * float(noise.table.sigma[0]) - 1
    sigma_range = options.ends if style.sigma_range_from_ends and options.spacing not in IN_T else None
    given = tuple(options.timesteps or options.sigmas or ())
    return Grid(
        n, train, style, flow, options.steps_offset, low, high, sigma_range, options.original_inference_steps, given
    )


def _solver_options(options: Options) -> SolverOptions:
    style = options.conventions
    return SolverOptions(
        order=options.order_or_default, eta=options.eta, variance=options.variance, solver_type=options.solver_type,
        corrector=options.corrector, corrector_order=options.corrector_order, tau=options.tau,
        predict_eps=options.predict_eps, lower_order_final=options.lower_order_final,
        euler_at_final=options.euler_at_final, flow=options.noise == "flow", noisy_last_step=style.noisy_last_step,
        halved_second_moment=style.halved_second_moment,
    )  # fmt: skip


def _noise_scale(options: Options, first: Level) -> float:
    """The scale of the initial noise: in diffusers' Euler family sigma_max, or sqrt(sigma_max^2 + 1) for leading."""
    if options.noise == "edm":
        return math.hypot(first.sigma, 1)
    spacing = options.spacing if options.spacing in IN_T else options.ends
    return 1.0 if options.conventions.unit_start or spacing == "leading" else first.sigma


def _levels(arrays: Levels) -> list[Level]:
    return [Level(*map(float, level)) for level in zip(*arrays, strict=True)]
