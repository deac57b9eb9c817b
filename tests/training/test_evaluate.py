"""What is said of a model in training: distances, overfitting, when to stop; and what of it goes to others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from genkit.scoring.distances import cmmd, frechet, kid
from genkit.training import evaluate, output
from genkit.training.evaluate import Evaluation, overfit_since
from genkit.training.loop import train
from genkit.training.recipe import make_recipe
from tests.colours import colour_folder
from tests.tiny import tiny_ddpm


def test_distances_are_their_formulas_computed_directly() -> None:
    lot = np.random.default_rng(0)
    x, y = lot.normal(size=(50, 6)), lot.normal(size=(40, 6)) * 1.3 + 0.2
    c, d = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real.sum()
    fid = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c + d) - 2 * root

    def mmd(kernel: Any, a: np.ndarray, b: np.ndarray) -> float:
        def within(z: np.ndarray) -> float:
            return float(np.mean([kernel(p, q) for i, p in enumerate(z) for j, q in enumerate(z) if i != j]))

        return within(a) + within(b) - 2 * float(np.mean([kernel(p, q) for p in a for q in b]))

    assert frechet(torch.tensor(x), torch.tensor(y)) == pytest.approx(fid, rel=1e-9)
    cubic = mmd(lambda p, q: (p @ q / 6 + 1) ** 3, x, y)
    assert kid(torch.tensor(x), torch.tensor(y)) == pytest.approx(cubic, rel=1e-9)
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    gauss = 1000 * mmd(lambda p, q: np.exp(-((p - q) ** 2).sum() / (2 * 10**2)), x, y)
    assert cmmd(torch.tensor(x), torch.tensor(y)) == pytest.approx(gauss, rel=1e-6)
    assert frechet(torch.tensor(x), torch.tensor(x)) == pytest.approx(0, abs=1e-9)


def test_overfitting_is_two_later_losses_above_the_interval_of_the_least() -> None:
    def scores(*losses: float) -> dict[int, dict[str, Any]]:
        return {10 * n: {"loss": x, "loss_interval": (x - 0.1, x + 0.1)} for n, x in enumerate(losses)}

    assert overfit_since(scores(1.0, 0.5, 0.7, 0.8)) == 10
    assert overfit_since(scores(1.0, 0.5, 0.55, 0.59)) is None
    assert overfit_since(scores(1.0, 0.5, 0.7)) is None


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    colour_folder(tmp_path / "pictures", 20)
    return {
        "task": "unconditional", "model": str(tiny_ddpm(tmp_path / "ddpm")),
        "data": {"path": str(tmp_path / "pictures"), "validation": 0.2}, "train": {"steps": 20, "ema": 0.5},
        "evaluate": {"every": 2, "pictures": 4, "num_inference_steps": 2}, "save": {"every": 2, "keep_last": 1},
    }  # fmt: skip


def scored(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Have evaluations say these losses, one after the other."""
    given = iter(losses)
    monkeypatch.setattr(evaluate, "_noise_loss", lambda e: {"loss": next(given)})


def test_patience_stops_and_the_best_is_what_comes_out(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, [9.0, 8.0, 3.0, 4.0, 5.0])  # of steps 0, 2, 4, 6, 8
    recipe["evaluate"] |= {"patience": 2}
    told, out = make_recipe(recipe), tmp_path / "run"
    outcome = train(told, out, device="cpu", quiet=True)
    assert (outcome.step, outcome.reason, outcome.scores["step"]) == (8, "no better loss since step 4", 4)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["000004", "000008"]
    assert "- step: 4\n" in (out / "README.md").read_text()
    again = train(told, out, device="cpu", quiet=True)  # it has ended: there is nothing to go on with
    assert dataclasses.replace(again, rate=0) == dataclasses.replace(outcome, rate=0)


def test_what_ends_by_its_time_is_measured(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, [9.0, 1.0])  # of step 0 and of the one that it ends with
    recipe["train"] |= {"max_seconds": 0.001, "steps": 1000}
    recipe["evaluate"] |= {"every": 100}
    outcome = train(make_recipe(recipe), tmp_path / "run", device="cpu", quiet=True)
    assert (outcome.reason, outcome.scores) == ("the time is up", {"step": 1, "loss": 1.0})


def test_keep_best_0_gives_the_last_step(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, [9.0, 1.0, 3.0, 4.0])
    recipe["save"] |= {"keep_best": 0, "keep_last": 3}
    recipe["train"] |= {"steps": 6}
    train(make_recipe(recipe), tmp_path / "run", device="cpu", quiet=True)
    assert "- step: 6\n" in (tmp_path / "run" / "README.md").read_text()


def test_what_is_measured_is_the_average_that_is_saved(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    seen: dict[int, torch.Tensor] = {}
    real = Evaluation.__call__

    def look(self: Evaluation, step: int) -> dict[str, Any]:
        seen[step] = self.task.networks["unet"].conv_in.weight.detach().clone()
        return real(self, step)

    monkeypatch.setattr(Evaluation, "__call__", look)
    recipe["train"] |= {"steps": 4, "learning_rate": 0.01}
    train(make_recipe(recipe), tmp_path / "run", device="cpu", quiet=True)
    kept = tmp_path / "run" / "checkpoints" / "000004"
    weights, ema = (load_file(kept / f"{n}.safetensors")["unet.conv_in.weight"] for n in ("weights", "ema"))
    model = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(seen[4], ema) and torch.equal(model, ema) and not torch.equal(weights, ema)


def test_the_hub_gets_the_model_and_no_pictures_of_mine(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    recipe["train"] |= {"steps": 2}
    out = tmp_path / "run"
    train(make_recipe(recipe), out, device="cpu", quiet=True)
    calls: dict[str, Any] = {}

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.update(options, name=name)

        def upload_folder(self, **options: Any) -> str:
            files = [p.relative_to(out).as_posix() for p in sorted(out.rglob("*")) if p.is_file()]
            patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
            calls["files"] = list(filter_repo_objects(files, **patterns))
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert output.push(out, "me/mine") == "address" and calls["private"] is True
    assert calls["files"] == [
        "README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert (out / "doctor.html").is_file() and "base_model" not in (out / "README.md").read_text()
