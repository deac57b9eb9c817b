"""Solvers that read the current prediction alone: ddim, euler, euler_ancestral, ddpm."""

from __future__ import annotations

import math

from genkit.schedulers.solvers.rows import Path, Point, Row, SolverOptions


def transfer(here: Point, to: Point, eta: float) -> tuple[float, float]:
    """Return (direction, noise) of x' = alpha' x0 + direction (x - alpha x0) + noise * unit noise.

    noise = eta sigma' sqrt(1 - (k'/k)^2), direction = sqrt(sigma'^2 - noise^2) / sigma: Song et al. 2021, equations
    12 and 16, in a form that holds for any alpha and sigma.
    """
    fresh = eta**2 * max(0.0, 1 - (to.k / here.k) ** 2)  # share of the new variance that is drawn anew
    return to.sigma / here.sigma * math.sqrt(1 - fresh), to.sigma * math.sqrt(fresh)


def ddim(path: Path, s: SolverOptions) -> list[Row]:
    """x' = alpha' x0 + sqrt(sigma'^2 - z^2) eps + z noise, z = eta sigma' sqrt(1 - (k'/k)^2) (Song et al. 2021).

    A clip bounds x0 and leaves eps as it was predicted.
    """
    steps = [(here, to, *transfer(here, to, s.eta)) for here, to in zip(path.points, path.targets, strict=False)]
    return [Row(here, cx=turn, c0=to.alpha, cr=-here.alpha * turn, cn=noise) for here, to, turn, noise in steps]


def euler_row(here: Point, to: Point, eta: float = 0.0) -> Row:
    direction, noise = transfer(here, to, eta)
    return Row(here, cx=direction, c0=to.alpha - here.alpha * direction, cn=noise)


def euler(path: Path, s: SolverOptions) -> list[Row]:
    """x'/alpha' = x/alpha + (k' - k) eps: DDIM without noise, but a clip changes eps with x0 (Karras et al. 2022)."""
    return [euler_row(here, to) for here, to in zip(path.points, path.targets, strict=False)]


def euler_ancestral(path: Path, s: SolverOptions) -> list[Row]:
    """Euler's step to less noise than wanted, then noise up to it (k-diffusion): DDIM with eta 1."""
    return [euler_row(here, to, eta=1.0) for here, to in zip(path.points, path.targets, strict=False)]


def ddpm(path: Path, s: SolverOptions) -> list[Row]:
    """The posterior of x' given x and x0 (Ho et al. 2020, equations 6 and 7) between any two levels.

    beta = sigma^2 - (alpha sigma'/alpha')^2; x' = (alpha/alpha') (sigma'/sigma)^2 x + alpha' beta/sigma^2 x0 + noise of
    variance beta (fixed_large) or beta (sigma'/sigma)^2 (fixed_small).
    """
    rows = []
    for i, (here, to) in enumerate(zip(path.points, path.targets, strict=False)):
        ratio, shrink = here.alpha / to.alpha, (to.sigma / here.sigma) ** 2
        beta = here.sigma**2 - (ratio * to.sigma) ** 2
        variance = {"fixed_small": beta * shrink, "fixed_large": beta}[s.variance]
        quiet = here.t == 0 if s.noisy_end else i == path.n - 1
        noise = 0.0 if quiet else math.sqrt(max(variance, 1e-20))
        rows.append(Row(here, cx=ratio * shrink, c0=to.alpha * beta / here.sigma**2, cn=noise))
    return rows
