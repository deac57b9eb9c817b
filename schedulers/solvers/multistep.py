"""Multistep exponential integrators, with or without a corrector: dpmpp, dpmsolver, deis, lms, unipc, sa."""

from __future__ import annotations

import dataclasses

from genkit.schedulers.solvers.one_step import euler_row
from genkit.schedulers.solvers.rows import HISTORY, Path, Row, SolverOptions, Step, add, row_of
from genkit.schedulers.solvers.rule import step_orders


def multistep(path: Path, s: SolverOptions) -> list[Row]:
    """Steps by the solver's Rule, from the newest predictions; with a corrector each is redone with the call it led to.

    Redoing a step adds the difference of its weights, with predictions including the new one, to x: UniPC's corrector
    (Zhao et al. 2023, algorithm 7) and SA-Solver's (Xue et al. 2023, equation 17; the noise stays the same).
    """
    rule = s.rule
    pair = {"heun": "exact", "bh1": "bh1"}.get(s.solver_type or "", rule.pair)
    eps = rule.eps or (s.predict_eps and s.solver == "unipc")
    rule = dataclasses.replace(rule, eps=eps, half=rule.half and s.half, pair=pair)
    orders, rules, redone = step_orders(path, s, rule.ending), [rule] * path.n, [0] * path.n
    if s.solver == "sa":
        end = 0.2 * (path.noise.table.t[-1] + 1)
        rules = [dataclasses.replace(rule, tau=s.tau if end <= p.t <= 4 * end else 0.0) for p in path.points[:-1]]
        most = [n + 2 if s.lower_order_final else HISTORY for n in range(path.n, 0, -1)]
        redone = [min(s.corrector_order, i + 1, most[i]) for i in range(path.n)]
    elif s.solver == "unipc":
        redone = [0, *(p + 1 for p in orders)]
    rows: list[Row] = []
    before = Step(0.0, ())
    for i, (here, to) in enumerate(path.steps):
        if rule.eps and not here.alpha:  # eps says nothing there
            rows.append(dataclasses.replace(euler_row(here, to), leaves=(1 / here.sigma, 0.0)))
            continue
        step, start = rules[i].step(here, to, path.points[i::-1][: orders[i]]), path.points[i - 1]
        added: tuple[float, ...] = ()
        if i and s.corrector and redone[i] and start.alpha:
            again = rules[i - 1].step(start, here, path.points[i::-1][: redone[i]])
            added = add(again.w, (0.0, *before.w), -1.0)
        before = step
        rows.append(
            row_of(here, step._replace(w=add(step.w, added, step.cx)), rule.eps, s.solver == "sa" and s.tau > 0)
        )
    return rows
