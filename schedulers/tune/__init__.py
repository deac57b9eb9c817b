"""Plans fitted to one network: levels and coefficients that follow its own many-step solution in a few calls.

A tuned plan has `steps` calls. Its table is that of a multistep method at levels of its own, plus a correction of
every coefficient. Levels and corrections are found by gradients through the whole trajectory, so that it stays near the
teacher, a solution of many calls from the same noise, and ends where that ends. Fitting the end alone does worse: it
spends the calls on detail, and a few trajectories that pass near a fork take the other branch. The only requirement is
that the network is differentiable. A plan fitted for one network and guidance does not suit another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genkit.errors import InputError, shown
from genkit.schedulers.plan import Plan
from genkit.schedulers.scheduler import Scheduler
from genkit.schedulers.tune.levels import TrainedLevels
from genkit.schedulers.tune.optimise import STEP_SIZE, optimise
from genkit.schedulers.tune.trajectories import TEACHER_CALLS, TEACHER_RANGE, TEACHER_STRIDE, Trajectories
from genkit.schedulers.tuned import Checkpoint, Tuned

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from genkit.schedulers.tune.trajectories import Model

    Progress = Callable[[int, int, str], None]


def fit(
    model: Model, scheduler: Scheduler, steps: int, noise: torch.Tensor, *, held_out: float = 0.25, seed: int = 0,
    iterations: int = 120, batch: int | None = None, lean: bool = False, progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None, identity: str = "",
) -> Tuned:  # fmt: skip
    """Fit a plan of `steps` calls to `model`, which was trained as `scheduler` says; compare it with the stock plan.

    model(x, t, index) -> raw prediction, x (B, C, H, W), t (B,); index (B,) says which rows of `noise`, unit noise (M,
    C, H, W), these are, so that each can have its own prompt. held_out: share of the noises used only to compare.
    batch: noises an iteration, by default about 8,192 numbers, at least 4. lean: recompute each call in the backward
    pass to save memory. progress(done, total, text) is called often, and may raise. checkpoint: a file with the state,
    from which a stopped fit continues to the same plan if its arguments are the same; `identity` stands for the model,
    its guidance and its prompts. Raises InputError for what cannot be tuned.
    """
    import torch

    levels, stock = TrainedLevels.of(scheduler), _stock_plan(scheduler, steps)
    compared = max(1, round(held_out * len(noise)))
    if len(noise) - compared < 1:
        raise InputError(f"noise: {len(noise)} cannot be divided into noises to fit to and noises to compare on")
    order = torch.randperm(len(noise), generator=torch.Generator().manual_seed(seed))
    batch = batch or max(4, min(64, 8192 // noise[0].numel()))
    used = [repr(scheduler), steps, held_out, seed, iterations, batch, identity, str(noise.dtype)]
    numbers = json.dumps([*used, TEACHER_CALLS, TEACHER_STRIDE, TEACHER_RANGE, STEP_SIZE]).encode()
    numbers += noise.detach().cpu().double().numpy().tobytes()
    kept = Checkpoint(None if checkpoint is None else Path(checkpoint), hashlib.sha256(numbers).hexdigest())
    parts = math.ceil(len(noise) / (4 * batch))

    def report(done: int, text: str) -> None:
        if progress is not None:
            progress(done, parts + iterations + 1, text)

    runs = Trajectories(_with_time_gradient(model, noise, levels), levels, noise, lean)
    teacher = runs.teach(4 * batch, parts, kept, report)
    plan = optimise(
        runs, steps, order[compared:], teacher, batch, iterations, kept, lambda i, text: report(parts + 1 + i, text)
    )
    report(parts + iterations, "comparing with the stock plan")
    rows = order[:compared]
    before, after = (_summary(runs.errors(p, rows, teacher[-1], 4 * batch)) for p in (stock, plan))
    report(parts + iterations + 1, "done")
    better = after["mean"] < before["mean"] and after["p99"] <= 1.5 * before["p99"]
    return Tuned(plan if better else stock, before, after, better)


def _stock_plan(scheduler: Scheduler, steps: int) -> Plan:
    """Return the scheduler's own plan. Raises InputError for one that a tuned plan cannot replace."""
    if scheduler.threshold is not None:
        raise InputError("threshold: a plan with dynamic thresholding cannot be tuned")
    if scheduler.dynamic_shift is not None:
        raise InputError("dynamic_shift: a plan that depends on the size of the picture cannot be tuned")
    plan = scheduler.plan(steps)
    if plan.consumes_noise.any():
        raise InputError(f"solver: {shown(scheduler.solver)} draws noise; a tuned plan needs one that does not")
    if plan.nfe != steps:
        raise InputError(f"solver: {shown(scheduler.solver)} makes {plan.nfe} calls in {steps} steps, not one each")
    return plan


def _summary(errors: torch.Tensor) -> dict[str, float]:
    found = errors.nan_to_num(nan=math.inf)
    return {"mean": float(found.mean()), "p99": float(np.quantile(found.numpy(), 0.99, method="higher"))}


def _with_time_gradient(model: Model, noise: torch.Tensor, levels: TrainedLevels) -> Model:
    """Return the model with a gradient in t: its own, or by finite differences where it has none (a table, numpy).

    Raises InputError for a model without a gradient in x.
    """
    import torch

    x = (levels.noise_scale * noise[:1]).float().requires_grad_()
    t = x.detach().new_full((1,), levels.first[0] / 2)
    index = torch.zeros(1, dtype=torch.int64, device=x.device)

    def gradients(*given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out = model(x, given[-1], index)
        return torch.autograd.grad(out.sum(), [g for g in given if g.requires_grad], allow_unused=True)

    def differences(x: torch.Tensor, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = model(x, t.detach(), index)
        if not (torch.is_grad_enabled() and t.requires_grad):
            return out
        with torch.no_grad():
            slope = (out - model(x, t - levels.half_timestep, index)) / levels.half_timestep
        return out + slope * (t - t.detach()).view(-1, *[1] * (x.ndim - 1)).to(out.dtype)

    try:
        if all(found is not None for found in gradients(x, t.clone().requires_grad_())):
            return model
    except RuntimeError:
        pass  # an operation has no gradient; in x it may have one
    try:
        if gradients(x, t)[0] is not None:
            return differences
        reason = "its output does not depend on x"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    raise InputError(f"model: lets no gradient through: {reason}")
