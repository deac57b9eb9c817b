"""Plans fitted to one network: levels and coefficients that lead where its own many-step solution leads.

A tuned plan has `steps` calls. Its table is that of a plain multistep method on levels of its own, plus a correction of
every coefficient; levels and corrections are found by gradients through the whole trajectory, so that it follows the
teacher, a solution of many calls from the same noise, and ends where that ends. The end alone would not do: a fit to it
spends its calls on detail, and a few trajectories, which pass close to where ways part, take the other way. Nothing is
assumed of the network but that it can be differentiated. What is fitted for one network and guidance does not suit
another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genkit.errors import InputError, shown
from genkit.schedulers.plan import COLUMNS, Plan, sample, step
from genkit.schedulers.prediction import PREDICTIONS
from genkit.schedulers.scheduler import Scheduler
from genkit.schedulers.solvers import HISTORY
from genkit.schedulers.tuned import NAMES, Memory, Tuned, plan_of

if TYPE_CHECKING:
    import torch

    Model = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    Progress = Callable[[int, int, str], None]
    State = dict[str, torch.Tensor]

TEACHER, STRIDE = 98, 4  # calls of the solution that a plan is fitted to; every so manieth x of it is kept
TAUGHT = 0.02, 40.0  # between these k, or those that the network was trained at, if they are fewer
RHO = 7.0  # Karras et al. 2022, equation 5
GAP = 0.02  # least distance of two levels in log(sigma / alpha)
PACE = {"y": 0.05, "theta": 0.003}  # most change in an iteration: of a level's log k; of x, in standard deviations
FLOOR = 0.02  # a direction in which features vary less than this, in standard deviations, is hardly corrected


def fit(
    model: Model,
    scheduler: Scheduler,
    steps: int,
    noise: torch.Tensor,
    *,
    held_out: float = 0.25,
    seed: int = 0,
    iterations: int = 120,
    batch: int | None = None,
    lean: bool = False,
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: str = "",
) -> Tuned:
    """Fit a plan of `steps` calls to `model`, whose training `scheduler` describes; its stock plan is to be beaten.

    model(x, t, index) -> raw prediction, x (B, C, H, W), t (B,), and index (B,) says which rows of `noise` (M, C, H, W;
    unit noise) these are, so that a prompt can go with each. held_out: share of the noises used only to compare.
    batch: noises an iteration, by default some 8,192 numbers, at least 4. lean: compute each call twice rather than
    keep what its gradient needs. progress(done, total, text): called often; may raise. checkpoint: a file that holds
    the state, by which a fit that was stopped goes on to the same plan; it serves the same arguments only, `identity`
    standing for the model, its guidance and its prompts. Raises InputError for what cannot be tuned.
    """
    import torch

    ladder, stock = Ladder.of(scheduler), _stock(scheduler, steps)
    apart = max(1, round(held_out * len(noise)))
    if len(noise) - apart < 1:
        raise InputError(f"noise: {len(noise)} cannot be divided into noises to fit to and noises to compare on")
    order = torch.randperm(len(noise), generator=torch.Generator().manual_seed(seed))
    batch = batch or max(4, min(64, 8192 // noise[0].numel()))
    used = [repr(scheduler), steps, held_out, seed, iterations, batch, identity, str(noise.dtype)]
    numbers = json.dumps([*used, TEACHER, STRIDE, TAUGHT, PACE]).encode()
    numbers += noise.detach().cpu().double().numpy().tobytes()
    memory = Memory(None if checkpoint is None else Path(checkpoint), hashlib.sha256(numbers).hexdigest())
    parts = math.ceil(len(noise) / (4 * batch))
    job = Job(_told(model, noise, ladder), ladder, noise, lean, memory, progress, parts + iterations + 1)
    taught = job.teach(4 * batch, parts)
    plan = job.optimise(steps, order[apart:], taught, batch, iterations)

    job.report(parts + iterations, "comparing with the stock plan")
    rows = order[:apart]
    before, after = (_summary(job.errors(p, rows, taught[-1], 4 * batch)) for p in (stock, plan))
    job.report(parts + iterations + 1, "done")
    better = after["mean"] < before["mean"] and after["p99"] <= 1.5 * before["p99"]
    return Tuned(plan if better else stock, before, after, better)


def _stock(scheduler: Scheduler, steps: int) -> Plan:
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


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The levels of a scheduler as functions of y = log k, k = sigma / alpha. first: the noisiest, (t, alpha, sigma).

    steps, log_k: timesteps and y of the levels that the network was trained at, least noise first, infinite k left out.
    """

    scheduler: Scheduler
    first: tuple[float, float, float]
    steps: np.ndarray
    log_k: np.ndarray

    @classmethod
    def of(cls, scheduler: Scheduler) -> Ladder:
        every = np.arange(scheduler.num_train_timesteps, dtype=float)
        levels = scheduler.levels(every)
        finite = np.isfinite(levels.ve_sigma)
        t, alpha, sigma = (float(column[-1]) for column in levels)
        return cls(scheduler, (t, alpha, sigma), every[finite], np.log(levels.ve_sigma[finite]))

    @property
    def scale(self) -> float:
        """Of the unit noise that trajectories start from: that of x at the first level, for data of unit variance."""
        return math.hypot(self.first[1], self.first[2])

    @property
    def tick(self) -> float:
        """About half a training step, in the terms of what the network is told."""
        low, high = (float(self.scheduler.levels(np.array([t])).t[0]) for t in self.steps[[0, -1]])
        return (high - low) / (2 * len(self.steps))

    def spread(self, calls: int, low: float, high: float) -> torch.Tensor:
        """Return y of the calls after the first: even in k^(1/7) (Karras et al. 2022) from about `high` to `low`."""
        import torch

        most, least = (math.exp(np.clip(math.log(k), self.log_k[0], self.log_k[-1]) / RHO) for k in (high, low))
        count = calls - 1 + (self.first[2] <= high * self.first[1])  # whether the first level is one of them
        roots = np.linspace(most, least, max(count, 1))
        return self.apart(torch.from_numpy(RHO * np.log(roots[max(count, 1) - (calls - 1) :])))

    def apart(self, y: torch.Tensor) -> torch.Tensor:
        """Return y within the trained levels, falling by GAP at least."""
        import torch

        room = GAP * torch.arange(len(y), dtype=y.dtype)
        y = torch.cummin((y + room).clamp(max=self.log_k[-1] - GAP), 0).values - room
        return torch.maximum(y, self.log_k[0] + room.flip(0))

    def columns(self, y: torch.Tensor) -> torch.Tensor:
        """Return t, alpha, sigma, c_in, px and pm, (6, calls), of the first level and then those at y (calls - 1,).

        Differentiable in y, by differences: whatever a noise schedule does, it is cheap.
        """
        import torch

        prediction = PREDICTIONS[self.scheduler.prediction]

        def at(y: np.ndarray) -> np.ndarray:
            levels = self.scheduler.levels(np.interp(y, self.log_k, self.steps))
            t, alpha, sigma = (np.concatenate([[f], a]) for f, a in zip(self.first, levels, strict=True))
            return np.stack([t, alpha, sigma, prediction.c_in(alpha, sigma), *prediction.to_x0(alpha, sigma)])

        here, h = y.detach().numpy(), 1e-4
        slope = (at(here + h) - at(here - h))[:, 1:] / (2 * h)
        moved = torch.from_numpy(slope) * (y - y.detach())
        return torch.from_numpy(at(here)) + torch.nn.functional.pad(moved, (1, 0))


