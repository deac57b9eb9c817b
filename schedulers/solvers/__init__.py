"""Solver axis: a solver is a function from a trajectory's noise levels to rows of coefficients, one a network call.

    x' = cx x + c0 x0 + cr x0_raw + cn noise + c[0] h1 + c[1] h2 + ...

x0 is the clipped and x0_raw the unclipped prediction of this call; h1, h2, … are the history entries of earlier calls,
newest first: their x0, or their eps = (x - alpha x0) / sigma for solvers that extrapolate eps. In docstrings a prime
marks the level that a step leads to, s = sigma / alpha (`ve_sigma`), lambda = -log s, h = lambda' - lambda.
"""

from functools import partial

from genkit.schedulers.solvers.adams import ipndm, pndm
from genkit.schedulers.solvers.ddim import ddim, ddpm, euler
from genkit.schedulers.solvers.distilled import lcm, tcd
from genkit.schedulers.solvers.dpm import EPS, SDE_EPS, SDE_X0, X0, dpmpp_sde, singlestep
from genkit.schedulers.solvers.karras import dpm2, heun
from genkit.schedulers.solvers.multistep import Rule, multistep, sa, unipc
from genkit.schedulers.solvers.pc import pc
from genkit.schedulers.solvers.rows import HISTORY, Level, Row, Rows, Solver, SolverOptions, Trajectory

__all__ = ["HISTORY", "SOLVERS", "Level", "Row", "Solver", "SolverOptions", "Trajectory"]

_DPM = ("lower_order_final", "euler_at_final", "threshold", "order", "solver_type")
_UNIPC = ("order", "solver_type", "corrector", "lower_order_final", "predict_eps", "threshold")
_SA = ("order", "corrector_order", "corrector", "tau", "lower_order_final", "threshold")


def _dpm(rows: Rows, rule: Rule, order: int, *more: str) -> Solver:
    style = "dpm" if rows is multistep else "singlestep"
    return Solver(partial(rows, rule=rule), style, (*_DPM, *more), (order, order))


SOLVERS = {
    "ddim": Solver(ddim, "ddim", ("eta", "clip", "threshold")),
    "ddpm": Solver(ddpm, "ddpm", ("variance", "clip", "threshold")),
    "euler": Solver(euler, "euler", ("clip",)),
    "euler_ancestral": Solver(partial(euler, eta=1.0), "euler", ("clip",)),
    "heun": Solver(heun, "euler", ("clip",)),
    "dpm2": Solver(dpm2, "dpm2"),
    "dpm2_ancestral": Solver(partial(dpm2, eta=1.0), "dpm2"),
    # x'/alpha' = x/alpha + int eps ds, eps a polynomial in s (Adams-Bashforth with variable steps; k-diffusion)
    "lms": Solver(partial(multistep, rule=Rule(eps=True, in_sigma=True), final="none"), "euler", ("order",), (4, 4)),
    "pndm": Solver(pndm, "ddim"),
    "ipndm": Solver(ipndm, "ddim", ("order",), (4, 4)),
    # x'/alpha' = x/alpha + int eps ds, eps a polynomial in log s (Zhang and Chen 2023, equation 15, log-rho)
    "deis": Solver(partial(multistep, rule=Rule(eps=True)), "dpm", ("order", "lower_order_final", "threshold"), (2, 3)),
    "dpmsolver_2m": _dpm(multistep, EPS, 2),
    "dpmsolver_3m": _dpm(multistep, EPS, 3),
    "dpmsolver_2s": _dpm(singlestep, EPS, 2),
    "dpmsolver_3s": _dpm(singlestep, EPS, 3),
    "sde-dpmsolver_2m": _dpm(multistep, SDE_EPS, 2),
    "dpmpp_2m": _dpm(multistep, X0, 2, "clip"),
    "dpmpp_3m": _dpm(multistep, X0, 3, "clip"),
    "dpmpp_2s": _dpm(singlestep, X0, 2, "clip"),
    "dpmpp_3s": _dpm(singlestep, X0, 3, "clip"),
    "sde-dpmpp_2m": _dpm(multistep, SDE_X0, 2, "clip"),
    "sde-dpmpp_3m": _dpm(multistep, SDE_X0, 3, "clip"),
    "sde-dpmpp_2s": _dpm(singlestep, SDE_X0, 2),
    "dpmpp_sde": Solver(dpmpp_sde, "euler"),
    "unipc": Solver(unipc, "dpm", _UNIPC, (2, 3)),
    "sa": Solver(sa, "dpm", _SA, (2, 4)),
    "pc": Solver(pc, "exact", ("order", "corrector", "threshold"), (1, 3), spacing="bounded"),
    "lcm": Solver(lcm, "lcm", ("clip", "threshold")),
    "tcd": Solver(tcd, "lcm", ("eta",)),
}
