"""Plans: mixed batches, every point on the four axes, starts and strengths, and no torch before it is needed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from genkit import InputError
from genkit.schedulers import COLUMNS, HISTORY, NOISES, PREDICTIONS, SOLVERS, SPACINGS, Scheduler, sample, step


def test_a_mixed_batch_is_bitwise_each_run_alone() -> None:
    """Six requests of different solvers, steps and strengths share batches; the network is elementwise."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.9 * x + t[:, None, None, None] / 1000)

    chosen: list[tuple[str, int, float]] = [
        ("ddim", 7, 1.0), ("heun", 5, 1.0), ("dpmpp_2m", 9, 0.6), ("pndm", 6, 1.0), ("euler_ancestral", 8, 1.0),
        ("sde-dpmpp_2m", 5, 1.0),
    ]  # fmt: skip
    plans = [Scheduler(solver=s, spacing="karras").plan(n, strength) for s, n, strength in chosen]
    shape = (1, 2, 4, 4)
    noise = torch.randn(6, *shape[1:], generator=torch.Generator().manual_seed(1))
    x0 = noise.flip(-1) / 2
    alone = [
        sample(model, noise[k : k + 1], p, torch.Generator().manual_seed(k), x0[k : k + 1]) for k, p in enumerate(plans)
    ]

    x = torch.stack([p.start[1] * noise[k] + p.start[0] * x0[k] for k, p in enumerate(plans)])
    history, generators = torch.zeros(HISTORY, *x.shape), [torch.Generator().manual_seed(k) for k in range(6)]
    for at in range(max(p.nfe for p in plans)):
        live = [k for k in range(6) if at < plans[k].nfe]
        rows = torch.from_numpy(np.stack([plans[k].table[at] for k in live], axis=1)).float()[..., None, None, None]
        drawn = torch.cat([
            torch.randn(shape, generator=generators[k]) if plans[k].draws[at] else torch.zeros(shape) for k in live
        ])  # fmt: skip
        output = model(rows[COLUMNS.index("c_in")] * x[live], rows[COLUMNS.index("t")].flatten())
        x[live], left = step(x[live], output, rows, history[:, live], drawn)
        history[:, live] = torch.cat([left[None], history[:-1, live]])
    assert len({p.nfe for p in plans}) > 3
    for k in range(6):
        assert torch.equal(x[k : k + 1], alone[k]), chosen[k]


@pytest.mark.parametrize("noise", NOISES)
def test_every_point_on_the_axes_runs_and_stays_finite(noise: str) -> None:
    x = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for spacing, prediction, solver, zero in itertools.product(SPACINGS, PREDICTIONS, SOLVERS, (False, True)):
        scheduler = Scheduler(noise=noise, spacing=spacing, prediction=prediction, solver=solver, zero_snr=zero)
        point = (spacing, prediction, solver, zero)
        if prediction == "epsilon" and (zero or noise == "flow") and spacing in ("trailing", "linspace"):
            with pytest.raises(InputError, match="epsilon says nothing about the picture at pure noise"):
                scheduler.plan(7)
            continue
        plan = scheduler.plan(7)
        assert np.isfinite(np.delete(plan.table, COLUMNS.index("clip"), axis=1)).all(), point
        out = sample(lambda x, t: torch.tanh(x), x, plan, generator)
        assert torch.isfinite(out).all(), point
        assert len(plan.alphas) == plan.nfe + 1 and plan.nfe - 7 in {"heun": (5, 6), "pndm": (0, 1)}.get(
            solver, (0,)
        ), point


@pytest.mark.parametrize("steps", [1, 2, 999])
def test_the_fewest_and_the_most_steps_make_finite_plans(steps: int) -> None:
    """Repeated and nearly equal levels, in our style and in diffusers', to zero noise and to the least trained."""
    zero = Scheduler(zero_snr=True, prediction="v_prediction")
    emoji = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for start, solver, spacing, final in itertools.product(
        (zero, Scheduler.from_config(emoji)), SOLVERS, SPACINGS, ("zero", "sigma_min")
    ):
        plan = start.with_options(solver=solver, spacing=spacing, final=final).plan(steps)
        assert np.isfinite(np.delete(plan.table, COLUMNS.index("clip"), axis=1)).all(), (solver, spacing, final)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("noise", ["scaled_linear", "flow"])
