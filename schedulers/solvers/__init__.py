"""Solver axis: a solver is a function from a trajectory's noise levels to rows of coefficients, one a network call.

    x' = cx x + c0 x0 + cr x0_raw + cn noise + c[0] h1 + c[1] h2 + ...

x0 is the clipped and x0_raw the unclipped prediction of this call; h1, h2, … are the history entries of earlier calls,
newest first: their x0, or their eps = (x - alpha x0) / sigma for solvers that extrapolate eps. In docstrings a prime
marks the level that a step leads to, s = sigma / alpha (`ve_sigma`), lambda = -log s, h = lambda' - lambda.
"""

from functools import partial

from genkit.schedulers.solvers.adams import ipndm, pndm
from genkit.schedulers.solvers.base import HISTORY, Level, Row, Solver, SolverOptions, Trajectory
from genkit.schedulers.solvers.ddim import ddim, ddpm, euler, euler_ancestral
from genkit.schedulers.solvers.distilled import lcm, tcd
from genkit.schedulers.solvers.dpm import EPS, SDE_EPS, SDE_X0, X0, dpmpp_sde, singlestep
from genkit.schedulers.solvers.karras import dpm2, dpm2_ancestral, heun
from genkit.schedulers.solvers.multistep import Rule, multistep, sa, unipc
from genkit.schedulers.solvers.pc import pc

__all__ = ["HISTORY", "SOLVERS", "Level", "Row", "Solver", "SolverOptions", "Trajectory"]

_DPM = ("lower_order_final", "euler_at_final", "threshold", "order", "solver_type")
_UNIPC = ("order", "solver_type", "corrector", "lower_order_final", "predict_eps", "threshold")
_SA = ("order", "corrector_order", "corrector", "tau", "lower_order_final", "threshold")


def _dpm(rule: Rule, order: int, clip: bool = True) -> Solver:
    return Solver(partial(multistep, rule=rule), "dpm", (*_DPM, "clip") if clip else _DPM, (order, order))


def _dpm_singlestep(rule: Rule, order: int, clip: bool = True) -> Solver:
    return Solver(partial(singlestep, rule=rule), "singlestep", (*_DPM, "clip") if clip else _DPM, (order, order))


SOLVERS = {
    "ddim": Solver(ddim, "ddim", ("eta", "clip", "threshold")),
    "ddpm": Solver(ddpm, "ddpm", ("variance", "clip", "threshold")),
    "euler": Solver(euler, "euler", ("clip",)),
    "euler_ancestral": Solver(euler_ancestral, "euler", ("clip",)),
    "heun": Solver(heun, "euler", ("clip",)),
    "dpm2": Solver(dpm2, "dpm2"),
    "dpm2_ancestral": Solver(dpm2_ancestral, "dpm2"),
    # x'/alpha' = x/alpha + int eps ds, eps a polynomial in s (Adams-Bashforth with variable steps; k-diffusion)
    "lms": Solver(partial(multistep, rule=Rule(eps=True, in_sigma=True), final="none"), "euler", ("order",), (4, 4)),
    "pndm": Solver(pndm, "ddim"),
    "ipndm": Solver(ipndm, "ddim", ("order",), (4, 4)),
    # x'/alpha' = x/alpha + int eps ds, eps a polynomial in log s (Zhang and Chen 2023, equation 15, log-rho)
    "deis": Solver(partial(multistep, rule=Rule(eps=True)), "dpm", ("order", "lower_order_final", "threshold"), (2, 3)),
    "dpmsolver_2m": _dpm(EPS, 2, clip=False),
    "dpmsolver_3m": _dpm(EPS, 3, clip=False),
    "dpmsolver_2s": _dpm_singlestep(EPS, 2, clip=False),
    "dpmsolver_3s": _dpm_singlestep(EPS, 3, clip=False),
    "sde-dpmsolver_2m": _dpm(SDE_EPS, 2, clip=False),
    "dpmpp_2m": _dpm(X0, 2),
    "dpmpp_3m": _dpm(X0, 3),
    "dpmpp_2s": _dpm_singlestep(X0, 2),
    "dpmpp_3s": _dpm_singlestep(X0, 3),
    "sde-dpmpp_2m": _dpm(SDE_X0, 2),
    "sde-dpmpp_3m": _dpm(SDE_X0, 3),
    "sde-dpmpp_2s": _dpm_singlestep(SDE_X0, 2, clip=False),
    "dpmpp_sde": Solver(dpmpp_sde, "euler"),
    "unipc": Solver(unipc, "dpm", _UNIPC, (2, 3)),
    "sa": Solver(sa, "dpm", _SA, (2, 4)),
    "pc": Solver(pc, "exact", ("order", "corrector", "threshold"), (1, 3), spacing="bounded"),
    "lcm": Solver(lcm, "lcm", ("clip", "threshold")),
    "tcd": Solver(tcd, "lcm", ("eta",)),
}
