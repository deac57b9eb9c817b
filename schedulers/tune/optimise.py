"""The optimisation of a plan's levels and coefficients by Adam."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from genkit.schedulers.plan import Plan
from genkit.schedulers.solvers import HISTORY
from genkit.schedulers.tune.trajectories import Trajectories, rms
from genkit.schedulers.tuned import Checkpoint

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

STEP_SIZE = {"y": 0.05, "theta": 0.003}  # Adam's: of levels in log(sigma / alpha); of corrections, in units of x's std
MIN_FEATURE_STD = 0.02  # directions in which features vary less, in units of x's std, are hardly corrected


def optimise(
    runs: Trajectories, steps: int, index: torch.Tensor, teacher: torch.Tensor, batch: int, iterations: int,
    checkpoint: Checkpoint, report: Callable[[int, str], None],
) -> Plan:  # fmt: skip
    """Return the plan after `iterations` steps of Adam (Kingma and Ba 2015) on the logarithm of the mean error.

    That is the error at the end plus the mean `deviation` on the way. y: the levels. theta: corrections of the
    coefficients in the basis of `whiten`, where each moves x' by about as much.
    """
    import torch

    state = {name: value for name, value in checkpoint.state.items() if name != "taught"}
    if not state:
        first, std = index[: 2 * batch], float(teacher[-1].double().square().mean().sqrt())
        order, y = initial(runs, steps, first, teacher[-1])
        start = {"y": y, "theta": y.new_zeros(steps, 2 + HISTORY)}
        moments = {f"{name}.{m}": torch.zeros_like(value) for name, value in start.items() for m in ("m1", "m2")}
        counts = {"done": torch.tensor([0]), "order": torch.tensor([order])}
        state = {"basis": whiten(runs, y, order, first, std), **counts, **start, **moments}

    def table(y: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        return runs.table(y, (theta[:, None] @ state["basis"])[:, 0], int(state["order"]))

    for i in range(int(state["done"]), iterations):
        rows = index[batch_of(len(index), batch, i)]
        y, theta = (state[name].clone().requires_grad_() for name in STEP_SIZE)
        states = runs.run(table(y, theta), rows)
        error = rms(states[-1], teacher[-1, rows]).mean()
        loss = error + runs.deviation(states, teacher[:-1, rows], y)
        grads = torch.autograd.grad(loss.log(), (y, theta), allow_unused=True, materialize_grads=True)
        adam(state, dict(zip(STEP_SIZE, grads, strict=True)), i, iterations)
        state["y"] = runs.levels.separate(state["y"])
        state["done"] = torch.tensor([i + 1])
        checkpoint.save({"taught": teacher, **state}, last=i + 1 == iterations)
        report(i, f"tuning {steps} steps: error {error.item():.4f}")
    return runs.plan(state["y"], table(state["y"], state["theta"]))


def initial(runs: Trajectories, steps: int, index: torch.Tensor, target: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Return the order and y of the uncorrected method with the least error from the noises `index`."""
    import torch

    found = []
    for order, low in itertools.product((1, 2), (0.8, 1.6)):
        y = runs.levels.spaced(steps, low / steps, 15.0)
        with torch.no_grad():
            error = rms(runs.run(runs.table(y, 0.0, order), index)[-1], target[index]).mean()
        found.append((float(error.nan_to_num(nan=math.inf)), order, y))
    return min(found, key=lambda one: one[0])[1:]


def whiten(runs: Trajectories, y: torch.Tensor, order: int, index: torch.Tensor, std: float) -> torch.Tensor:
    """Return the basis of corrections, (calls, 2 + HISTORY, 2 + HISTORY); std: the standard deviation of x.

    A call's correction adds a weighted sum of features (x, x0, h1, …) to x'. Those are nearly the same image: the basis
    consists of sums of them that are uncorrelated and of equal size, on the trajectories of the uncorrected method.
    """
    import torch

    seen: list[torch.Tensor] = []
    with torch.no_grad():
        runs.run(runs.table(y, 0.0, order), index, seen)
    basis = torch.zeros(len(seen), 2 + HISTORY, 2 + HISTORY, dtype=torch.float64)
    for i, features in enumerate(seen):
        flat = features.flatten(1).double().cpu()
        gram = flat @ flat.T / flat.shape[1] + (MIN_FEATURE_STD * std) ** 2 * torch.eye(len(flat), dtype=torch.float64)
        basis[i, : len(flat), : len(flat)] = std * torch.linalg.inv(torch.linalg.cholesky(gram))
    return basis


def batch_of(count: int, batch: int, i: int) -> np.ndarray:
    """Return which of `count` noises iteration i uses: every epoch has them all, in an order of its own."""
    places = [divmod(i * min(batch, count) + j, count) for j in range(min(batch, count))]
    orders = {epoch: np.random.default_rng(epoch).permutation(count) for epoch, _ in places}
    return np.array([orders[epoch][place] for epoch, place in places])


def adam(state: State, grads: dict[str, torch.Tensor], i: int, iterations: int) -> None:
    """Take step i of Adam in `state`: gradients clipped, warm-up, cosine decay; nothing if a gradient is not finite."""
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    if not math.isfinite(norm):
        return
    rate = min(1.0, (i + 1) / 5) * (1 + math.cos(math.pi * i / iterations)) / 2
    for name, grad in grads.items():
        grad = grad * min(1.0, 5 / max(norm, 1e-12))
        m1 = state[f"{name}.m1"] = 0.9 * state[f"{name}.m1"] + 0.1 * grad
        m2 = state[f"{name}.m2"] = 0.95 * state[f"{name}.m2"] + 0.05 * grad.square()
        update = m1 / (1 - 0.9 ** (i + 1)) / ((m2 / (1 - 0.95 ** (i + 1))).sqrt() + 1e-8)
        state[name] = state[name] - rate * STEP_SIZE[name] * update
