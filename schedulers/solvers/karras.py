"""Solvers of the probability flow ODE with two calls a step: Heun, DPM2 and DPM2 ancestral (Karras et al. 2022)."""

from __future__ import annotations

import math

from genkit.schedulers.solvers.rows import Level, Row, SolverOptions, Step, Trajectory
from genkit.schedulers.solvers.steps import euler_row, stages


def heun(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """x'/alpha' = x/alpha + (s' - s) (eps + eps') / 2 (Karras et al. 2022, algorithm 1).

    For flow x' = x + (sigma' - sigma) (v + v') / 2 with v = (x - x0) / sigma. Steps to sigma 0, and from pure noise
    where s is infinite, are Euler's.
    """
    rows = []
    for here, to in trajectory.steps:
        if not to.sigma or not (here.alpha or options.flow):
            rows.append(euler_row(here, to))
        elif options.flow:
            a, b = (to.sigma - here.sigma) / here.sigma, (to.sigma - here.sigma) / to.sigma
            whole = Step(1 + a, (-b / 2, -a / 2 * (1 + b)))
            rows += stages([here, to], [Step(1 + a, (-a,)), whole], eps=False)
        else:
            rows += stages([here, to], [_eps_step(here, to, 1), _eps_step(here, to, 0.5, 0.5)], eps=True)
    return rows


def dpm2(trajectory: Trajectory, options: SolverOptions, eta: float = 0.0) -> list[Row]:
    """x'/alpha' = x/alpha + (s' - s) eps, eps at sqrt(s s') after Euler's step there (Karras et al. 2022, alg. 2).

    eta 1: to sigma_down, then noise up to sigma' (k-diffusion's sample_dpm_2_ancestral).
    """
    rows = []
    for here, to in trajectory.steps:
        if not here.alpha or not to.ve_sigma:
            rows.append(euler_row(here, to))
            continue
        noise = eta * to.sigma * math.sqrt(max(0.0, 1 - (to.ve_sigma / here.ve_sigma) ** 2))
        down = Level(to.t, to.alpha, math.sqrt(to.sigma**2 - noise**2))
        middle = trajectory.at_ve_sigma(math.sqrt(here.ve_sigma * (down.ve_sigma or to.ve_sigma)))
        last = _eps_step(here, down, 1, 0)._replace(cn=noise)
        rows += stages([here, middle], [_eps_step(here, middle, 1), last], eps=True)
    return rows


def _eps_step(here: Level, to: Level, *shares: float) -> Step:
    """Return Euler's step along a weighted mean of eps, newest call first."""
    gain = to.sigma - to.alpha / here.alpha * here.sigma
    return Step(to.alpha / here.alpha, tuple(gain * share for share in shares))
