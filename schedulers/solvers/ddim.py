"""One-step solvers of order 1: DDIM, DDPM, Euler and Euler ancestral."""

from __future__ import annotations

import math

from genkit.schedulers.solvers.rows import Row, SolverOptions, Trajectory
from genkit.schedulers.solvers.steps import euler_row, transfer


def ddim(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """x' = alpha' x0 + sqrt(sigma'^2 - z^2) eps + z noise, z = eta sigma' sqrt(1 - (s'/s)^2) (Song et al. 2021).

    A clip bounds x0 but leaves eps as it was predicted.
    """
    rows = []
    for here, to in trajectory.strides:
        direction, noise = transfer(here, to, options.eta)
        rows.append(Row(here, cx=direction, c0=to.alpha, cr=-here.alpha * direction, cn=noise))
    return rows


def euler(trajectory: Trajectory, options: SolverOptions, eta: float = 0.0) -> list[Row]:
    """x'/alpha' = x/alpha + (s' - s) eps (Karras et al. 2022): DDIM with eta 0, but a clip of x0 changes eps too.

    eta 1: Euler ancestral, a step to sigma_down and noise up to sigma' (k-diffusion).
    """
    return [euler_row(here, to, eta) for here, to in trajectory.strides]


def ddpm(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """The posterior of x' given x and x0 (Ho et al. 2020, equations 6 and 7) between any two levels.

    beta = sigma^2 - (alpha sigma'/alpha')^2; x' = (alpha/alpha') (sigma'/sigma)^2 x + alpha' beta/sigma^2 x0 + noise of
    variance beta (fixed_large) or beta (sigma'/sigma)^2 (fixed_small).
    """
    rows = []
    for i, (here, to) in enumerate(trajectory.strides):
        ratio, shrink = here.alpha / to.alpha, (to.sigma / here.sigma) ** 2
        beta = here.sigma**2 - (ratio * to.sigma) ** 2
        variance = {"fixed_small": beta * shrink, "fixed_large": beta}[options.variance]
        noiseless = here.t == 0 if options.noisy_last_step else i == trajectory.num_steps - 1
        noise = 0.0 if noiseless else math.sqrt(max(variance, 1e-20))
        rows.append(Row(here, cx=ratio * shrink, c0=to.alpha * beta / here.sigma**2, cn=noise))
    return rows
