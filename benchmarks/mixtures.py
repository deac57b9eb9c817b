"""Data whose exact network is known: Gaussian mixtures, as denoisers under any noise schedule, guided or not."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import torch

from genkit.schedulers import PREDICTIONS, Scheduler

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Gaussians with covariances U diag(power) U' + floor^2 I: low-rank detail over a small floor; float64.

    means (K, D), axes U (K, D, R), power (K, R), weights (K,); scaled so that the whole has a standard deviation of 1.
    """

    means: Tensor
    axes: Tensor
    power: Tensor
    floor: float
    weights: Tensor

    @classmethod
    def draw(cls, seed: int, dim: int, modes: int, rank: int, floor: float, decay: float = 1.0) -> Mixture:
        """Draw a mixture; the power spectrum of a mode falls as 1 / r^decay."""
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(modes, dim, generator=g, dtype=torch.float64)
        axes = torch.linalg.qr(torch.randn(modes, dim, rank, generator=g, dtype=torch.float64)).Q
        spread = 0.5 + torch.rand(modes, 1, generator=g, dtype=torch.float64)
        power = spread * dim / rank / torch.arange(1, rank + 1, dtype=torch.float64) ** decay
        weights = (0.5 + torch.rand(modes, generator=g, dtype=torch.float64)).log().softmax(0)
        means = means - (weights[:, None] * means).sum(0)
        variance = (weights * ((means**2).sum(1) + power.sum(1) + dim * floor**2)).sum() / dim
        scale = float(variance) ** -0.5
        return cls(means * scale, axes, power * scale**2, floor * scale, weights)

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor, modes: int | None = None) -> Tensor:
        """Return E[x0 | x] for x (B, D) at alpha, sigma (B, 1), of the first `modes` modes only when given."""
        means, axes, power = self.means[:modes], self.axes[:modes], self.power[:modes] + self.floor**2
        modes, dim, rank = axes.shape
        flat = axes.permute(1, 0, 2).reshape(dim, modes * rank)  # matrix products alone: nothing of size (B, K, D)
        inner = (x @ flat).view(-1, modes, rank) - alpha[..., None] * torch.einsum("kd,kdr->kr", means, axes)
        away = (x**2).sum(1, keepdim=True) - 2 * alpha * (x @ means.T) + alpha**2 * (means**2).sum(1)  # squared, (B, K)
        rest = alpha**2 * self.floor**2 + sigma**2  # (B, 1)
        along = alpha[..., None] ** 2 * power + sigma[..., None] ** 2  # (B, K, R)
        distance = (inner**2 / along).sum(-1) + (away - (inner**2).sum(-1)) / rest
        spread = along.log().sum(-1) + (dim - rank) * rest.log()
        weight = (self.weights[:modes].log() - (distance + spread) / 2).softmax(1)
        gain = alpha[..., None] * (power / along - self.floor**2 / rest[..., None])
        share = alpha * self.floor**2 / rest
        detail = (weight[..., None] * gain * inner).flatten(1) @ flat.T
        return share * x + (1 - share * alpha) * (weight @ means) + detail


@dataclasses.dataclass(frozen=True)
class Exact:
    """The network that knows the mixture, in the prediction and on the levels of `scheduler`; model(x, t) -> raw.

    guidance: of E[x0] towards the first eighth of the modes. Between whole timesteps log(sigma / alpha) is linear in t.
    """

    mixture: Mixture
    scheduler: Scheduler
    guidance: float = 1.0

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at timesteps (B,), each (B, 1)."""
        n = self.scheduler.num_train_timesteps
        if self.scheduler.noise == "flow":
            s = (t.double() / n)[:, None]
            return 1 - s, s
        table = self.scheduler.levels(np.arange(n))
        whole = t.double().round()
        if torch.equal(whole, t.double()):
            index = whole.long()
            return torch.from_numpy(table.alpha)[index][:, None], torch.from_numpy(table.sigma)[index][:, None]
        finite = np.isfinite(table.ve_sigma)
        k = np.exp(np.interp(t.double().numpy(), table.t[finite], np.log(table.ve_sigma[finite])))
        alpha = torch.from_numpy(1 / np.sqrt(1 + k**2))[:, None]
        return alpha, torch.from_numpy(k)[:, None] * alpha

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the (guided) E[x0 | x] of x (B, D) at alpha, sigma (B, 1)."""
        x0 = self.mixture.x0(x, alpha, sigma)
        if self.guidance == 1:
            return x0
        towards = self.mixture.x0(x, alpha, sigma, modes=len(self.mixture.weights) // 8)
        return x0 + self.guidance * (towards - x0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.level(t)
        flat = x.flatten(1)
        x0 = self.denoise(flat, alpha, sigma)
        eps = (flat - alpha * x0) / sigma
        return PREDICTIONS[self.scheduler.prediction].target(x0, eps, alpha, sigma).view_as(x)


def solve(model: Exact, x: Tensor, first: tuple[float, float], steps: int = 240) -> Tensor:
    """Return where the probability-flow ODE leads from x (B, D) at `first` = (alpha, sigma): RK4 in angle.

    With x / sqrt(alpha^2 + sigma^2) = cos(a) x0 + sin(a) eps the ODE is dx/da = v, smooth from pure noise to the end.
    """
    x = x / math.hypot(*first)
    angles = np.linspace(math.atan2(first[1], first[0]), 0, steps + 1)

    def v(x: Tensor, angle: float) -> Tensor:
        c, s = (x.new_full((len(x), 1), f(angle)) for f in (math.cos, math.sin))
        if angle == 0:
            return torch.zeros_like(x)  # at no noise E[eps | x] is 0, and x0 enters with sin(0)
        x0 = model.denoise(x, c, s)
        return (c * x - x0) / s

    for a, b in itertools.pairwise(angles):
        h, middle = b - a, (a + b) / 2
        k1 = v(x, a)
        k2 = v(x + h / 2 * k1, middle)
        k3 = v(x + h / 2 * k2, middle)
        k4 = v(x + h * k3, b)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x
