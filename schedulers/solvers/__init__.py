"""Solver axis: a solver is a function from the levels it passes to rows of coefficients, one row a network call.

    x' = cx x + c0 x0 + cr x0_raw + cn noise + c[0] h1 + c[1] h2 + ...

x0 is the clipped and x0_raw the unclipped prediction of this call; h1, h2, … are what earlier calls left behind, newest
first: their x0, or their eps = (x - alpha x0) / sigma for solvers that extrapolate that. Below, a prime marks the level
that a step leads to, k = sigma / alpha, lambda = -log k, h = lambda' - lambda.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from genkit.schedulers.solvers.adams import ipndm, pndm
from genkit.schedulers.solvers.distilled import lcm, tcd
from genkit.schedulers.solvers.multistep import multistep
from genkit.schedulers.solvers.one_step import ddim, ddpm, euler, euler_ancestral
from genkit.schedulers.solvers.pc import pc
from genkit.schedulers.solvers.rows import HISTORY, Path, Point, Row, SolverOptions
from genkit.schedulers.solvers.rule import Rule
from genkit.schedulers.solvers.singlestep import dpm2, dpm2_ancestral, dpmpp_sde, heun, singlestep

__all__ = ["HISTORY", "SOLVERS", "Path", "Point", "Row", "Solver", "SolverOptions"]

PLAIN = Rule()


@dataclasses.dataclass(frozen=True)
class Solver:
    """rows: the coefficients. style: the family of diffusers classes it is in, see STYLES. options: those it reads.

    orders: the order it has when none is asked for, and the greatest. rule: of multistep and singlestep solvers.
    formula: theirs, and where it is from; the others' is in the docstring of `rows`. spacing: what it goes with when it
    is chosen without one.
    """

    rows: Callable[[Path, SolverOptions], list[Row]]
    style: str
    options: tuple[str, ...] = ()
    orders: tuple[int, int] = (1, 1)
    rule: Rule = PLAIN
    formula: str = ""
    spacing: str | None = None


_DPM = ("lower_order_final", "euler_at_final", "threshold", "order", "solver_type")
_UNIPC = ("order", "solver_type", "corrector", "lower_order_final", "predict_eps", "threshold")
_SA = ("order", "corrector_order", "corrector", "tau", "lower_order_final", "threshold")
_X0 = Rule(pair="midpoint", half=True)
_EPS, _SDE_X0 = dataclasses.replace(_X0, eps=True), dataclasses.replace(_X0, tau=1.0)
_SDE_EPS = dataclasses.replace(_EPS, tau=1.0)
_X0_FORMULA = (
    "x' = sigma'/sigma x + alpha' (1 - e^-h) D, D = x0 + h/2 (x0 - x0_prev) / h_prev (Lu et al. 2022b, alg. 2)"
)
_SDE_FORMULA = (
    "x' = sigma'/sigma e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) noise (Lu et al. 2022b, app. A)"
)
_EPS_FORMULA = "x' = alpha'/alpha x - sigma' (e^h - 1) (eps + h/2 (eps - eps_prev) / h_prev) (Lu et al. 2022, eq. 4.1)"
_THIRD = "; D a quadratic, in diffusers' style with half of its second moment (k-diffusion), which is of second order"

SOLVERS = {
    "ddim": Solver(ddim, "ddim", ("eta", "clip", "threshold")),
    "ddpm": Solver(ddpm, "ddpm", ("variance", "clip", "threshold")),
    "euler": Solver(euler, "euler", ("clip",)),
    "euler_ancestral": Solver(euler_ancestral, "euler", ("clip",)),
    "heun": Solver(heun, "euler", ("clip",)),
    "dpm2": Solver(dpm2, "dpm2"),
    "dpm2_ancestral": Solver(dpm2_ancestral, "dpm2"),
    "lms": Solver(
        multistep, "euler", ("order",), (4, 4), Rule(eps=True, in_k=True, ending="none"),
        "x'/alpha' = x/alpha + int eps dk, eps a polynomial in k (Adams-Bashforth with variable steps; k-diffusion)",
    ),
    "pndm": Solver(pndm, "ddim"),
    "ipndm": Solver(ipndm, "ddim", ("order",), (4, 4)),
    "deis": Solver(
        multistep, "dpm", ("order", "lower_order_final", "threshold"), (2, 3), Rule(eps=True),
        "x'/alpha' = x/alpha + int eps dk, eps a polynomial in log k (Zhang and Chen 2023, equation 15, log-rho)",
    ),
    "dpmsolver_2m": Solver(multistep, "dpm", _DPM, (2, 2), _EPS, _EPS_FORMULA),
    "dpmsolver_3m": Solver(multistep, "dpm", _DPM, (3, 3), _EPS, _EPS_FORMULA + _THIRD),
    "dpmsolver_2s": Solver(singlestep, "singlestep", _DPM, (2, 2), _EPS),
    "dpmsolver_3s": Solver(singlestep, "singlestep", _DPM, (3, 3), _EPS),
    "sde-dpmsolver_2m": Solver(
        multistep, "dpm", _DPM, (2, 2), _SDE_EPS,
        "x' = alpha'/alpha x - 2 sigma' (e^h - 1) E + sigma' sqrt(e^2h - 1) noise, E as in dpmsolver_2m",
    ),
    "dpmpp_2m": Solver(multistep, "dpm", (*_DPM, "clip"), (2, 2), _X0, _X0_FORMULA),
    "dpmpp_3m": Solver(multistep, "dpm", (*_DPM, "clip"), (3, 3), _X0, _X0_FORMULA + _THIRD),
    "dpmpp_2s": Solver(singlestep, "singlestep", (*_DPM, "clip"), (2, 2), _X0),
    "dpmpp_3s": Solver(singlestep, "singlestep", (*_DPM, "clip"), (3, 3), _X0),
    "sde-dpmpp_2m": Solver(multistep, "dpm", (*_DPM, "clip"), (2, 2), _SDE_X0, _SDE_FORMULA),
    "sde-dpmpp_3m": Solver(multistep, "dpm", (*_DPM, "clip"), (3, 3), _SDE_X0, _SDE_FORMULA + _THIRD),
    "sde-dpmpp_2s": Solver(singlestep, "singlestep", _DPM, (2, 2), _SDE_X0),
    "dpmpp_sde": Solver(dpmpp_sde, "euler"),
    "unipc": Solver(
        multistep, "dpm", _UNIPC, (2, 3), Rule(pair="midpoint", ending="left"),
        "dpmpp's integral with exact weights, each step redone with the call that it led to (Zhao et al. 2023); "
        "with two nodes the difference weighs half of 1 - e^-h (bh2) or half of h (bh1)",
    ),
    "sa": Solver(
        multistep, "dpm", _SA, (2, 4), Rule(pair="bh1", ending="left"),
        "x' = sigma'/sigma e^(-tau^2 h) x + sum w x0 + sigma' sqrt(1 - e^(-2 tau^2 h)) noise, tau at timesteps 200-800 "
        "of 1000, redone with corrector_order predictions (Xue et al. 2023, equations 14 and 17)",
    ),
    "pc": Solver(pc, "exact", ("order", "corrector", "threshold"), (1, 3), spacing="bounded"),
    "lcm": Solver(lcm, "lcm", ("clip", "threshold")),
    "tcd": Solver(tcd, "lcm", ("eta",)),
}  # fmt: skip
