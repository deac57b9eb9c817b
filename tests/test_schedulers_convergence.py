"""Orders of convergence and distributions on data whose exact network is known in closed form: a Gaussian mixture."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from genkit.schedulers import PREDICTIONS, SOLVERS, Scheduler, sample
from genkit.schedulers.solvers import Path, Row, SolverOptions

MEANS = torch.tensor([-1.2, 0.4, 1.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
STD = 0.35
NOISE = torch.linspace(-2.5, 2.5, 201, dtype=torch.float64).view(1, 1, 1, -1)
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "pndm": 2}
PROCESSES = [
    {"prediction": "epsilon"},
    {"prediction": "v_prediction"},
    {"prediction": "sample"},
    {"noise": "flow", "prediction": "flow_prediction"},
]


class Mixture:
    """The network that predicts the mixture exactly, on the levels of `scheduler`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.table = scheduler, scheduler.levels(np.arange(1000))

    def level(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.scheduler.noise == "flow":
            return 1 - t / 1000, t / 1000
        if torch.equal(t, t.round()):
            return torch.from_numpy(self.table.alpha)[t.long()], torch.from_numpy(self.table.sigma)[t.long()]
        # the timestep of a level between two of the table is linear in log(sigma / alpha)
        k = torch.from_numpy(np.exp(np.interp(t.numpy(), self.table.t, np.log(self.table.k))))
        return (1 + k**2) ** -0.5, k * (1 + k**2) ** -0.5

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in self.level(t))
        variance = (alpha**2 * STD**2 + sigma**2)[..., None]
        away = x[..., None] - alpha[..., None] * MEANS
        weight = (WEIGHTS.log() - away**2 / (2 * variance)).softmax(dim=-1)
        x0 = (weight * (MEANS + alpha[..., None] * STD**2 / variance * away)).sum(dim=-1)
        return PREDICTIONS[self.scheduler.prediction].target(x0, (x - alpha * x0) / sigma, alpha, sigma)


def end(solver: str, steps: int, **options: Any) -> torch.Tensor:
    """Where a solver leads from fixed noise, between the largest finite and the least trained level."""
    scheduler = Scheduler(solver=solver, spacing="karras", final="sigma_min", lower_order_final=False, **options)
    return sample(Mixture(scheduler), NOISE, scheduler.plan(steps))


def measured_order(solver: str, process: dict[str, Any]) -> float:
    exact = end("heun", 900, **process)
    coarse, fine = (float((end(solver, n, **process) - exact).abs().mean()) for n in (60, 120))
    return math.log2(coarse / fine)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p["prediction"])
@pytest.mark.parametrize("solver", ORDERS)
def test_a_solver_reaches_its_order(solver: str, process: dict[str, Any]) -> None:
    assert measured_order(solver, process) >= ORDERS[solver] - 0.25


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "pndm"])
def test_a_wrong_coefficient_loses_the_order(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: 5 % less weight on the history, given to the call itself, costs an order."""
    right = SOLVERS[solver]

    def wrong(path: Path, options: SolverOptions) -> list[Row]:
        return [
            dataclasses.replace(r, c=tuple(0.95 * c for c in r.c), c0=r.c0 + 0.05 * sum(r.c))
            for r in right.rows(path, options)
        ]

    monkeypatch.setitem(SOLVERS, solver, dataclasses.replace(right, rows=wrong))
    assert measured_order(solver, PROCESSES[2] if solver == "pndm" else PROCESSES[0]) < ORDERS[solver] - 0.25


@pytest.mark.parametrize(
    "process", [{"prediction": "v_prediction", "zero_snr": True}, PROCESSES[3]], ids=["zero-snr", "flow"]
)
@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "ddpm"] + ["ddpm"])
def test_a_solver_reaches_the_distribution_from_pure_noise(solver: str, process: dict[str, Any]) -> None:
    scheduler = Scheduler(solver=solver, spacing="trailing", **process)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 100, 200, generator=generator, dtype=torch.float64)
    found = sample(Mixture(scheduler), noise, scheduler.plan(125), generator).flatten()
    mode = MEANS[torch.multinomial(WEIGHTS, len(found), True, generator=generator)]
    true = mode + STD * torch.randn(len(found), generator=generator, dtype=torch.float64)
    distance = float((found.sort().values - true.sort().values).abs().mean())
    assert distance < 0.05  # two sets of true draws lie some 0.02 apart
