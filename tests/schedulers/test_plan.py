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

PLACED = [s for s in SPACINGS if s not in ("timesteps", "sigmas")]
TWICE = ("heun", "dpm2", "dpm2_ancestral", "dpmpp_sde")  # calls a step
# Every solver at its greatest order, with steps, spacing and strength of its own
MIXED: list[tuple[dict[str, Any], int, float]] = [
    (
        {"solver": solver, "spacing": PLACED[i % len(PLACED)], "order": SOLVERS[solver].orders[1]},
        5 + i % 4,
        (1, 0.6)[i % 2],
    )
    for i, solver in enumerate(SOLVERS)
] + [({"solver": "ddim", "threshold": (0.9, 1.5)}, 6, 1.0), ({"solver": "unipc", "order": (1, 2, 3, 2, 1)}, 5, 1.0)]

SLOW = pytest.mark.slow


def test_a_mixed_batch_is_bitwise_each_run_alone() -> None:
    """Every solver, with different steps, spacings and strengths, in shared batches; the network is elementwise."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.9 * x + t[:, None, None, None] / 1000)

    plans = [Scheduler(**options).plan(n, strength) for options, n, strength in MIXED]
    count, shape = len(plans), (1, 2, 4, 4)
    noise = torch.randn(count, *shape[1:], generator=torch.Generator().manual_seed(1))
    x0 = noise.flip(-1) / 2
    alone = [
        sample(model, noise[k : k + 1], p, torch.Generator().manual_seed(k), x0[k : k + 1]) for k, p in enumerate(plans)
    ]

    x = torch.stack([p.start[1] * noise[k] + p.start[0] * x0[k] for k, p in enumerate(plans)])
    history, generators = torch.zeros(HISTORY, *x.shape), [torch.Generator().manual_seed(k) for k in range(count)]
    for at in range(max(p.nfe for p in plans)):
        live = [k for k in range(count) if at < plans[k].nfe]
        rows = torch.from_numpy(np.stack([plans[k].table[at] for k in live], axis=1)).float()[..., None, None, None]
        drawn = torch.cat([
            torch.randn(shape, generator=generators[k]) if plans[k].consumes_noise[at] else torch.zeros(shape)
            for k in live
        ])  # fmt: skip
        output = model(rows[COLUMNS.index("c_in")] * x[live], rows[COLUMNS.index("t")].flatten())
        threshold = any(plans[k].threshold for k in live)
        x[live], left = step(x[live], output, rows, history[:, live], drawn, threshold)
        history[:, live] = torch.cat([left[None], history[:-1, live]])
    assert len({p.nfe for p in plans}) > 6
    for k in range(count):
        assert torch.equal(x[k : k + 1], alone[k]), MIXED[k]


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize("noise", NOISES)
def test_every_point_on_the_axes_runs_and_stays_finite(noise: str, every: int) -> None:
    """every: 7 takes each seventh point, which brings every value of every axis."""
    x = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    points = itertools.product(PLACED, PREDICTIONS, SOLVERS, (False, True))
    for spacing, prediction, solver, zero in itertools.islice(points, 0, None, every):
        scheduler = Scheduler(noise=noise, spacing=spacing, prediction=prediction, solver=solver, zero_snr=zero)
        point = (spacing, prediction, solver, zero)
        pure = noise == "flow" or (zero and noise != "edm")
        if prediction == "epsilon" and pure and spacing in ("trailing", "linspace", "lcm", "bounded"):
            with pytest.raises(InputError, match="epsilon says nothing about the picture at pure noise"):
                scheduler.plan(7)
            continue
        plan = scheduler.plan(7)
        assert np.isfinite(np.delete(plan.table, COLUMNS.index("clip"), axis=1)).all(), point
        assert len(plan.alphas) == plan.nfe + 1
        assert plan.nfe - 7 in ((5, 6) if solver in TWICE else (0, 1) if solver == "pndm" else (0,)), point
        if prediction == "v_prediction":
            out = sample(lambda x, t: torch.tanh(x), x, plan, generator)
            assert torch.isfinite(out).all(), point


@pytest.mark.parametrize(
    "steps", [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW), pytest.param(300, marks=SLOW)]
)
def test_the_fewest_and_many_steps_make_finite_plans(steps: int) -> None:
    """Repeated and nearly equal levels, in our style and in diffusers', to zero noise and to the least trained."""
    zero = Scheduler(zero_snr=True, prediction="v_prediction", original_inference_steps=500)
    emoji = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    started = Scheduler.from_config(emoji).with_options(original_inference_steps=500)
    points = itertools.product((zero, started), SOLVERS, PLACED, ("zero", "sigma_min"))
    for start, solver, spacing, final in itertools.islice(points, 0, None, 5 if steps == 1 else 1):
        plan = start.with_options(solver=solver, spacing=spacing, final=final).plan(steps)
        assert np.isfinite(np.delete(plan.table, COLUMNS.index("clip"), axis=1)).all(), (solver, spacing, final)


def test_levels_given_one_by_one() -> None:
    plan = Scheduler(timesteps=(900.0, 500.0, 100.5), spacing="timesteps").plan()
    assert plan.timesteps.tolist() == [900, 500, 100.5] and plan.alphas[-1] == 1
    plan = Scheduler().with_options(sigmas=(10.0, 1.0, 0.1)).plan(3)
    assert np.allclose(plan.sigmas[:3] / plan.alphas[:3], (10, 1, 0.1))
    assert Scheduler().with_options(sigmas=(10.0, 1.0)).with_options(spacing="karras").sigmas is None


