"""Order of convergence where the answer is known, mixed batches, every point on the four axes, and config errors."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genkit import InputError
from genkit.schedulers import COLUMNS, HISTORY, SOLVERS, SPACINGS, Scheduler, sample, scheduler_options, solvers, step
from genkit.schedulers.prediction import PREDICTIONS

MEANS = torch.tensor([-1.2, 0.4, 1.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
STD = 0.35


class Mixture:
    """A mixture of Gaussians seen through noise: the network that predicts it exactly is known in closed form."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.noise, self.prediction = scheduler._noise(), scheduler.prediction
        assert scheduler.noise != "flow"

    def x0(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance = alpha**2 * STD**2 + sigma**2
        away = x[..., None] - alpha[..., None] * MEANS
        log_weight = WEIGHTS.log() - away**2 / (2 * variance[..., None])
        mean = MEANS + alpha[..., None] * STD**2 / variance[..., None] * away
        return (log_weight.softmax(dim=-1) * mean).sum(dim=-1)

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        table = self.noise.table  # between its points the level is what `at_k` takes it for: log-linear
        k = torch.from_numpy(np.exp(np.interp(t.numpy(), table.t, np.log(table.k)))).reshape(-1, 1, 1, 1)
        alpha = (1 + k**2) ** -0.5
        sigma = torch.where(k.isinf(), 1.0, k * alpha)
        x0 = self.x0(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return PREDICTIONS[self.prediction].target(x0, eps, alpha, sigma)


def error(solver: str, steps: int, reference: torch.Tensor, **options: Any) -> float:
    """Mean distance from the exact solution, from sigma/alpha of some 3 down to the least trained one."""
    scheduler = Scheduler(solver=solver, spacing="karras", final="sigma_min", easy_end=False, **options)
    noise = torch.linspace(-2.5, 2.5, 201, dtype=torch.float64).reshape(1, 1, 1, -1)
    plan = scheduler.plan(steps)
    return float((sample(Mixture(scheduler), noise, plan) - reference).abs().mean())


def exact(prediction: str) -> torch.Tensor:
    scheduler = Scheduler(solver="heun", spacing="karras", final="sigma_min", prediction=prediction)
    noise = torch.linspace(-2.5, 2.5, 201, dtype=torch.float64).reshape(1, 1, 1, -1)
    return sample(Mixture(scheduler), noise, scheduler.plan(1000))


def measured_order(solver: str, prediction: str = "epsilon") -> float:
    reference = exact(prediction)
    coarse, fine = (error(solver, n, reference, prediction=prediction) for n in (60, 120))
    return math.log2(coarse / fine)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpmpp_2m", "pndm"])
def test_solver_reaches_its_order(solver: str, prediction: str) -> None:
    assert measured_order(solver, prediction) >= SOLVERS[solver].order - 0.25


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "pndm"])
def test_a_wrong_coefficient_loses_the_order(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: an error of a twentieth in what the history adds costs an order."""
    import dataclasses

    right = SOLVERS[solver]

    def wrong(path: solvers.Path, options: solvers.SolverOptions) -> list[solvers.Row]:
        return [
            dataclasses.replace(r, c=tuple(0.95 * c for c in r.c), c0=r.c0 + 0.05 * sum(r.c))
            for r in right.rows(path, options)
        ]

    monkeypatch.setitem(solvers.SOLVERS, solver, dataclasses.replace(right, rows=wrong))
    assert measured_order(solver) < right.order - 0.25


@pytest.mark.parametrize("solver", ["ddpm", "euler_ancestral", "sde-dpmpp_2m"])
def test_stochastic_solver_reaches_the_distribution(solver: str) -> None:
    scheduler = Scheduler(solver=solver, spacing="trailing", zero_snr=True, prediction="v_prediction")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 100, 200, generator=generator, dtype=torch.float64)
    x = sample(Mixture(scheduler), noise, scheduler.plan(200), generator).flatten()
    draws = MEANS[torch.multinomial(WEIGHTS, len(x), True, generator=generator)] + STD * torch.randn(
        len(x), generator=generator
    )
    distance = (x.sort().values - draws.sort().values).abs().mean()
    assert distance < 0.04  # two samples of this size lie some 0.015 apart


def test_mixed_batch_is_bitwise_each_run_alone() -> None:
    """Six requests with different solvers and steps share one batch; the network treats rows alike and apart."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.9 * x + t[:, None, None, None] / 1000)

    plans = [Scheduler(solver=s, spacing="karras").plan(n) for s, n in
             [("ddim", 7), ("heun", 5), ("dpmpp_2m", 9), ("pndm", 6), ("euler_ancestral", 8), ("sde-dpmpp_2m", 5)]]  # fmt: skip
    noise = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(k) for k in range(6)]
    alone = [sample(model, noise[k : k + 1], plans[k], torch.Generator().manual_seed(k)) for k in range(6)]
    x = noise * torch.tensor([p.start[1] for p in plans])[:, None, None, None]
    history = torch.zeros(HISTORY, *x.shape)
    live, at = list(range(6)), [0] * 6
    while live:
        table = torch.from_numpy(np.stack([plans[k].table[at[k]] for k in live], axis=1)).float()[..., None, None, None]
        drawn = torch.cat([torch.randn(1, 2, 4, 4, generator=generators[k]) if plans[k].draws[at[k]] else torch.zeros(1, 2, 4, 4)
                           for k in live])  # fmt: skip
        output = model(table[COLUMNS.index("c_in")] * x[live], table[0].flatten())
        new, left = step(x[live], output, table, history[:, live], drawn)
        x[live], history[:, live] = new, torch.cat([left[None], history[:-1, live]])
        at = [a + (k in live) for k, a in enumerate(at)]
        live = [k for k in live if at[k] < plans[k].nfe]
    for k in range(6):
        assert torch.equal(x[k : k + 1], alone[k]), plans[k]


