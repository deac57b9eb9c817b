"""Prediction axis: what the network's output means, as x0 = px * x + pm * output and as a training target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
SIGMA_DATA = 0.5  # standard deviation of the data in EDM's preconditioning


@dataclasses.dataclass(frozen=True)
class Prediction:
    """to_x0(alpha, sigma) -> (px, pm); target(x0, eps, alpha, sigma) -> the output that the network is trained for.

    target takes arrays or tensors that broadcast. c_in(alpha, sigma): the scale of x at the network's input.
    """

    to_x0: Callable[[Array, Array], tuple[Array, Array]]
    target: Callable[[Any, Any, Any, Any], Any]
    c_in: Callable[[Array, Array], Array] = lambda alpha, sigma: np.ones_like(alpha)


def _v(alpha: Array, sigma: Array) -> tuple[Array, Array]:
    square = alpha**2 + sigma**2
    return alpha / square, -sigma / square


def _edm(sign: float) -> Prediction:
    """Karras et al. 2022, table 1: x0 = c_skip x + c_out output; sign -1: v_prediction of diffusers' EDM classes."""

    def to_x0(alpha: Any, sigma: Any) -> tuple[Any, Any]:
        square = sigma**2 + (alpha * SIGMA_DATA) ** 2
        return alpha * SIGMA_DATA**2 / square, sign * sigma * SIGMA_DATA / square**0.5

    def target(x0: Any, eps: Any, alpha: Any, sigma: Any) -> Any:
        px, pm = to_x0(alpha, sigma)
        return (x0 - px * (alpha * x0 + sigma * eps)) / pm

    return Prediction(to_x0, target, lambda alpha, sigma: 1 / np.sqrt(sigma**2 + (alpha * SIGMA_DATA) ** 2))


PREDICTIONS = {
    # Ho et al. 2020
    "epsilon": Prediction(lambda alpha, sigma: (1 / alpha, -sigma / alpha), lambda x0, eps, alpha, sigma: eps),
    # Salimans and Ho 2022
    "v_prediction": Prediction(_v, lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0),
    "sample": Prediction(
        lambda alpha, sigma: (np.zeros_like(alpha), np.ones_like(alpha)), lambda x0, eps, alpha, sigma: x0
    ),
    # Lipman et al. 2023, Liu et al. 2023
    "flow_prediction": Prediction(
        lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)), lambda x0, eps, alpha, sigma: eps - x0
    ),
    "edm": _edm(1.0),
    "edm_v": _edm(-1.0),
}