def test_published_tables_are_laid_as_their_authors_do() -> None:
    ten = Scheduler(spacing="align_your_steps").plan(10)
    assert np.allclose(
        ten.sigmas[:-1] / ten.alphas[:-1], [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]
    )
    twenty = Scheduler(spacing="align_your_steps").plan(20)
    assert np.allclose((twenty.sigmas / twenty.alphas)[2:19:2], (ten.sigmas / ten.alphas)[1:10])
    assert np.allclose(Scheduler(spacing="gits").plan(5).sigmas[1], 2.845 / np.hypot(1, 2.845))


def test_beta_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    levels = Scheduler(noise="edm", prediction="edm", spacing="beta").plan(33).sigmas[:-1]
    assert np.allclose(levels, 0.002 + (80 - 0.002) * stats.beta.ppf(1 - np.linspace(0, 1, 33), 0.6, 0.6), atol=1e-6)


def test_dynamic_thresholding_bounds_each_picture_by_its_own_quantile() -> None:
    raw = torch.stack([torch.linspace(-1, 3, 101), torch.linspace(-0.5, 0.5, 101)]).view(2, 1, 1, 101)
    plan = Scheduler(prediction="sample", threshold=(0.9, 2.5), final="zero").plan(1)
    out = sample(lambda x, t: raw, torch.zeros_like(raw), plan)
    bound = torch.quantile(raw[0].abs(), 0.9).clamp(1, 2.5)
    assert torch.allclose(out[0], raw[0].clamp(-bound, bound) / bound) and torch.equal(out[1], raw[1])


def test_a_bigger_picture_shifts_flow_more() -> None:
    flow = Scheduler(noise="flow", prediction="flow_prediction", dynamic_shift=(0.5, 1.15, 256, 4096, "exponential"))
    assert np.allclose(
        flow.plan(4).sigmas, Scheduler(noise="flow", prediction="sample", shift=np.exp(0.5)).plan(4).sigmas
    )
    assert (flow.plan(4, tokens=4096).sigmas[1:-1] > flow.plan(4, tokens=256).sigmas[1:-1]).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("noise", ["scaled_linear", "flow"])
def test_predicting_the_target_gives_the_picture(noise: str, prediction: str) -> None:
    levels = Scheduler(noise=noise).levels(np.array([20, 500, 900]))
    x0, eps = np.array([0.3, -1.0, 2.0]), np.array([-0.5, 0.1, 1.0])
    kind = PREDICTIONS[prediction]
    px, pm = kind.to_x0(levels.alpha, levels.sigma)
    assert (kind.c_in(levels.alpha, levels.sigma) > 0).all()
    x = levels.alpha * x0 + levels.sigma * eps
    assert np.allclose(px * x + pm * kind.target(x0, eps, levels.alpha, levels.sigma), x0)


def test_zero_snr_ends_in_pure_noise() -> None:
    assert Scheduler(zero_snr=True, prediction="v_prediction").plan(10).alphas[0] == 0
    assert 0.05 < Scheduler().plan(10).alphas[0] < 0.08


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_strength_keeps_the_last_share_of_the_steps(solver: str, strength: float) -> None:
    plan, whole = (Scheduler(solver=solver).plan(10, s) for s in (strength, 1.0))
    assert int(10 * strength) <= len({*plan.timesteps}) == len({*whole.timesteps} & {*plan.timesteps})
    assert max(plan.timesteps) == Scheduler().plan(10).timesteps[10 - int(10 * strength)]
    assert plan.start == ((plan.alphas[0], plan.sigmas[0]) if strength < 1 else (0.0, 1.0))
    assert (plan.alphas[-1], plan.sigmas[-1]) == (1.0, 0.0)


def test_clip_bounds_the_picture() -> None:
    for solver in (s for s in SOLVERS if "clip" in SOLVERS[s].options):
        plan = Scheduler(solver=solver, clip=0.5).plan(5)
        out = sample(
            lambda x, t: torch.zeros_like(x), torch.full((1, 1, 2, 2), 3.0), plan, torch.Generator().manual_seed(0)
        )
        assert out.abs().max() <= 0.5 + 1e-6, solver


def test_a_call_is_not_wasted_at_the_level_where_the_plan_ends() -> None:
    for spacing in PLACED:
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
    [({"solver": "dpmpp_3k"}, "solver: 'dpmpp_3k' is not one of .*did you mean 'dpmpp_3.'"),
     ({"noise": "lineer"}, "did you mean 'linear'"),
     ({"spacing": "Karras"}, "did you mean 'karras'"), ({"prediction": "eps"}, "prediction: 'eps'"),
     ({"eta": 2}, "eta: 2 is not a number"),
     ({"order": 2.0, "solver": "unipc"}, "order: 2.0 is not a whole number"),
     ({"order": 4, "solver": "unipc"}, "order: 4 is not a whole number from 1 to 3"),
     ({"timesteps": (1.0, 2.0)}, r"timesteps: \[1.0, 2.0\] is not a falling list"), ({"sigmas": ()}, "sigmas: "),
     ({"spacing": "timesteps"}, "timesteps: go with spacing 'timesteps'"), ({"sigmas": (1.0, 0.0)}, "sigmas: 0.0"),
     ({"noise": "edm", "sigma_max": 0.001}, "sigma_max: 0.001 is not above sigma_min"), ({"clip": -1.0}, "clip: -1.0"),
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