def multistep(alpha: torch.Tensor, sigma: torch.Tensor, order: int) -> torch.Tensor:
    """Return (cx, c0, c1, …) of each step, (calls, 2 + HISTORY), of the plain method; differentiable.

    x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) mean of x0 over 1/k from 1/k to 1/k', x0 being the polynomial
    through the last `order` predictions in u = log((k + 1/2) / (1 + (k + 1/2) / 50)), which is finite at both ends.
    """
    import torch

    def u(k: torch.Tensor) -> torch.Tensor:
        return -(1 / (k + 0.5) + 0.02).log()

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))
    share, weights = (nodes + 1) / 2, weights / 2
    k = sigma / alpha.clamp(min=1e-9)
    zero, at = k.new_zeros(1), u(k)
    k_to, alpha_to, sigma_to = torch.cat([k[1:], zero]), torch.cat([alpha[1:], zero + 1]), torch.cat([sigma[1:], zero])
    rows = []
    for i in range(len(k)):
        known = at[max(0, i + 1 - order) : i + 1].flip(0)
        inside = u(k[i] * k_to[i] / ((1 - share) * k_to[i] + share * k[i]))[:, None]
        each = []
        for j in range(len(known)):
            others = torch.cat([known[:j], known[j + 1 :]])
            each.append((weights * ((inside - others) / (known[j] - others)).prod(1)).sum())
        cx = sigma_to[i] / sigma[i]
        row = torch.cat([cx[None], (alpha_to[i] - alpha[i] * cx) * torch.stack(each)])
        rows.append(torch.nn.functional.pad(row, (0, 2 + HISTORY - len(row))))
    return torch.stack(rows)


