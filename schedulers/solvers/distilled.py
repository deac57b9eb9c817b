"""Solvers for distilled networks: latent consistency models (LCM) and trajectory consistency distillation (TCD)."""

from __future__ import annotations

import math

import numpy as np

from genkit.schedulers.solvers.rows import Level, Row, SolverOptions, Trajectory


def lcm(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """x' = alpha' (c_out x0 + c_skip x) + sigma' noise, without noise in the last step (Luo et al. 2023, algorithm 3).

    c_skip = 0.5^2 / ((10 t)^2 + 0.5^2), c_out = 10 t / sqrt((10 t)^2 + 0.5^2): the consistency model at timestep t.
    """
    rows = []
    for i, (here, to) in enumerate(trajectory.steps):
        alpha, sigma = (to.alpha, to.sigma) if i < trajectory.num_steps - 1 else (1.0, 0.0)
        square = (10 * here.t) ** 2 + 0.25
        rows.append(Row(here, cx=alpha * 0.25 / square, c0=alpha * 10 * here.t / math.sqrt(square), cn=sigma))
    return rows


def tcd(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """DDIM's step to the timestep (1 - eta) t', then noise up to t' (Zheng et al. 2024, strategic stochastic sampling).

    x' = alpha'/alpha_s (alpha_s x0 + sigma_s eps) + sqrt(1 - (alpha'/alpha_s)^2) noise, s = floor((1 - eta) t').
    """
    rows = []
    for i, (here, to) in enumerate(trajectory.steps):
        last = i == trajectory.num_steps - 1
        t = 0.0 if last else math.floor((1 - options.eta) * to.t)
        middle = Level(*map(float, trajectory.noise.at(np.array(t)))) if options.eta or last else to
        up = 1.0 if last else to.alpha / middle.alpha
        direction = up * middle.sigma / here.sigma
        noise = math.sqrt(max(0.0, 1 - up**2))
        rows.append(Row(here, cx=direction, c0=up * middle.alpha - here.alpha * direction, cn=noise))
    return rows
