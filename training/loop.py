"""The training loop: batch, loss, optimizer step, EMA; evaluation and checkpoints in between."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch

from genkit.errors import EXIT_OK
from genkit.signals import Signals
from genkit.training.checkpoint import open_log
from genkit.training.evaluate import overfit_since
from genkit.training.gradients import accumulate, contrast
from genkit.training.processes import as_one
from genkit.training.recipe import Recipe
from genkit.training.setup import Setup
from genkit.training.state import learning_rate

LOOK_BACK = 10  # steps between reading the loss from a GPU, which synchronises


class Diverged(RuntimeError):
    """The loss became NaN or infinite. The message names the step, its pictures and the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended: exit code, why, the step, best evaluation, pictures a second, the step it overfits from."""

    exit_code: int
    reason: str
    step: int
    scores: dict[str, Any]
    rate: float
    overfit: int | None


def train(recipe: Recipe, out: Path, *, device: str = "auto", quiet: bool = False) -> Outcome:
    """Train a recipe in the folder `out`; the same call resumes from the last checkpoint.

    Raises InputError before the first step for errors in recipe or data, HostError for a failing disk, Diverged for a
    loss that is not finite.
    """
    with as_one(), Setup.prepared(recipe, out, device, quiet) as s:
        state, plan = s.state, recipe.train
        pause = LOOK_BACK if s.device.type == "cuda" else 1
        pending: list[tuple[int, torch.Tensor, float, torch.Tensor, list[str]]] = []
        code, began, first = EXIT_OK, time.monotonic() - state.seconds, state.step
        ended = _ended(s, code) or s.enough()  # the run may be finished already
        feed = s.feed(state.step * s.passes)
        silent: Any = contextlib.nullcontext(lambda values: None)
        log_file = open_log(out / "log.jsonl", state.step) if s.accelerator.is_main_process else silent
        with log_file as log, Signals() as signals, s.bar as bar:
            while state.step < plan.steps and not ended:
                rate = learning_rate(plan, state.step, state.seconds)
                for group in state.optimizer.param_groups:
                    group["lr"] = rate
                loss, keys = (contrast if hasattr(s.task, "contrast") else accumulate)(s, feed)
                norm = s.step_optimizer(plan.max_grad_norm)
                state.step += 1
                state.average()
                if not s.shared or state.step % pause == 0:  # all processes must stop at the same step
                    state.seconds, code = s.agreed(time.monotonic() - began, signals.exit_code)
                pending.append((state.step, loss, rate, norm, keys))
                ended = _ended(s, code)
                save = state.step % recipe.save.every == 0
                # The last step of a run that ends by train.max_seconds is evaluated too, so that it may be the best.
                evaluated = not code and (s.wants_evaluation(state.step) or bool(ended))
                if save or evaluated or ended or len(pending) >= pause:
                    _message(s, pending, log, bar)
                if evaluated:
                    s.evaluate()
                    ended, save = ended or s.enough(), save or s.is_best()
                if save or ended or state.step == plan.steps:
                    s.save()
        step, rate = state.step, s.rate(state.step - first)
        if not code:
            s.finish()
        return Outcome(code, ended or "all steps are done", step, s.best(), rate, overfit_since(state.scores))


def _message(s: Setup, pending: list[Any], log: Any, bar: Any) -> None:
    """Log the steps since the last call; raise Diverged at the first loss that is not finite, before it is saved."""
    for step, loss, rate, norm, keys in pending:
        value, length = float(s.accelerator.reduce(loss, "mean")), float(norm)
        bad = {"loss": value} if s.accelerator.scaler is not None else {"loss": value, "gradient's norm": length}
        for name in (
            n for n, number in bad.items() if not math.isfinite(number)
        ):  # in fp16 the scaler skips steps with infinite gradients
            kept = s.checkpoints.steps()
            good = f"the last good checkpoint is that of step {kept[-1]}" if kept else "there is no checkpoint yet"
            shown = ", ".join(keys[:8]) + (", …" if len(keys) > 8 else "")
            raise Diverged(f"step {step}: the {name} is {bad[name]}; its pictures: {shown}; {good}")
        log({"step": step, "loss": value, "lr": rate, "grad_norm": length, "seconds": round(s.state.seconds, 3)})
        s.track({"loss": value, "lr": rate, "grad_norm": length}, step)
        s.report(bar, step, value)
    pending.clear()


def _ended(s: Setup, code: int) -> str:
    if code:
        return "stopped"
    most = s.recipe.train.max_seconds
    return "the time is up" if most is not None and s.state.seconds >= most else ""