def test_predicting_the_target_gives_the_picture(noise: str, prediction: str) -> None:
    levels = Scheduler(noise=noise).levels(np.array([20, 500, 900]))
    x0, eps = np.array([0.3, -1.0, 2.0]), np.array([-0.5, 0.1, 1.0])
    kind = PREDICTIONS[prediction]
    px, pm = kind.to_x0(levels.alpha, levels.sigma)
    x = levels.alpha * x0 + levels.sigma * eps
    assert np.allclose(px * x + pm * kind.target(x0, eps, levels.alpha, levels.sigma), x0)


def test_zero_snr_ends_in_pure_noise() -> None:
    assert Scheduler(zero_snr=True, prediction="v_prediction").plan(10).alphas[0] == 0
    assert 0.05 < Scheduler().plan(10).alphas[0] < 0.08


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_strength_keeps_the_last_share_of_the_steps(solver: str, strength: float) -> None:
    plan, whole = (Scheduler(solver=solver).plan(10, s) for s in (strength, 1.0))
    kept = int(10 * strength)
    assert len({*plan.timesteps}) == kept and {*plan.timesteps} == {*sorted({*whole.timesteps})[:kept]}
    assert plan.start == ((plan.alphas[0], plan.sigmas[0]) if strength < 1 else (0.0, 1.0))
    assert (plan.alphas[-1], plan.sigmas[-1]) == (1.0, 0.0)


def test_clip_bounds_the_picture() -> None:
    for solver in SOLVERS.keys() - {"pndm"}:  # which extrapolates to its end
        plan = Scheduler(solver=solver, clip=0.5).plan(5)
        out = sample(
            lambda x, t: torch.zeros_like(x), torch.full((1, 1, 2, 2), 3.0), plan, torch.Generator().manual_seed(0)
        )
        assert out.abs().max() <= 0.5 + 1e-6, solver


def test_a_call_is_not_wasted_at_the_level_where_the_plan_ends() -> None:
    for spacing in SPACINGS:
        plan = Scheduler(spacing=spacing, final="sigma_min").plan(10)
        assert plan.nfe == 10 and (np.diff(plan.sigmas) < 0).all(), spacing


@pytest.mark.parametrize(
    ("steps", "strength", "words"),
    [(0, 1.0, "num_inference_steps: 0"), (1001, 1.0, "num_inference_steps: 1001 is not a whole number from 1 to 1000"),
     (True, 1.0, "num_inference_steps: True"), (10, 0.0, "strength: 0.0"), (10, 1.5, "strength: 1.5"),
     (10, float("nan"), "strength: nan"), (10, 0.05, "strength: 0.05 of 10 steps leaves none; the least is 0.1")],
)  # fmt: skip
def test_plans_that_cannot_be_made(steps: int, strength: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Scheduler().plan(steps, strength)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"solver": "dpmpp_3k"}, "solver: 'dpmpp_3k' is not one of .*did you mean 'dpmpp_2m'"),
     ({"noise": "lineer"}, "did you mean 'linear'"),
     ({"spacing": "Karras"}, "did you mean 'karras'"), ({"prediction": "eps"}, "prediction: 'eps'"),
     ({"eta": 2}, "eta: 2 is not a number"),
     ({"order": 2.0}, "order: 2.0 is not a whole number"), ({"clip": -1.0}, "clip: -1.0"),
     ({"zero_snr": "yes"}, "zero_snr: 'yes'"), ({"solver": ["ddim"]}, "solver: .* is not one of"),
     ({"beta_start": 0.5}, "beta_end: 0.012 is less than beta_start"),
     ({"trained_betas": (0.1, 0.2)}, "2 for num_train_timesteps 1000"),
     ({"etta": 1}, "'etta': no option of a scheduler .did you mean 'eta'")],
)  # fmt: skip
def test_options_out_of_range_are_named_with_the_nearest_right_one(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Scheduler().with_options(**options)


def test_a_new_solver_drops_what_only_the_old_one_reads() -> None:
    old = Scheduler(solver="ddim", eta=0.7, clip=2.0, zero_snr=True, prediction="v_prediction", spacing="karras")
    assert old.with_options(solver="dpmpp_2m", order=1) == Scheduler(
        solver="dpmpp_2m", order=1, clip=2.0, zero_snr=True, prediction="v_prediction", spacing="karras"
    )


def test_plans_need_no_torch() -> None:
    code = "from genkit.schedulers import Scheduler; Scheduler().plan(20); import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
