"""A plan: every number that the steps of one trajectory need, and the one formula that uses them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.schedulers.prediction import PREDICTIONS
from genkit.schedulers.solvers import HISTORY, Level, Row

if TYPE_CHECKING:
    import torch

# t: timestep passed to the network. c_in: scale of x at the network's input. px, pm: x0_raw = px x + pm output. clip:
# bound on |x0|; with a `quantile`, the bound on that quantile of |x0|, which x0 is divided by. cx, c0, cr, cn: weights
# of x, x0, x0_raw and noise. hx, h0: the call's history entry, h = hx x + h0 x0. c1 …: weights of earlier entries,
# newest first.
COLUMNS = (
    "t", "c_in", "px", "pm", "clip", "quantile", "cx", "c0", "cr", "cn", "hx", "h0",
    *(f"c{i + 1}" for i in range(HISTORY)),
)  # fmt: skip
_C1 = COLUMNS.index("c1")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The coefficients of one trajectory. table: (calls, len(COLUMNS)), float64.

    alphas, sigmas: the noise level at each call and at the end, (calls + 1,). start: the first x is start[0] * x0 +
    start[1] * unit noise. consumes_noise: whether the step after a call takes a noise tensor, (calls,) bool.
    """

    table: np.ndarray
    alphas: np.ndarray
    sigmas: np.ndarray
    start: tuple[float, float]
    consumes_noise: np.ndarray

    @property
    def nfe(self) -> int:
        """Network calls."""
        return len(self.table)

    @property
    def timesteps(self) -> np.ndarray:
        """The timestep passed to the network at each call, (calls,)."""
        return self["t"]

    @functools.cached_property
    def threshold(self) -> bool:
        """Whether x0 is bounded by its own quantile (dynamic thresholding)."""
        return bool(self["quantile"].any())

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the column `name` of COLUMNS, (calls,)."""
        return self.table[:, COLUMNS.index(name)]


def plan_from_rows(
    rows: list[Row], end: Level, prediction: str, start: tuple[float, float], clip: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> Plan:  # fmt: skip
    """Return the plan of a solver's rows, for a trajectory that ends at the level `end`."""
    levels = [*(r.level for r in rows), end]
    alpha, sigma = np.array([level.alpha for level in levels]), np.array([level.sigma for level in levels])
    px, pm = PREDICTIONS[prediction].to_x0(alpha[:-1], sigma[:-1])
    scale = PREDICTIONS[prediction].c_in(alpha[:-1], sigma[:-1])
    quantile, bound = threshold or (0.0, np.inf if clip is None else clip)
    table = np.zeros((len(rows), len(COLUMNS)))
    for i, r in enumerate(rows):
        table[i, :_C1] = r.level.t, scale[i], px[i], pm[i], bound, quantile, r.cx, r.c0, r.cr, r.cn, *r.history
        table[i, _C1 : _C1 + len(r.c)] = r.c[:HISTORY]
    return Plan(table, alpha, sigma, start, np.array([r.cn != 0 or r.consumes_noise for r in rows]))


def step(
    x: torch.Tensor, output: torch.Tensor, rows: torch.Tensor, history: torch.Tensor, noise: torch.Tensor | float,
    threshold: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (x', h): the next x, and the new history entry, both (B, C, H, W).

    x, output, noise: (B, C, H, W); noise may be 0 when no sample consumes it. rows: (len(COLUMNS), B, 1, 1, 1), each
    sample's row of its own plan. history: (HISTORY, B, C, H, W), newest first, 0 where there is none yet. threshold:
    whether any plan has a quantile. Nothing branches on values, so samples at different steps of different solvers
    share a batch.
    """
    _, _, px, pm, clip, quantile, cx, c0, cr, cn, hx, h0 = rows[:_C1]
    raw = px * x + pm * output
    x0 = raw.minimum(clip).maximum(-clip)
    if threshold:
        x0 = dynamic_threshold(raw, quantile, clip).where(quantile > 0, x0)
    past = (rows[_C1:] * history).sum(dim=0)
    return cx * x + c0 * x0 + cr * raw + cn * noise + past, hx * x + h0 * x0


def dynamic_threshold(x0: torch.Tensor, quantile: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Clip each sample of x0 (B, …) to the quantile of its absolute values, from 1 to `most`, and divide by that.

    quantile, most: (B, 1, 1, 1). Saharia et al. 2022 (Imagen), section 2.3.
    """
    import torch

    sizes = x0.abs().flatten(1)
    wanted = quantile.expand(len(x0), *quantile.shape[1:]).flatten().to(sizes.dtype)
    found = torch.stack([torch.quantile(size, q) for size, q in zip(sizes, wanted, strict=True)])
    bound = found.view(-1, *[1] * (x0.ndim - 1)).clamp(min=1).minimum(most)
    return x0.minimum(bound).maximum(-bound) / bound


def sample(
    model: Callable[[Any, Any], Any], noise: torch.Tensor, plan: Plan, generator: torch.Generator | None = None,
    x0: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the sample that `plan` reaches from unit noise (B, C, H, W), or from the image x0 with that noise added.

    model(x, t) -> raw prediction, t (B,). Step noise comes from `generator`. Computes in float64 for float64 noise,
    else in float32. x is alpha x0 + sigma eps throughout, whatever the solver.
    """
    import torch

    dtype = noise.dtype if noise.dtype == torch.float64 else torch.float32
    x = plan.start[1] * noise.to(dtype) + (0 if x0 is None else plan.start[0] * x0.to(dtype))
    history = x.new_zeros(HISTORY, *x.shape)
    table = torch.from_numpy(plan.table).to(x.device, dtype)
    for line, consumes_noise in zip(table, plan.consumes_noise, strict=True):
        rows = line.view(-1, *[1] * x.ndim)
        drawn: torch.Tensor | float = 0.0
        if consumes_noise:
            device = x.device if generator is None else generator.device
            drawn = torch.randn(x.shape, generator=generator, device=device, dtype=dtype).to(x.device)
        output = model(rows[1] * x, line[0].expand(len(x)))
        x, new = step(x, output.to(dtype), rows, history, drawn, plan.threshold)
        history = torch.cat([new[None], history[:-1]])
    return x