@pytest.mark.parametrize("noise", ["linear", "scaled_linear", "cosine", "flow"])
def test_every_point_on_the_axes_runs_and_stays_finite(noise: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 2, 2, generator=generator)
    for spacing, prediction, solver, zero in itertools.product(SPACINGS, PREDICTIONS, SOLVERS, (False, True)):
        if (noise == "flow" or zero) and prediction == "epsilon":
            continue  # says nothing at pure noise: an error, tested below
        if noise == "flow" and (zero or solver in ("ddpm", "pndm")):
            continue
        if solver == "pndm" and zero:
            continue  # extrapolates eps over alpha, which pure noise does not have
        scheduler = Scheduler(noise=noise, spacing=spacing, prediction=prediction, solver=solver, zero_snr=zero)
        plan = scheduler.plan(7)
        assert np.isfinite(np.delete(plan.table, COLUMNS.index("clip"), axis=1)).all(), (
            spacing,
            prediction,
            solver,
            zero,
        )
        out = sample(lambda x, t: torch.tanh(x), x, plan, generator)
        assert torch.isfinite(out).all(), (spacing, prediction, solver, zero)


@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("noise", ["scaled_linear", "flow"])
def test_prediction_of_the_target_is_the_picture(noise: str, prediction: str) -> None:
    levels = Scheduler(noise=noise)._noise().at(np.array([20.0, 500.0, 900.0]))
    x0, eps = np.array([0.3, -1.0, 2.0]), np.array([-0.5, 0.1, 1.0])
    kind = PREDICTIONS[prediction]
    px, pm = kind.to_x0(levels.alpha, levels.sigma)
    x = levels.alpha * x0 + levels.sigma * eps
    assert np.allclose(px * x + pm * kind.target(x0, eps, levels.alpha, levels.sigma), x0)


def test_zero_snr_ends_in_pure_noise() -> None:
    assert Scheduler(zero_snr=True, prediction="v_prediction").plan(10).alphas[0] == 0
    assert Scheduler().plan(10).alphas[0] > 0.05
    with pytest.raises(InputError, match="epsilon says nothing about the picture at pure noise"):
        Scheduler(zero_snr=True).plan(10)


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.99, 1.0])
def test_strength_keeps_the_last_share_of_the_steps(strength: float) -> None:
    plan = Scheduler(solver="ddim").plan(10, strength)
    assert plan.nfe == int(10 * strength)
    assert (plan.start[0] > 0) == (strength < 1)


