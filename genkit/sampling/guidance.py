"""Classifier-free guidance: how two predictions become one, and at which calls of a plan there are two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from genkit.schedulers.plan import Plan

MOST = 1e6  # the highest noise level that an interval may name; levels without any signal count as this
Interval = Sequence[float] | Mapping[str, Sequence[float]]


def guide(
    cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor, total: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Return uncond + scale * (cond - uncond), classifier-free guidance (Ho and Salimans 2022, equation 6).

    Linear in the prediction, so it may act on eps, v, x0 or flow alike. `scale` broadcasts over (rows, C, H, W). total:
    the weights of the prompts of which `cond` is the weighted sum, together (Liu et al. 2022, equation 11).
    """
    return uncond + scale * (cond - total * uncond)


def embedded_guidance(scale: float, width: int) -> torch.Tensor:
    """Return the embedding of a guidance scale that latent consistency models read, (width,) float32.

    Sines and cosines of 1000 (scale - 1), as timesteps are embedded (Luo et al. 2023, section 4.2).
    """
    import torch

    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor((scale - 1) * 1000.0, dtype=torch.float32) * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))


def guidance_scales(plan: Plan, scale: float, interval: Interval | None = None) -> np.ndarray:
    """Return the guidance scale of every call of `plan`, shape (nfe,), float32; 1 where a call needs no second row.

    interval: [lo, hi] guides the calls from fraction lo to fraction hi of the plan, {"sigma": [lo, hi]} those at noise
    levels lo < sigma/alpha <= hi (Kynkäänniemi et al. 2024, equation 5: guidance harms at high noise levels and does
    nothing at low ones). None guides all of them.
    """
    scales = np.full(plan.nfe, max(scale, 1.0), dtype=np.float32)
    if interval is None:
        return scales
    if isinstance(interval, Mapping):
        low, high = interval["sigma"]
        with np.errstate(divide="ignore"):
            at = np.minimum(plan.sigmas[: plan.nfe] / plan.alphas[: plan.nfe], MOST)
        inside = (at > low) & (at <= high)
    else:
        low, high = interval
        at = np.arange(plan.nfe) / plan.nfe
        inside = (at >= low) & (at < high)
    return np.where(inside, scales, np.float32(1))


def network_rows(plan: Plan, scale: float, interval: Interval | None = None, weights: Sequence[float] = (1.0,)) -> int:
    """Return how many rows the network computes for one image: one a call and prompt, and one more where it is guided.

    weights: of the prompts that are composed; where they do not sum to 1, every call needs the row without a prompt.
    """
    return rows_of(plan.nfe, guidance_scales(plan, scale, interval), weights)


def rows_of(calls: int, scales: np.ndarray | None, weights: Sequence[float]) -> int:
    """Return `network_rows` for guidance scales at hand; None: no guidance."""
    guided = 0 if scales is None else int((scales > 1).sum())
    return calls * len(weights) + (guided if sum(weights) == 1 else calls)
