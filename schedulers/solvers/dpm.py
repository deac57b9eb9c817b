"""DPM-Solver and DPM-Solver++ (Lu et al. 2022, 2022b), on the ODE and on the reverse SDE.

    dpmsolver      x' = alpha'/alpha x - sigma' (e^h - 1) E                                      (2022, equation 4.1)
    sde-dpmsolver  x' = alpha'/alpha x - 2 sigma' (e^h - 1) E + sigma' sqrt(e^2h - 1) noise
    dpmpp          x' = sigma'/sigma x + alpha' (1 - e^-h) D                                     (2022b, algorithm 2)
    sde-dpmpp      x' = sigma'/sigma e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) noise (2022b, appendix A)

E = eps + h/2 (eps - eps_prev) / h_prev and D = x0 + h/2 (x0 - x0_prev) / h_prev for order 2 (2m); a quadratic through
three predictions for order 3 (3m). Like k-diffusion, diffusers' style halves its second moment: then it has order 2.
"""

from __future__ import annotations

import dataclasses
import math

from genkit.schedulers.solvers.multistep import Rule
from genkit.schedulers.solvers.rows import Row, SolverOptions, Trajectory
from genkit.schedulers.solvers.steps import euler_row, row, stages, transfer

X0 = Rule(first_moment="midpoint", halved_second_moment=True)
EPS, SDE_X0 = dataclasses.replace(X0, eps=True), dataclasses.replace(X0, tau=1.0)
SDE_EPS = dataclasses.replace(EPS, tau=1.0)


def singlestep(trajectory: Trajectory, options: SolverOptions, rule: Rule) -> list[Row]:
    """Blocks of two or three steps, each computed from the start of its block, with one more prediction than the last.

    A third step weighs both differences exactly (solver_type heun), or only that of the block's ends (midpoint): Lu et
    al. 2022, algorithms 1 and 2, on eps, and 2022b, algorithm 1, on x0. On the SDE each step draws its own noise, as in
    diffusers.
    """
    heun, rows, at = options.solver_type == "heun", [], 0
    exact = dataclasses.replace(rule, first_moment="exact", halved_second_moment=False)
    for size in _block_sizes(trajectory, options):
        start, *rest = trajectory.levels[at : at + size + 1]
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
        if rule.tau and size > 1:
            # The first step adds noise, so the start cannot be recovered from its result: the history carries its term
            rows.append(dataclasses.replace(row(start, steps[0]), history=(steps[1].cx, steps[1].w[1])))
            rows.append(Row(rest[0], cx=0.0, c0=steps[1].w[0], cn=steps[1].cn, c=(1.0,)))
        else:
            rows += stages(calls, steps, rule.eps)
    return rows


def _block_sizes(trajectory: Trajectory, options: SolverOptions) -> list[int]:
    """Return the number of steps of each block, laid out for the whole plan; `strength` cuts the first blocks."""
    n, ends_clean = trajectory.plan_steps, not trajectory.levels[-1].sigma
    order = options.order if isinstance(options.order, int) else max(options.order)
    whole, rest = divmod(n, order)
    if rest == 0 and (options.lower_order_final or ends_clean) and order > 1:
        sizes = [order] * (whole - 1) + [order - 1, 1]
    else:
        sizes = [order] * whole + ([rest] if rest else [])
    if ends_clean and sizes[-1] > 1:
        sizes[-1:] = [sizes[-1] - 1, 1]
    skip = n - trajectory.num_steps
    while skip:  # a plan that starts within a block starts a shorter one there
        sizes[0], skip = sizes[0] - 1, skip - 1
        sizes = sizes if sizes[0] else sizes[1:]
    return sizes


def dpmpp_sde(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """x' = alpha' D + direction (x - alpha D) + noise, D = x0 at sqrt(s s') after an ancestral step there.

    k-diffusion's sample_dpmpp_sde with r = 1/2. The middle's noise is part of the whole step's: both are increments of
    one Brownian motion in s.
    """
    rows = []
    for here, to in trajectory.steps:
        if not here.alpha or not to.ve_sigma or here.ve_sigma <= to.ve_sigma:
            rows.append(euler_row(here, to))
            continue
        middle = trajectory.at_ve_sigma(math.sqrt(here.ve_sigma * to.ve_sigma))
        (direction, noise), (whole, whole_noise) = transfer(here, middle, 1.0), transfer(here, to, 1.0)
        share = (here.ve_sigma - middle.ve_sigma) / (here.ve_sigma - to.ve_sigma)
        reuse = whole_noise * math.sqrt(share) / noise  # of the middle's noise, recovered from x there
        first = middle.alpha - here.alpha * direction
        history = (whole - reuse * direction, -reuse * first)
        rows.append(Row(here, direction, first, cn=noise, history=history))
        rows.append(Row(middle, reuse, to.alpha - here.alpha * whole, cn=whole_noise * math.sqrt(1 - share), c=(1.0,)))
    return rows