BAD_CONFIGS = [
    (
        {"_class_name": "DDIMScheduler", "beta_strat": 0.1},
        "'beta_strat': unknown key of DDIMScheduler (did you mean 'beta_start'?)",
    ),
    ({"_class_name": "DDIMSchedular"}, "'DDIMSchedular' is not supported (did you mean 'DDIMScheduler'?)"),
    ({"_class_name": "os.system"}, "'os.system' is not supported"),
    ({}, "_class_name: None is not supported"),
    ({"_class_name": "DDIMScheduler", "prediction_type": "banana"}, "prediction: 'banana' is not one of epsilon"),
    ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding: True is not supported"),
    ({"_class_name": "DDIMScheduler", "_private": 1}, "'_private': unknown key"),
    ({"_class_name": "DDIMScheduler", "beta_start": 0.5, "beta_end": 0.1}, "beta_end: 0.1 is less than beta_start"),
    ({"_class_name": "DDIMScheduler", "beta_start": -0.1}, "beta_start: -0.1 is not a number"),
    ({"_class_name": "DDIMScheduler", "beta_end": 1.5}, "beta_end: 1.5 is not a number"),
    ({"_class_name": "DDIMScheduler", "beta_end": float("nan")}, "beta_end: nan"),
    ({"_class_name": "DDIMScheduler", "trained_betas": [0.1, -0.2, 0.3]}, "betas: must be"),
    ({"_class_name": "DDIMScheduler", "num_train_timesteps": 2**31}, "num_train_timesteps: 2147483648"),
    ({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000.5}, "num_train_timesteps: 1000.5"),
    ({"_class_name": "DDIMScheduler", "clip_sample": "yes"}, "clip_sample: 'yes' is not of the type"),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "order: 3 is not"),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas: True is not supported"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance: 'learned_range' is not one of"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting: True"),
    ({"_class_name": "PNDMScheduler"}, "skip_prk_steps: False is not supported"),
    ({"_class_name": "DDIMScheduler", "timestep_spacing": "Leading"}, "spacing: 'Leading' is not one of"),
]


@pytest.mark.parametrize(("config", "words"), BAD_CONFIGS, ids=[b[1][:40] for b in BAD_CONFIGS])
def test_bad_config_is_one_line_that_says_what_and_what_instead(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        Scheduler.from_config(config)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "not readable as JSON"), ("[]", "holds no JSON object"), ('{"a": 1, "a": 2}', "a key stands twice"),
     ('{"beta_end": NaN}', "NaN is not a JSON number"), ("[" * 100_000, "not readable as JSON"), ("x" * 2**21, "larger than")],
    ids=["empty", "list", "twice", "nan", "deep", "large"],
)  # fmt: skip
def test_bad_config_file(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        Scheduler.from_config(tmp_path)


def test_config_is_read_from_a_folder(tmp_path: Path) -> None:
    config = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    assert Scheduler.from_config(tmp_path) == Scheduler.from_config(config)


def test_names_that_users_type() -> None:
    assert scheduler_options("dpmpp_2m_karras") == {"solver": "dpmpp_2m", "spacing": "karras"}
    assert scheduler_options("euler_a") == {"solver": "euler_ancestral"}
    assert scheduler_options({"solver": "ddim", "eta": 0.5}) == {"solver": "ddim", "eta": 0.5}
    for bad, words in [("banana", "'banana': no solver"), ("EULER", "no solver"), ("eular", "did you mean 'euler'"),
                       ({"solver": "ddim", "etta": 1}, "did you mean 'eta'"), ({"eta": 2}, "eta: 2 is not")]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            scheduler_options(bad)  # type: ignore[arg-type]


def test_plans_need_no_torch() -> None:
    code = "from genkit.schedulers import Scheduler; Scheduler().plan(20); import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
