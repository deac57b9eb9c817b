"""Differentiable trajectories of a plan, the teacher's trajectories of many calls, and the distance between the two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from genkit.errors import InputError
from genkit.schedulers.plan import COLUMNS, Plan, sample, step
from genkit.schedulers.solvers import HISTORY
from genkit.schedulers.spacing import RHO
from genkit.schedulers.tune.levels import TrainedLevels, coefficients
from genkit.schedulers.tuned import NAMES, Checkpoint, plan_of

if TYPE_CHECKING:
    import torch

    Model = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

TEACHER_CALLS, TEACHER_STRIDE = 98, 4  # calls of the teacher's plan; of how many calls one x is kept
TEACHER_RANGE = 0.02, 40.0  # its lowest and highest sigma / alpha, within those that the network was trained at


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Trajectories of a model from unit noise (M, C, H, W). lean: recompute each call in the backward pass."""

    model: Model
    levels: TrainedLevels
    noise: torch.Tensor
    lean: bool

    def table(self, y: torch.Tensor, correction: torch.Tensor | float, order: int) -> torch.Tensor:
        """Return a plan's table, (calls, len(COLUMNS)): the multistep method at levels y, (cx, c0, c1, …) corrected."""
        import torch

        columns = dict(zip(("t", "alpha", "sigma", "c_in", "px", "pm"), self.levels.columns(y), strict=True))
        free = coefficients(columns["alpha"], columns["sigma"], order) + correction
        columns |= dict(zip(NAMES[3:], free.T, strict=True))
        clip = self.levels.scheduler.clip
        columns |= {"clip": free.new_full((len(free),), math.inf if clip is None else clip)}
        columns |= {"h0": free.new_ones(len(free))}
        return torch.stack([columns.get(name, free.new_zeros(len(free))) for name in COLUMNS], dim=1)

    def plan(self, y: torch.Tensor, table: torch.Tensor) -> Plan:
        levels = self.levels.columns(y)[:3].T.tolist()
        steps = table[:, [COLUMNS.index(name) for name in NAMES[3:]]].tolist()
        return plan_of([[*a, *b] for a, b in zip(levels, steps, strict=True)], self.levels.scheduler)

    def run(
        self, table: torch.Tensor, index: torch.Tensor, features: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Return x after each call, from the noises `index`; (x, x0, h1, …) of every call is appended to `features`."""
        import torch
        from torch.utils.checkpoint import checkpoint

        x = self.levels.noise_scale * self.noise[index].to(torch.promote_types(self.noise.dtype, torch.float32))
        history, index = x.new_zeros(HISTORY, *x.shape), index.to(x.device)
        states = []
        for i, line in enumerate(table.to(x.device, x.dtype)):
            row = dict(zip(COLUMNS, line, strict=True))
            t = row["t"] if i else row["t"].detach()  # the first level is fixed
            given = row["c_in"] * x, t.expand(len(x)), index
            again = self.lean and torch.is_grad_enabled()
            output = (checkpoint(self.model, *given, use_reentrant=False) if again else self.model(*given)).to(x.dtype)
            if features is not None:
                x0 = (row["px"] * x + row["pm"] * output).clamp(-row["clip"], row["clip"])
                features.append(torch.cat([x[None], x0[None], history[:i]]))
            x, new = step(x, output, line.view(-1, *[1] * x.ndim), history, 0.0)
            history = torch.cat([new[None], history[:-1]])
            states.append(x)
        return states

    def errors(self, plan: Plan, index: torch.Tensor, target: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the error of every noise of `index` at the end of `plan`, (len(index),)."""
        import torch

        found = []
        for part in index.split(batch):
            with torch.no_grad():
                rows = part.to(self.noise.device)
                x = sample(lambda x, t, rows=rows: self.model(x, t, rows), self.noise[part], plan)  # type: ignore[misc]
            found.append(rms(x, target[part]))
        return torch.cat(found)

    def teach(self, batch: int, parts: int, checkpoint: Checkpoint, report: Callable[[int, str], None]) -> torch.Tensor:
        """Return the teacher's x at every TEACHER_STRIDE-th level and at the end, (levels + 1, M, C, H, W), on the CPU.

        Parts that the checkpoint holds are not computed again. Raises InputError for values that are not finite.
        """
        import torch

        table = self.table(self.levels.spaced(TEACHER_CALLS, *TEACHER_RANGE), 0.0, order=3)
        found = [*checkpoint.state["taught"].split(batch, dim=1)] if "taught" in checkpoint.state else []
        for part in range(len(found), parts):
            report(part, f"solving in {TEACHER_CALLS} steps")
            index = torch.arange(part * batch, min((part + 1) * batch, len(self.noise)))
            with torch.no_grad():
                states = self.run(table, index)
            found.append(torch.stack([*states[:-1:TEACHER_STRIDE], states[-1]]).cpu())
            checkpoint.save({"taught": torch.cat(found, dim=1)})
        if not all(part.isfinite().all() for part in found):
            raise InputError("model: its solution of many steps has values that are not finite")
        return torch.cat(found, dim=1)

    def deviation(self, states: list[torch.Tensor], teacher: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean distance of x at the levels y from the teacher's, relative to the standard deviation of x.

        The teacher's levels are even in (sigma / alpha)^(1/RHO); between them its x is the cubic through the next four.
        """
        import torch

        known = (self.levels.spaced(TEACHER_CALLS, *TEACHER_RANGE)[::TEACHER_STRIDE] / RHO).exp()
        place = (((y / RHO).exp() - known[0]) * (len(known) - 1) / (known[-1] - known[0])).clamp(0, len(known) - 1)
        first = place.detach().long().clamp(1, len(known) - 3) - 1
        f = place - first
        a, b, c = 1 - f, 2 - f, 3 - f
        weights = a * b * c / 6, f * b * c / 2, -f * a * c / 2, f * a * b / 6
        alpha, sigma = self.levels.columns(y)[1:3, 1:]
        total = y.new_zeros(())
        for i, x in enumerate(states[:-1]):
            four = teacher[first[i] : first[i] + 4].double()
            target = torch.stack([weight[i] * four[j] for j, weight in enumerate(weights)]).sum(0)
            total = total + rms(x, target).mean() / torch.hypot(alpha[i], sigma[i])
        return total / max(len(y), 1)


def rms(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of x - target over the coordinates of each sample, (B,), at least 1e-8."""
    return (x.cpu().double() - target.double()).flatten(1).square().mean(1).clamp(min=1e-16).sqrt()
