"""Solvers of several calls a step: heun, dpm2, dpmsolver and dpmpp of kind `s`, dpmpp_sde."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from genkit.schedulers.solvers.one_step import euler_row, transfer
from genkit.schedulers.solvers.rows import Path, Point, Row, SolverOptions, Step, add, row_of


def _stages(calls: Sequence[Point], steps: Sequence[Step], eps: bool) -> list[Row]:
    """Rows of steps that all start where the first call is made; step j uses the calls up to j, newest first.

    No noise but in the last: the start is got back from where the step before led.
    """
    rows, before = [], Step(1.0, ())
    for at, step in zip(calls, steps, strict=True):
        ratio = step.cx / before.cx
        rows.append(row_of(at, Step(ratio, add(step.w, (0.0, *before.w), -ratio), step.cn), eps))
        before = step
    return rows


def _slope(here: Point, to: Point, *shares: float) -> Step:
    """Return Euler's step along a mean of eps, the newest call's share first."""
    gain = to.sigma - to.alpha / here.alpha * here.sigma
    return Step(to.alpha / here.alpha, tuple(gain * share for share in shares))


def heun(path: Path, s: SolverOptions) -> list[Row]:
    """x'/alpha' = x/alpha + (k' - k) (eps + eps') / 2, two calls a step (Karras et al. 2022, algorithm 1).

    For flow x' = x + (sigma' - sigma) (v + v') / 2 with v = (x - x0) / sigma. Steps to sigma 0 are Euler's, and from
    pure noise where k is infinite.
    """
    rows = []
    for here, to in path.steps:
        if not to.sigma or not (here.alpha or s.noise == "flow"):
            rows.append(euler_row(here, to))
        elif s.noise == "flow":
            a, b = (to.sigma - here.sigma) / here.sigma, (to.sigma - here.sigma) / to.sigma
            whole = Step(1 + a, (-b / 2, -a / 2 * (1 + b)))
            rows += _stages([here, to], [Step(1 + a, (-a,)), whole], eps=False)
        else:
            rows += _stages([here, to], [_slope(here, to, 1), _slope(here, to, 0.5, 0.5)], eps=True)
    return rows


def dpm2(path: Path, s: SolverOptions) -> list[Row]:
    """x'/alpha' = x/alpha + (k' - k) eps at sqrt(k k'), where Euler's step led (Karras et al. 2022, algorithm 2)."""
    return _dpm2(path, eta=0.0)


def dpm2_ancestral(path: Path, s: SolverOptions) -> list[Row]:
    """dpm2 to less noise than wanted, then noise up to it (k-diffusion, sample_dpm_2_ancestral)."""
    return _dpm2(path, eta=1.0)


def _dpm2(path: Path, eta: float) -> list[Row]:
    rows = []
    for here, to in path.steps:
        if not here.alpha or not to.k:
            rows.append(euler_row(here, to))
            continue
        noise = eta * to.sigma * math.sqrt(max(0.0, 1 - (to.k / here.k) ** 2))
        down = Point(to.t, to.alpha, math.sqrt(to.sigma**2 - noise**2))
        middle = path.at(math.sqrt(here.k * (down.k or to.k)))
        last = _slope(here, down, 1, 0)._replace(cn=noise)
        rows += _stages([here, middle], [_slope(here, middle, 1), last], eps=True)
    return rows


def singlestep(path: Path, s: SolverOptions) -> list[Row]:
    """Blocks of two or three levels, each from its own start: x_1 by a step of order 1, x_2 through two calls, x_3.

    x_3 weighs both differences exactly (solver_type heun) or that of the block's ends only (midpoint): Lu et al. 2022,
    algorithms 1 and 2, on eps, and 2022b, algorithm 1, on x0. With noise each step has its own, as in diffusers.
    """
    rule, heun, rows, at = s.rule, s.solver_type == "heun", [], 0
    exact = dataclasses.replace(rule, pair="exact", half=False)
    for size in _blocks(path, s):
        start, *rest = path.points[at : at + size + 1]
        calls, at = [start, *rest[:-1]], at + size
        if rule.eps and not start.alpha:
            rows += [euler_row(here, to) for here, to in zip(calls, rest, strict=True)]
            continue
        steps = [rule.step(start, rest[0], [start])]
        if size > 1:
            steps.append((exact if heun else rule).step(start, rest[1], [rest[0], start]))
        if size > 2:
            steps.append(exact.step(start, rest[2], [rest[1], rest[0], start] if heun else [rest[1], start]))
            steps[2] = steps[2] if heun else steps[2]._replace(w=(steps[2].w[0], 0.0, steps[2].w[1]))
        if rule.tau and size > 1:  # the start is out of reach behind the noise: its part is made when it is at hand
            rows.append(dataclasses.replace(row_of(start, steps[0]), leaves=(steps[1].cx, steps[1].w[1])))
            rows.append(Row(rest[0], cx=0.0, c0=steps[1].w[0], cn=steps[1].cn, c=(1.0,)))
        else:
            rows += _stages(calls, steps, rule.eps)
    return rows


def _blocks(path: Path, s: SolverOptions) -> list[int]:
    """Return how many levels each block covers, for all steps of a plan; `strength` cuts the first."""
    order, n, zero = s.order, path.total, not path.points[-1].sigma
    order = order if isinstance(order, int) else max(order)
    whole, over = divmod(n, order)
    if over == 0 and (s.lower_order_final or zero) and order > 1:
        sizes = [order] * (whole - 1) + [order - 1, 1]
    else:
        sizes = [order] * whole + ([over] if over else [])
    if zero and sizes[-1] > 1:
        sizes[-1:] = [sizes[-1] - 1, 1]
    skip = n - path.n
    while skip:  # a plan that starts within a block starts it anew
        sizes[0], skip = sizes[0] - 1, skip - 1
        sizes = sizes if sizes[0] else sizes[1:]
    return sizes


def dpmpp_sde(path: Path, s: SolverOptions) -> list[Row]:
    """x' = alpha' D + direction (x - alpha D) + noise with D = x0 at sqrt(k k'), where an ancestral step led.

    k-diffusion's sample_dpmpp_sde with r = 1/2 (DPM-Solver++(2S) on the SDE); the noise up to the middle is a part of
    the whole step's, as increments of one Brownian motion in k.
    """
    rows = []
    for here, to in path.steps:
        if not here.alpha or not to.k or here.k <= to.k:
            rows.append(euler_row(here, to))
            continue
        middle = path.at(math.sqrt(here.k * to.k))
        (near, z), (far, noise) = transfer(here, middle, 1.0), transfer(here, to, 1.0)
        share = (here.k - middle.k) / (here.k - to.k)
        again = noise * math.sqrt(share) / z  # of the middle's noise, got back from x there
        kept = (far - again * near, -again * (middle.alpha - here.alpha * near))
        rows.append(Row(here, near, middle.alpha - here.alpha * near, cn=z, leaves=kept))
        rows.append(Row(middle, again, to.alpha - here.alpha * far, cn=noise * math.sqrt(1 - share), c=(1.0,)))
    return rows