@dataclasses.dataclass(frozen=True)
class Job:
    """A model with its noises, and what runs trajectories from them."""

    model: Model
    ladder: Ladder
    noise: torch.Tensor
    lean: bool
    memory: Memory
    progress: Progress | None
    total: int

    def report(self, done: int, text: str) -> None:
        if self.progress is not None:
            self.progress(done, self.total, text)

    def table(self, y: torch.Tensor, change: torch.Tensor | float, order: int) -> torch.Tensor:
        """Return the plan's table, (calls, len(COLUMNS)), for levels at y and a change of (cx, c0, c1, …)."""
        import torch

        columns = dict(zip(("t", "alpha", "sigma", "c_in", "px", "pm"), self.ladder.columns(y), strict=True))
        free = multistep(columns["alpha"], columns["sigma"], order) + change
        columns |= dict(zip(("cx", "c0", *(f"c{i + 1}" for i in range(HISTORY))), free.T, strict=True))
        clip = self.ladder.scheduler.clip
        columns |= {"clip": free.new_full((len(free),), math.inf if clip is None else clip)}
        columns |= {"h0": free.new_ones(len(free))}
        return torch.stack([columns.get(name, free.new_zeros(len(free))) for name in COLUMNS], dim=1)

    def run(
        self, table: torch.Tensor, index: torch.Tensor, seen: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Return x after each call of `table` from the noises `index`; seen: takes (x, x0, h1, …) of every call."""
        import torch
        from torch.utils.checkpoint import checkpoint

        x = self.ladder.scale * self.noise[index].to(torch.promote_types(self.noise.dtype, torch.float32))
        history, index = x.new_zeros(HISTORY, *x.shape), index.to(x.device)
        passed = []
        for i, line in enumerate(table.to(x.device, x.dtype)):
            rows = dict(zip(COLUMNS, line, strict=True))
            t = rows["t"] if i else rows["t"].detach()  # the first level is fixed
            given = rows["c_in"] * x, t.expand(len(x)), index
            again = self.lean and torch.is_grad_enabled()
            output = (checkpoint(self.model, *given, use_reentrant=False) if again else self.model(*given)).to(x.dtype)
            if seen is not None:
                raw = rows["px"] * x + rows["pm"] * output
                seen.append(torch.cat([x[None], raw.clamp(-rows["clip"], rows["clip"])[None], history[:i]]))
            x, new = step(x, output, line.view(-1, *[1] * x.ndim), history, 0.0)
            history = torch.cat([new[None], history[:-1]])
            passed.append(x)
        return passed

    def teach(self, at_once: int, parts: int) -> torch.Tensor:
        """Return the teacher's x at every STRIDE-th level and at the end, (levels + 1, M, C, H, W), on the CPU.

        What the memory holds of that is not computed again.
        """
        import torch

        table = self.table(self.ladder.spread(TEACHER, *TAUGHT), 0.0, order=3)
        found = [*self.memory.state["taught"].split(at_once, dim=1)] if "taught" in self.memory.state else []
        for part in range(len(found), parts):
            self.report(part, f"solving in {TEACHER} steps")
            index = torch.arange(part * at_once, min((part + 1) * at_once, len(self.noise)))
            with torch.no_grad():
                passed = self.run(table, index)
            found.append(torch.stack([*passed[:-1:STRIDE], passed[-1]]).cpu())
            self.memory.keep({"taught": torch.cat(found, dim=1)})
        if not all(part.isfinite().all() for part in found):
            raise InputError("model: its solution of many steps has values that are not finite")
        return torch.cat(found, dim=1)

    def astray(self, passed: list[torch.Tensor], taught: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean distance of x at the levels y from the teacher's x there, in terms of x's own size.

        Between the teacher's levels, which are even in k^(1/RHO), x is the cubic through the four about it.
        """
        import torch

        known = (self.ladder.spread(TEACHER, *TAUGHT)[::STRIDE] / RHO).exp()
        place = (((y / RHO).exp() - known[0]) * (len(known) - 1) / (known[-1] - known[0])).clamp(0, len(known) - 1)
        first = place.detach().long().clamp(1, len(known) - 3) - 1
        f = place - first
        a, b, c = 1 - f, 2 - f, 3 - f
        four = a * b * c / 6, f * b * c / 2, -f * a * c / 2, f * a * b / 6
        alpha, sigma = self.ladder.columns(y)[1:3, 1:]
        total = y.new_zeros(())
        for i, x in enumerate(passed[:-1]):
            near = taught[first[i] : first[i] + 4].double()
            wanted = torch.stack([weight[i] * near[j] for j, weight in enumerate(four)]).sum(0)
            total = total + _error(x, wanted).mean() / torch.hypot(alpha[i], sigma[i])
        return total / max(len(y), 1)

    def errors(self, plan: Plan, index: torch.Tensor, target: torch.Tensor, at_once: int) -> torch.Tensor:
        """Return the error of every noise of `index`, (M,)."""
        import torch

        found = []
        for part in index.split(at_once):
            with torch.no_grad():
                rows = part.to(self.noise.device)
                x = sample(lambda x, t, rows=rows: self.model(x, t, rows), self.noise[part], plan)  # type: ignore[misc]
            found.append(_error(x, target[part]))
        return torch.cat(found)

    def optimise(self, steps: int, index: torch.Tensor, taught: torch.Tensor, batch: int, iterations: int) -> Plan:
        """Return the plan after `iterations` steps of Adam (Kingma and Ba 2015) on the logarithm of the mean error.

        That is of the error at the end, and by the way on average. theta: corrections of the coefficients in the basis
        of `whiten`, where each moves x' by about as much.
        """
        import torch

        state = {name: value for name, value in self.memory.state.items() if name != "taught"}
        if not state:
            first, size = index[: 2 * batch], float(taught[-1].double().square().mean().sqrt())
            order, y = self.begin(steps, first, taught[-1])
            start = {"y": y, "theta": y.new_zeros(steps, 2 + HISTORY)}
            moments = {f"{name}.{m}": torch.zeros_like(value) for name, value in start.items() for m in ("m1", "m2")}
            counts = {"done": torch.tensor([0]), "order": torch.tensor([order])}
            state = {"basis": self.whiten(y, order, first, size), **counts, **start, **moments}

        def table(y: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
            return self.table(y, (theta[:, None] @ state["basis"])[:, 0], int(state["order"]))

        for i in range(int(state["done"]), iterations):
            rows = index[_turn(len(index), batch, i)]
            y, theta = (state[name].clone().requires_grad_() for name in PACE)
            passed = self.run(table(y, theta), rows)
            error = _error(passed[-1], taught[-1, rows]).mean()
            loss = error + self.astray(passed, taught[:-1, rows], y)
            grads = torch.autograd.grad(loss.log(), (y, theta), allow_unused=True, materialize_grads=True)
            adam(state, dict(zip(PACE, grads, strict=True)), i, iterations)
            state["y"] = self.ladder.apart(state["y"])
            state["done"] = torch.tensor([i + 1])
            self.memory.keep({"taught": taught, **state}, last=i + 1 == iterations)
            self.report(self.total - iterations + i, f"tuning {steps} steps: error {error.item():.4f}")
        return self.plan(state["y"], table(state["y"], state["theta"]))

    def begin(self, steps: int, index: torch.Tensor, target: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Return the order and y of the plain method that does best from the noises `index`, of a few."""
        import torch

        found = []
        for order, low in itertools.product((1, 2), (0.8, 1.6)):
            y = self.ladder.spread(steps, low / steps, 15.0)
            with torch.no_grad():
                error = _error(self.run(self.table(y, 0.0, order), index)[-1], target[index]).mean()
            found.append((float(error.nan_to_num(nan=math.inf)), order, y))
        return min(found, key=lambda one: one[0])[1:]

    def whiten(self, y: torch.Tensor, order: int, index: torch.Tensor, size: float) -> torch.Tensor:
        """Return the basis of corrections, (calls, 2 + HISTORY, 2 + HISTORY), `size` being x's standard deviation.

        A call's correction adds a sum of features (x, x0, h1, …) to x'. Those are nearly the same picture: the basis
        makes sums of them that are uncorrelated and of one size, on the trajectories of the plain method.
        """
        import torch

        seen: list[torch.Tensor] = []
        with torch.no_grad():
            self.run(self.table(y, 0.0, order), index, seen)
        basis = torch.zeros(len(seen), 2 + HISTORY, 2 + HISTORY, dtype=torch.float64)
        for i, features in enumerate(seen):
            flat = features.flatten(1).double().cpu()
            gram = flat @ flat.T / flat.shape[1] + (FLOOR * size) ** 2 * torch.eye(len(flat), dtype=torch.float64)
            basis[i, : len(flat), : len(flat)] = size * torch.linalg.inv(torch.linalg.cholesky(gram))
        return basis

    def plan(self, y: torch.Tensor, table: torch.Tensor) -> Plan:
        """Return `table`, whose levels are at y, as a plan."""
        levels = self.ladder.columns(y)[:3].T.tolist()
        steps = table[:, [COLUMNS.index(name) for name in NAMES[3:]]].tolist()
        return plan_of([[*a, *b] for a, b in zip(levels, steps, strict=True)], self.ladder.scheduler)


def _error(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (x.cpu().double() - target.double()).flatten(1).square().mean(1).clamp(min=1e-16).sqrt()


def _turn(count: int, batch: int, i: int) -> np.ndarray:
    """Return which of `count` noises iteration i uses: all in turn, each time in another order."""
    places = [divmod(i * min(batch, count) + j, count) for j in range(min(batch, count))]
    orders = {turn: np.random.default_rng(turn).permutation(count) for turn, _ in places}
    return np.array([orders[turn][place] for turn, place in places])


def adam(state: State, grads: dict[str, torch.Tensor], i: int, iterations: int) -> None:
    """Move state's parameters against their clipped gradients, by steps that fall as a cosine; none if not finite."""
    size = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    if not math.isfinite(size):
        return
    pace = min(1.0, (i + 1) / 5) * (1 + math.cos(math.pi * i / iterations)) / 2
    for name, grad in grads.items():
        grad = grad * min(1.0, 5 / max(size, 1e-12))
        m1 = state[f"{name}.m1"] = 0.9 * state[f"{name}.m1"] + 0.1 * grad
        m2 = state[f"{name}.m2"] = 0.95 * state[f"{name}.m2"] + 0.05 * grad.square()
        way = m1 / (1 - 0.9 ** (i + 1)) / ((m2 / (1 - 0.95 ** (i + 1))).sqrt() + 1e-8)
        state[name] = state[name] - pace * PACE[name] * way


def _told(model: Model, noise: torch.Tensor, ladder: Ladder) -> Model:
    """Return the model with a gradient in t: its own, or one by differences where it has none (tables, numpy)."""
    import torch

    x = (ladder.scale * noise[:1]).float().requires_grad_()
    t = x.detach().new_full((1,), ladder.first[0] / 2)
    index = torch.zeros(1, dtype=torch.int64, device=x.device)

    def slopes(*given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out = model(x, given[-1], index)
        return torch.autograd.grad(out.sum(), [g for g in given if g.requires_grad], allow_unused=True)

    def differences(x: torch.Tensor, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = model(x, t.detach(), index)
        if not (torch.is_grad_enabled() and t.requires_grad):
            return out
        with torch.no_grad():
            slope = (out - model(x, t - ladder.tick, index)) / ladder.tick
        return out + slope * (t - t.detach()).view(-1, *[1] * (x.ndim - 1)).to(out.dtype)

    try:
        if all(found is not None for found in slopes(x, t.clone().requires_grad_())):
            return model
    except RuntimeError:
        pass  # torch's word for an operation without gradient; what follows asks for that in x alone
    try:
        if slopes(x, t)[0] is not None:
            return differences
        reason = "its output does not depend on x"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    raise InputError(f"model: lets no gradient through: {reason}")
