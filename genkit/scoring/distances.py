"""Distances between generated and real pictures as distributions of features: FID, KID and CMMD."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

RESAMPLES, HALVES = 200, 20  # of the bootstrap, and of random half-samples


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of features (N, D) and (M, D) (Heusel et al. 2017, equation 6).

    Needs more pictures than dimensions; compare values only for equal numbers of pictures.
    """
    x, y = a.double(), b.double()
    c, d = torch.cov(x.T, correction=1), torch.cov(y.T, correction=1)
    # tr (C C')^(1/2) is the sum of the square roots of the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(c)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ d @ root).clamp(min=0).sqrt().sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + torch.trace(c) + torch.trace(d) - 2 * cross)


def kid(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4)."""
    x, y = a.double(), b.double()
    return _mmd(*((m / x.shape[1] + 1) ** 3 for m in (x @ x.T, y @ y.T, x @ y.T)))


def cmmd(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return 1000 squared MMD of unit CLIP embeddings with a Gaussian kernel of width 10 (Jayasumana et al. 2024)."""
    x, y = a.double(), b.double()
    within, other, across = (torch.cdist(p, q) ** 2 for p, q in ((x, x), (y, y), (x, y)))
    return 1000 * _mmd(*(torch.exp(-m / 200) for m in (within, other, across)))


def _mmd(xx: torch.Tensor, yy: torch.Tensor, xy: torch.Tensor) -> float:
    n, m = len(xx), len(yy)
    within = (xx.sum() - xx.diag().sum()) / (n * (n - 1)) + (yy.sum() - yy.diag().sum()) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def interval(values: list[float] | np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval of the mean of `values`."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return (float(x.mean()),) * 2 if len(x) else (float("nan"),) * 2
    picks = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.quantile(x[picks].mean(axis=1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def halved(distance: Callable[[torch.Tensor, torch.Tensor], float], a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the standard error of `distance(a, b)`: its deviation over random half-samples (Shao & Wu 1989)."""
    if min(len(a), len(b)) < 4:
        return float("nan")
    generator = torch.Generator().manual_seed(0)

    def half(x: torch.Tensor) -> torch.Tensor:
        return x[torch.randperm(len(x), generator=generator)[: len(x) // 2]]

    return float(np.std([distance(half(a), half(b)) for _ in range(HALVES)]))


DISTANCES = {"fid": frechet, "kid": kid, "cmmd": cmmd}
