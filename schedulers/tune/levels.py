"""The noise levels of a fitted plan, and the coefficients of a multistep method at them; both differentiable."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from genkit.schedulers.prediction import PREDICTIONS
from genkit.schedulers.scheduler import Scheduler
from genkit.schedulers.solvers import HISTORY
from genkit.schedulers.spacing import RHO

if TYPE_CHECKING:
    import torch

MIN_GAP = 0.02  # least distance of two levels in log(sigma / alpha)


@dataclasses.dataclass(frozen=True)
class TrainedLevels:
    """The noise levels that a network was trained at, as functions of y = log(sigma / alpha).

    first: (t, alpha, sigma) of the noisiest. timesteps, y: of the levels with finite sigma / alpha, least noise first.
    """

    scheduler: Scheduler
    first: tuple[float, float, float]
    timesteps: np.ndarray
    y: np.ndarray

    @classmethod
    def of(cls, scheduler: Scheduler) -> TrainedLevels:
        every = np.arange(scheduler.num_train_timesteps, dtype=float)
        levels = scheduler.levels(every)
        finite = np.isfinite(levels.ve_sigma)
        t, alpha, sigma = (float(column[-1]) for column in levels)
        return cls(scheduler, (t, alpha, sigma), every[finite], np.log(levels.ve_sigma[finite]))

    @property
    def noise_scale(self) -> float:
        """The standard deviation of x at the first level, for data of unit variance: that of the initial noise."""
        return math.hypot(self.first[1], self.first[2])

    @property
    def half_timestep(self) -> float:
        """About half the distance of two training timesteps, as passed to the network."""
        low, high = (float(self.scheduler.levels(np.array([t])).t[0]) for t in self.timesteps[[0, -1]])
        return (high - low) / (2 * len(self.timesteps))

    def spaced(self, calls: int, low: float, high: float) -> torch.Tensor:
        """Return y, (calls - 1,), of all calls but the first: sigma / alpha from about `high` to `low`, as `karras`."""
        import torch

        most, least = (math.exp(np.clip(math.log(s), self.y[0], self.y[-1]) / RHO) for s in (high, low))
        count = calls - 1 + (self.first[2] <= high * self.first[1])  # whether the first level is one of them
        roots = np.linspace(most, least, max(count, 1))
        return self.separate(torch.from_numpy(RHO * np.log(roots[max(count, 1) - (calls - 1) :])))

    def separate(self, y: torch.Tensor) -> torch.Tensor:
        """Return y moved into the trained levels, each at least MIN_GAP below the one before."""
        import torch

        margin = MIN_GAP * torch.arange(len(y), dtype=y.dtype)
        y = torch.cummin((y + margin).clamp(max=self.y[-1] - MIN_GAP), 0).values - margin
        return torch.maximum(y, self.y[0] + margin.flip(0))

    def columns(self, y: torch.Tensor) -> torch.Tensor:
        """Return t, alpha, sigma, c_in, px and pm, (6, calls), of the first level and of those at y, (calls - 1,).

        Differentiable in y by finite differences, so that any noise schedule will do.
        """
        import torch

        prediction = PREDICTIONS[self.scheduler.prediction]

        def at(y: np.ndarray) -> np.ndarray:
            levels = self.scheduler.levels(np.interp(y, self.y, self.timesteps))
            t, alpha, sigma = (np.concatenate([[f], a]) for f, a in zip(self.first, levels, strict=True))
            return np.stack([t, alpha, sigma, prediction.c_in(alpha, sigma), *prediction.to_x0(alpha, sigma)])

        here, h = y.detach().numpy(), 1e-4
        slope = (at(here + h) - at(here - h))[:, 1:] / (2 * h)
        moved = torch.from_numpy(slope) * (y - y.detach())
        return torch.from_numpy(at(here)) + torch.nn.functional.pad(moved, (1, 0))


def coefficients(alpha: torch.Tensor, sigma: torch.Tensor, order: int) -> torch.Tensor:
    """Return (cx, c0, c1, …) of each step of a multistep method to sigma 0, (calls, 2 + HISTORY).

    x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) mean of x0 over 1/s from 1/s to 1/s', s = sigma / alpha, x0
    being the polynomial through the last `order` predictions in u = log((s + 1/2) / (1 + (s + 1/2) / 50)), which is
    finite for s from 0 to infinity.
    """
    import torch

    def u(s: torch.Tensor) -> torch.Tensor:
        return -(1 / (s + 0.5) + 0.02).log()

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))
    share, weights = (nodes + 1) / 2, weights / 2
    s = sigma / alpha.clamp(min=1e-9)
    zero, places = s.new_zeros(1), u(s)
    s_to, alpha_to, sigma_to = torch.cat([s[1:], zero]), torch.cat([alpha[1:], zero + 1]), torch.cat([sigma[1:], zero])
    rows = []
    for i in range(len(s)):
        known = places[max(0, i + 1 - order) : i + 1].flip(0)
        inside = u(s[i] * s_to[i] / ((1 - share) * s_to[i] + share * s[i]))[:, None]
        each = []
        for j in range(len(known)):
            others = torch.cat([known[:j], known[j + 1 :]])
            each.append((weights * ((inside - others) / (known[j] - others)).prod(1)).sum())
        cx = sigma_to[i] / sigma[i]
        row = torch.cat([cx[None], (alpha_to[i] - alpha[i] * cx) * torch.stack(each)])
        rows.append(torch.nn.functional.pad(row, (0, 2 + HISTORY - len(row))))
    return torch.stack(rows)
