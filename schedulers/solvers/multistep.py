"""Multistep exponential integrators: one call a step, a polynomial through earlier predictions integrated exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from genkit.schedulers.solvers.rows import HISTORY, Level, Row, SolverOptions, Step, Trajectory
from genkit.schedulers.solvers.steps import NODES, WEIGHTS, add, first_eps_row, limit_orders, polynomial_weights, row


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a solver integrates over a step, as a polynomial through the predictions of this and earlier calls.

    With x0 and tau = 0 the exact solution is x'/sigma' = x/sigma + int exp(lambda) x0 dlambda, with eps it is
    x'/alpha' = x/alpha - int exp(-lambda) eps dlambda (Lu et al. 2022, proposition 3.1); tau = 1 adds the noise of the
    reverse SDE (Xue et al. 2023, proposition 3.2). in_sigma: polynomials in s = sigma / alpha rather than in lambda.
    first_moment: of two nodes, "exact", "midpoint" (half of the zeroth) or "bh1" (half of h). halved_second_moment:
    follow k-diffusion and diffusers, which take half of it, where the style asks for that.
    """

    eps: bool = False
    tau: float = 0.0
    in_sigma: bool = False
    first_moment: str = "exact"
    halved_second_moment: bool = False

    def with_options(self, options: SolverOptions) -> Rule:
        first = {"heun": "exact", "bh1": "bh1"}.get(options.solver_type or "", self.first_moment)
        halved = self.halved_second_moment and options.halved_second_moment
        return dataclasses.replace(self, first_moment=first, halved_second_moment=halved)

    def step(self, here: Level, to: Level, nodes: Sequence[Level]) -> Step:
        """Return the step from `here` with the predictions at `nodes`, newest first.

        From pure noise and to sigma 0 it is Euler's.
        """
        h, rate = max(0.0, to.lam - here.lam), 1 + self.tau**2
        if self.eps:
            cx, total = to.alpha / here.alpha, rate * to.alpha * (to.ve_sigma - here.ve_sigma)
            cn = self.tau * to.sigma * math.sqrt(math.expm1(2 * h)) if self.tau and h < math.inf else 0.0
        else:
            decay = self.tau**2 * h if self.tau else 0.0
            cx, total = to.sigma / here.sigma * math.exp(-decay), to.alpha * -math.expm1(-rate * h)
            cn = to.sigma * math.sqrt(-math.expm1(-2 * decay))
        begin, end, *rest = ((level.ve_sigma if self.in_sigma else level.lam) for level in (here, to, *nodes))
        length = end - begin
        places = [(at - begin) / length if length else math.inf for at in rest]
        if not h or not math.isfinite(length):
            return Step(cx, (total, *[0.0] * (len(nodes) - 1)), cn)
        return Step(cx, polynomial_weights(places, lambda size: self._moments(h, rate, total, size)), cn)

    def _moments(self, h: float, rate: float, total: float, size: int) -> np.ndarray:
        """Return the integrals of 1, u, u^2, … over the step, u from 0 to 1, scaled so that the first is `total`."""
        if size == 1:
            return np.array([total])
        grow = 0.0 if self.in_sigma else h if self.eps else -rate * h
        kernel = WEIGHTS * np.exp(grow * (1 - NODES))
        moments = np.array([(kernel * NODES**i).sum() for i in range(size)])
        moments *= total / moments[0]
        if size == 2 and self.first_moment != "exact":
            moments[1] = total / 2 if self.first_moment == "midpoint" else total * grow / 2 / math.expm1(grow)
        if size == 3 and self.halved_second_moment:
            moments[2] /= 2
        return moments


def multistep(trajectory: Trajectory, options: SolverOptions, rule: Rule, final: str = "dpm") -> list[Row]:
    """Return steps by `rule` without a corrector; final: see `limit_orders`."""
    rules = [rule.with_options(options)] * trajectory.num_steps
    return _predict_correct(trajectory, rules, limit_orders(trajectory, options, final))


def unipc(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """DPM-Solver++'s integral, each step redone once its end was called (Zhao et al. 2023, algorithm 7).

    The weights are exact; with two nodes the difference weighs half of 1 - e^-h (bh2) or half of h (bh1).
    """
    rule = dataclasses.replace(Rule(first_moment="midpoint").with_options(options), eps=options.predict_eps)
    orders = limit_orders(trajectory, options, "remaining")
    corrector = [0, *(order + 1 for order in orders)] if options.corrector else []
    return _predict_correct(trajectory, [rule] * trajectory.num_steps, orders, corrector)


def sa(trajectory: Trajectory, options: SolverOptions) -> list[Row]:
    """x' = sigma'/sigma e^(-tau^2 h) x + sum w x0 + sigma' sqrt(1 - e^(-2 tau^2 h)) noise (Xue et al. 2023, eq. 14).

    tau applies at timesteps 200-800 of 1000. A step is redone from corrector_order predictions (equation 17), with the
    same noise.
    """
    n, rule = trajectory.num_steps, Rule(first_moment="bh1").with_options(options)
    fifth = 0.2 * (trajectory.noise.table.t[-1] + 1)
    stochastic = [fifth <= level.t <= 4 * fifth for level in trajectory.levels[:-1]]
    rules = [dataclasses.replace(rule, tau=options.tau if noisy else 0.0) for noisy in stochastic]
    most = [left + 2 if options.lower_order_final else HISTORY for left in range(n, 0, -1)]
    corrector = [min(options.corrector_order, i + 1, most[i]) for i in range(n)] if options.corrector else []
    orders = limit_orders(trajectory, options, "remaining")
    return _predict_correct(trajectory, rules, orders, corrector, consumes_noise=options.tau > 0)


def _predict_correct(
    trajectory: Trajectory, rules: Sequence[Rule], orders: Sequence[int], corrector: Sequence[int] = (),
    consumes_noise: bool = False,
) -> list[Row]:  # fmt: skip
    """Return a step by each rule with orders[i] predictions; at call i the step before is redone with corrector[i].

    To redo a step, the difference of its weights, now with the prediction of the call at its end, is added to x.
    """
    rows: list[Row] = []
    before = Step(0.0, ())
    for i, (here, to) in enumerate(trajectory.steps):
        if rules[i].eps and not here.alpha:  # at pure noise eps does not determine x0
            rows.append(first_eps_row(here, to))
            continue
        nodes = trajectory.levels[i::-1]
        step, start = rules[i].step(here, to, nodes[: orders[i]]), trajectory.levels[i - 1]
        correction: tuple[float, ...] = ()
        if i and corrector and start.alpha:
            redone = rules[i - 1].step(start, here, nodes[: corrector[i]])
            correction = add(redone.w, (0.0, *before.w), -1.0)
        before = step
        corrected = step._replace(w=add(step.w, correction, step.cx))
        rows.append(row(here, corrected, rules[i].eps, consumes_noise))
    return rows
