"""Prediction axis: what the network's output means, as x0 = px * x + pm * output, and as a training target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Prediction:
    """to_x0(alpha, sigma) -> (px, pm); target(x0, eps, alpha, sigma) -> what the network is trained to give.

    The target takes arrays or tensors that broadcast.
    """

    to_x0: Callable[[Array, Array], tuple[Array, Array]]
    target: Callable[[Any, Any, Any, Any], Any]


def _epsilon(alpha: Array, sigma: Array) -> tuple[Array, Array]:
    return 1 / alpha, -sigma / alpha


def _v(alpha: Array, sigma: Array) -> tuple[Array, Array]:
    square = alpha**2 + sigma**2
    return alpha / square, -sigma / square


def _sample(alpha: Array, sigma: Array) -> tuple[Array, Array]:
    return np.zeros_like(alpha), np.ones_like(alpha)


def _flow(alpha: Array, sigma: Array) -> tuple[Array, Array]:
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)


PREDICTIONS = {
    "epsilon": Prediction(_epsilon, lambda x0, eps, alpha, sigma: eps),  # Ho et al. 2020
    "v_prediction": Prediction(_v, lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0),  # Salimans and Ho 2022
    "sample": Prediction(_sample, lambda x0, eps, alpha, sigma: x0),
    "flow_prediction": Prediction(_flow, lambda x0, eps, alpha, sigma: eps - x0),  # Lipman et al. 2023, Liu et al. 2023
}
