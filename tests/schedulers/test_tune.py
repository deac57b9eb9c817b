"""Plans fitted to a network whose solution is known: they beat the stock plan, survive a stop, keep to their file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genkit.errors import InputError
from genkit.schedulers import PREDICTIONS, Scheduler, sample
from genkit.schedulers.plan import Plan
from genkit.schedulers.tune import fit
from genkit.schedulers.tuned import Tuned, read_plans, write_plan
from tests.grids import thinned

PROCESSES = {
    "epsilon": Scheduler(solver="dpmpp_2m"),
    "zero-snr": Scheduler(solver="dpmpp_2m", prediction="v_prediction", zero_snr=True),
    "flow": Scheduler(solver="dpmpp_2m", noise="flow", prediction="flow_prediction"),
}
MEANS = torch.tensor([[1.0, 0.2, -0.5, 0.8], [-0.9, 0.5, 0.6, 0.1], [0.1, -1.2, 0.3, -0.9]], dtype=torch.float64)
STD = 0.3


class Mixture:
    """The network that knows three Gaussians in four dimensions, on the levels of `scheduler`.

    smooth: torch can differentiate it in t (flow only; levels of betas are looked up). point: one place only.
    """

    def __init__(self, scheduler: Scheduler, smooth: bool = False, point: bool = False) -> None:
        self.scheduler, self.smooth = scheduler, smooth
        self.means, self.std = (MEANS[:1], 1e-3) if point else (MEANS, STD)
        self.calls = 0

    def level(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.scheduler.noise == "flow":
            s = t if self.smooth else torch.from_numpy(t.numpy())
            return 1 - s / 1000, s / 1000
        levels = self.scheduler.levels(t.numpy())
        return torch.from_numpy(levels.alpha), torch.from_numpy(levels.sigma)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        alpha, sigma = (level.double()[:, None] for level in self.level(t.double()))
        flat = x.flatten(1).double()
        variance = alpha**2 * self.std**2 + sigma**2
        away = flat[:, None] - alpha[..., None] * self.means
        weight = (-away.square().sum(-1) / (2 * variance)).softmax(dim=1)
        each = self.means + (alpha * self.std**2 / variance)[..., None] * away
        x0 = (weight[..., None] * each).sum(1)
        target = PREDICTIONS[self.scheduler.prediction].target(x0, (flat - alpha * x0) / sigma, alpha, sigma)
        return target.view_as(x).to(x.dtype)


def unit(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, 4, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_error(model: Mixture, plan: Plan, noise: torch.Tensor) -> float:
    def one(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(x, t, torch.arange(len(x)))

    truth = sample(one, noise, model.scheduler.plan(500))
    return float((sample(one, noise, plan) - truth).flatten(1).square().mean(1).sqrt().mean())


def quick(model: Mixture, steps: int = 4, **options: Any) -> Tuned:
    return fit(model, model.scheduler, steps, unit(0, 48), **{"iterations": 8, **options})


@pytest.mark.parametrize(
    ("name", "smooth"), thinned([*((name, False) for name in PROCESSES), ("flow", True)], 2, unpack=True)
)
def test_a_fitted_plan_beats_the_stock_plan_on_fresh_noises(name: str, smooth: bool) -> None:
    """smooth: the model has a gradient in t; else it is found by differences."""
    scheduler = PROCESSES[name]
    model, fresh = Mixture(scheduler, smooth), unit(1, 256)
    tuned = fit(model, scheduler, 6, unit(0, 256), iterations=60)
    assert tuned.better and tuned.fitted["mean"] < tuned.stock["mean"]
    assert mean_error(model, tuned.plan, fresh) < 0.6 * mean_error(model, scheduler.plan(6), fresh)
    assert tuned.plan.nfe == 6 and not tuned.plan.consumes_noise.any()
    assert (np.diff(tuned.plan.timesteps) < 0).all() and tuned.plan.sigmas[-1] == 0


def test_whole_timesteps_fall_and_stay_above_zero() -> None:
    tuned = quick(Mixture(PROCESSES["epsilon"]))
    crowded = dataclasses.replace(tuned.plan, table=tuned.plan.table.copy())
    crowded.table[:, 0] = [999, 2.4, 2.2, 0.1]
    assert dataclasses.replace(tuned, plan=crowded).timesteps == [999, 2, 1, 0]
    crowded.table[:, 0] = [999, 998.8, 998.6, 0.1]
    assert dataclasses.replace(tuned, plan=crowded).timesteps == [999, 998, 997, 0]
    crowded.table[:, 0] = [999, 0.3, 0.2, 0.1]
    assert dataclasses.replace(tuned, plan=crowded).timesteps == [999, 2, 1, 0]


def test_less_memory_gives_the_same_plan() -> None:
    model = Mixture(PROCESSES["epsilon"])
    assert np.allclose(quick(model, lean=True).plan.table, quick(model).plan.table, rtol=0, atol=1e-9, equal_nan=True)


def test_conditioning_is_looked_up_by_the_index() -> None:
    model, seen = Mixture(PROCESSES["epsilon"]), []
    noise = unit(0, 48)

    def with_rows(x: torch.Tensor, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if t[0] == 999 and len(index) > 1:  # the first call: x is still the noise
            seen.append(torch.equal(x.detach(), noise[index]))
        return model(x, t, index)

    fit(with_rows, model.scheduler, 3, noise, iterations=3, batch=8)
    assert len(seen) > 5 and all(seen)


class Stop(Exception):
    pass


@pytest.mark.parametrize("when", [1, 3, 6, 10])  # of 2 parts of the solution, 8 iterations and the comparison
def test_a_stopped_fit_goes_on_to_the_same_plan(when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genkit.schedulers.tuned.SAVE_EVERY", 0.0)
    model = Mixture(PROCESSES["epsilon"])
    options: dict[str, Any] = {"batch": 8, "checkpoint": tmp_path / "state"}
    whole = quick(model, batch=8)
    calls, model.calls = model.calls, 0

    def stop(done: int, total: int, text: str) -> None:
        if done == when:
            raise Stop

    with pytest.raises(Stop):
        quick(model, progress=stop, **options)
    model.calls = 0
    again = quick(model, **options)
    assert np.array_equal(again.plan.table, whole.plan.table) and again.fitted == whole.fitted
    assert model.calls < calls
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("changed", ["identity", "seed", "steps", "noise"])
def test_the_state_of_another_fit_is_not_used(changed: str, tmp_path: Path) -> None:
    model, state = Mixture(PROCESSES["epsilon"]), tmp_path / "state"
    options: dict[str, Any] = {"iterations": 4}
    steps, noise = 5 if changed == "steps" else 4, unit(int(changed == "noise"), 48)
    options |= {"identity": "other"} if changed == "identity" else {"seed": 1} if changed == "seed" else {}
    wanted = fit(model, model.scheduler, steps, noise, **options)
    fit(model, model.scheduler, 4, unit(0, 48), iterations=4, checkpoint=state)
    found = fit(model, model.scheduler, steps, noise, checkpoint=state, **options)
    assert np.array_equal(found.plan.table, wanted.plan.table)


def test_a_file_that_is_no_state_stays_as_it_is(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights, text = tmp_path / "model.safetensors", tmp_path / "notes.txt"
    save_file({"w": torch.zeros(2)}, weights)
    text.write_text("mine")
    for path in (weights, text, tmp_path):
        with pytest.raises(InputError, match="is not the state of a fit"):
            quick(Mixture(PROCESSES["epsilon"]), checkpoint=path)
    assert text.read_text() == "mine"


def test_where_nothing_is_to_be_gained_the_stock_plan_stays(tmp_path: Path) -> None:
    """All data in one place: every step is exact."""
    model = Mixture(PROCESSES["epsilon"], point=True)
    for steps in (1, 4):
        tuned = quick(model, steps)
        assert not tuned.better and tuned.stock["mean"] < 1e-3
        assert np.array_equal(tuned.plan.table, model.scheduler.plan(steps).table)
        with pytest.raises(InputError, match="the stock plan was not beaten"):
            write_plan(tmp_path / "x.json", tuned, model.scheduler)


def test_a_plan_that_is_worse_on_other_noises_is_not_taken() -> None:
    """The network is another one for the noises that were held out, as if the fit had been to the wrong data."""
    model = Mixture(PROCESSES["epsilon"])
    apart = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:12]

    def two(x: torch.Tensor, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        odd = torch.isin(index, apart).view(-1, 1, 1, 1)
        output = model(x, t, index)
        return torch.where(odd, output, -output)

    tuned = fit(two, model.scheduler, 6, unit(0, 48), iterations=60)
    assert not tuned.better and tuned.fitted["mean"] >= tuned.stock["mean"]
    assert np.array_equal(tuned.plan.table, model.scheduler.plan(6).table)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"solver": "euler_ancestral"}, "draws noise"),
        ({"solver": "heun"}, "makes 7 calls in 4 steps"),
        ({"threshold": (0.995, 1.5)}, "dynamic thresholding"),
        (
            {"noise": "flow", "prediction": "flow_prediction", "dynamic_shift": (0.5, 1.15, 256, 4096, "exponential")},
            "depends on the size",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused(options: dict[str, Any], text: str) -> None:
    scheduler = Scheduler(**options)
    with pytest.raises(InputError, match=text):
        fit(Mixture(scheduler), scheduler, 4, unit(0, 8))


def test_a_model_must_let_gradients_through() -> None:
    model = Mixture(PROCESSES["epsilon"])
    with pytest.raises(InputError, match="model: lets no gradient through"):
        fit(lambda x, t, index: model(x.detach(), t.detach(), index), model.scheduler, 4, unit(0, 8))
    with pytest.raises(InputError, match="cannot be divided"):
        fit(model, model.scheduler, 4, unit(0, 1))
    with pytest.raises(InputError, match="not finite"):
        fit(lambda x, t, index: model(x, t, index) / 0, model.scheduler, 4, unit(0, 8))


def test_plans_come_back_from_their_file(tmp_path: Path) -> None:
    path, scheduler = tmp_path / "tuned_scheduler.json", PROCESSES["zero-snr"]
    made = {steps: quick(Mixture(scheduler), steps, iterations=30) for steps in (6, 4)}
    for tuned in made.values():
        assert tuned.better
        write_plan(path, tuned, scheduler, guidance=5, identity="abc")
    plans = read_plans(path, scheduler, guidance=5.0, identity="abc")
    assert [*plans] == [4, 6]
    for steps, plan in plans.items():
        for field in ("table", "alphas", "sigmas", "start", "consumes_noise"):
            assert np.array_equal(getattr(plan, field), getattr(made[steps].plan, field)), field
    errors = json.loads(path.read_text())["plans"]["4"]["errors"]
    assert errors == {"stock": made[4].stock, "tuned": made[4].fitted}
    with pytest.raises(InputError, match=r"guidance: is 5\.0, not 3\.0"):
        write_plan(path, made[4], scheduler, guidance=3, identity="abc")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, scheduler = tmp_path_factory.mktemp("written") / "plan.json", PROCESSES["epsilon"]
    write_plan(path, quick(Mixture(scheduler), iterations=30), scheduler, guidance=5, identity="abc")
    return path.read_text()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(format=99), "format: is 99, not 1"),
        (lambda d: d.update(model="xyz"), "model: is 'xyz', not 'abc'"),
        (lambda d: d.update(guidance=1.0), "guidance: is 1.0, not 5.0"),
        (lambda d: d["trained"].update(prediction="sample"), "trained with prediction 'sample', not 'epsilon'"),
        (lambda d: d["trained"].update(zero_snr=True), "trained with zero_snr True, not False"),
        (lambda d: d.pop("trained"), "trained: is None"),
        (lambda d: d.update(plans=[]), "plans: is absent"),
        (lambda d: d["plans"].update({"5": d["plans"]["4"]}), "'5': is not a table"),
        (lambda d: d["plans"]["4"].update(columns=["t"]), "'4': is not a table"),
        (lambda d: d["plans"].update({"4": 3}), "'4': is not a table"),
        (lambda d: d["plans"]["4"]["rows"][1].pop(), "has a row that is not"),
        (lambda d: d["plans"]["4"]["rows"][1].__setitem__(3, None), "has a row that is not"),
        (lambda d: d["plans"]["4"]["rows"][1].__setitem__(2, 0), "has a row that is not"),
        (lambda d: d["plans"]["4"]["rows"].reverse(), "does not fall"),
    ],
)
def test_a_wrong_file_is_refused(change: Any, text: str, written: str, tmp_path: Path) -> None:
    path, data = tmp_path / "plan.json", json.loads(written)
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=text) as caught:
        read_plans(path, PROCESSES["epsilon"], guidance=5, identity="abc")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"format": NaN}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(InputError):
            read_plans(tmp_path / "plan.json", PROCESSES["epsilon"])
