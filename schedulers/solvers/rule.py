"""Exponential integrators: the weights of a step from predictions at several levels, and the order of each step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from genkit.schedulers.solvers.rows import FEW, HISTORY, Path, Point, SolverOptions, Step

NODES, WEIGHTS = (0.5 * (1 + np.polynomial.legendre.leggauss(40)[0]), 0.5 * np.polynomial.legendre.leggauss(40)[1])


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a multistep solver integrates what the network predicts, as a polynomial through this and earlier calls.

    With x0 and tau = 0 the exact solution is x'/sigma' = x/sigma + int exp(lambda) x0 dlambda, with eps it is
    x'/alpha' = x/alpha - int exp(-lambda) eps dlambda (Lu et al. 2022, proposition 3.1); tau = 1 adds the noise of the
    reverse SDE (Xue et al. 2023, proposition 3.2). in_k: polynomials in k rather than lambda. pair: the first moment
    when there are two nodes, "exact", "midpoint" (half of the zeroth) or "bh1" (half of h). half: diffusers takes half
    of the second moment. ending: orders fall towards the end by "dpm" (see `step_orders`), by the steps "left", or not.
    """

    eps: bool = False
    tau: float = 0.0
    in_k: bool = False
    pair: str = "exact"
    half: bool = False
    ending: str = "dpm"

    def step(self, here: Point, to: Point, nodes: Sequence[Point]) -> Step:
        """Return the step from `here` with predictions at `nodes`, newest first; from pure noise, or to none, Euler's.

        Nodes that are infinitely far, or no way apart, get no weight.
        """
        h, rate = max(0.0, to.lam - here.lam), 1 + self.tau**2
        if self.eps:
            cx, total = to.alpha / here.alpha, rate * to.alpha * (to.k - here.k)
            cn = self.tau * to.sigma * math.sqrt(math.expm1(2 * h)) if self.tau and h < math.inf else 0.0
        else:
            decay = self.tau**2 * h if self.tau else 0.0
            cx, total = to.sigma / here.sigma * math.exp(-decay), to.alpha * -math.expm1(-rate * h)
            cn = to.sigma * math.sqrt(-math.expm1(-2 * decay))
        begin, *rest = ((p.k if self.in_k else p.lam) for p in (here, to, *nodes))
        length = rest.pop(0) - begin
        places = [(at - begin) / length if length else math.inf for at in rest]
        used = [j for j, r in enumerate(places) if math.isfinite(r) and r not in places[:j]]
        w = np.zeros(len(nodes))
        if len(used) < 2 or not h or not math.isfinite(length):
            w[0] = total
        else:
            powers = np.vander([places[j] for j in used], increasing=True).T
            w[used] = np.linalg.solve(powers, self._moments(h, rate, total, len(used)))
        return Step(cx, tuple(map(float, w)), cn)

    def _moments(self, h: float, rate: float, total: float, size: int) -> np.ndarray:
        """Return the integrals of 1, u, u^2, … over the step, u from 0 to 1, scaled so that the first is `total`."""
        grow = 0.0 if self.in_k else h if self.eps else -rate * h
        kernel = WEIGHTS * np.exp(grow * (1 - NODES))
        moments = np.array([(kernel * NODES**i).sum() for i in range(size)])
        moments *= total / moments[0]
        if size == 2 and self.pair != "exact":
            moments[1] = total / 2 if self.pair == "midpoint" else total * grow / 2 / math.expm1(grow)
        if size == 3 and self.half:
            moments[2] /= 2
        return moments


def step_orders(path: Path, s: SolverOptions, ending: str) -> list[int]:
    """Return the order of every step: as asked, and at most the calls made so far.

    Endings: "dpm", 1 in the last step when it leads to sigma 0, or euler_at_final or (below 15 steps) lower_order_final
    ask for it, and with the latter 2 before; "left", at most the steps left, with lower_order_final.
    """
    order = s.order
    asked = [order] * path.n if isinstance(order, int) else [*order, *[order[-1]] * path.n]
    few, left = s.lower_order_final and path.total < FEW, range(path.n, 0, -1)
    if ending == "dpm":
        easy = s.euler_at_final or few or not path.points[-1].sigma
        most = [1 if n == 1 and easy else 2 if n == 2 and few else HISTORY for n in left]
    else:
        most = [*left] if ending == "left" and s.lower_order_final else [HISTORY] * path.n
    return [min(asked[i], i + 1, most[i]) for i in range(path.n)]
