"""The state of training: weights, their EMA, the optimizer's moments, and the step.

Random numbers, the order of the data and the learning rate are functions of (seed, step), so that they need not be
stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from genkit.errors import InputError, nearest
from genkit.training.recipe import Train
from genkit.training.sharding import as_sharded, full, is_sharded


def fold(*numbers: int | str) -> int:
    """Return a seed below 2^63 that depends on all of `numbers`."""
    text = "/".join(map(str, numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def learning_rate(train: Train, step: int, seconds: float = 0.0) -> float:
    """Return the learning rate of a step, from 0: linear warm-up, then decay by steps or by the time used, if more."""
    if step < train.lr_warmup_steps:
        return train.learning_rate * (step + 1) / train.lr_warmup_steps
    done = (step - train.lr_warmup_steps) / (train.steps - train.lr_warmup_steps)
    if train.max_seconds is not None:
        done = max(done, min(1.0, seconds / train.max_seconds))
    return train.learning_rate * CURVES[train.lr_scheduler](done)


class State:
    """Trained parameters by name, their optimizer, and their exponential moving average if the recipe has one."""

    def __init__(self, networks: Mapping[str, torch.nn.Module], train: Train) -> None:
        self.params = {
            f"{name}.{key}": parameter
            for name, network in networks.items()
            for key, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        every = list(self.params.values())
        shrinking = [p for p in every if p.ndim > 1]  # no weight decay for biases and norms
        others = {"params": [p for p in every if p.ndim < 2], "weight_decay": 0}
        groups: list[dict[str, Any]] = [{"params": shrinking}, others]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=train.learning_rate, betas=(train.betas[0], train.betas[1]),
            weight_decay=train.weight_decay, fused=True,
        )  # fmt: skip
        self.ema = {n: p.detach().float().clone() for n, p in self.params.items()} if train.ema else {}
        self.decay = train.ema
        self.step, self.seconds = 0, 0.0
        self.scores: dict[int, dict[str, Any]] = {}  # step -> metrics

    def average(self) -> None:
        """Update the EMA, with a lower decay in the first steps, unlike `torch.optim.swa_utils`."""
        if self.ema:
            weight = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach().float() for p in self.params.values()], weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged weights within this context, for evaluation and saving; not for sharded networks."""
        own = {name: self.params[name].data for name in self.ema}
        try:
            for name, shadow in self.ema.items():
                self.params[name].data = shadow.to(own[name].dtype)
            yield
        finally:
            for name, data in own.items():
                self.params[name].data = data

    def tensors(self, keep: bool = True) -> dict[str, dict[str, torch.Tensor]]:
        """Return the state as named tensors by checkpoint file; for sharded networks a collective call.

        keep: False in a process that only contributes its shards, where the result is empty.
        """
        moments = {
            f"{name}.{key}": torch.as_tensor(value)
            for name, parameter in self.params.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        found = {"weights": {n: p.detach() for n, p in self.params.items()}, "ema": self.ema, "optimizer": moments}
        return {
            file: {name: whole for name, tensor in tensors.items() if (whole := _gathered(tensor, keep)) is not None}
            for file, tensors in found.items()
            if tensors
        }

    def check(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raise InputError, naming the first weight that differs, for a checkpoint of another architecture."""
        own = {name: tuple(p.shape) for name, p in self.params.items()}
        for name, shape in own.items():
            if name not in shapes:
                raise InputError(f"{where}: has no {name}{nearest(name, shapes)}: it is of another network")
            if shapes[name] != shape:
                raise InputError(f"{where}: {name}: has shape {shapes[name]}, here {shape}: it is of another network")
        for name in shapes.keys() - own.keys():
            raise InputError(f"{where}: {name}: has no place here: it is of another network")

    def load(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restore what `tensors` returned, bit for bit."""
        for name, parameter in self.params.items():
            parameter.data.copy_(as_sharded(tensors["weights"][name], parameter))
            kept = {k: v for k, v in tensors.get("optimizer", {}).items() if k.rpartition(".")[0] == name}
            fused = parameter.is_cuda
            self.optimizer.state[parameter] = {
                # A step count stays where Adam keeps it: on the CPU, or beside the weights when fused.
                key.rpartition(".")[2]: as_sharded(value, parameter)
                if value.ndim
                else value.to(parameter.device if fused else "cpu", copy=True)
                for key, value in kept.items()
            }
        for name, shadow in self.ema.items():
            shadow.copy_(as_sharded(tensors["ema"][name], shadow))


def _gathered(tensor: torch.Tensor, keep: bool) -> torch.Tensor | None:
    """Return the unsharded tensor, on the CPU if it was sharded, since all together may not fit on a device."""
    if not is_sharded(tensor):
        return tensor if keep else None
    found = full(tensor)
    return found.cpu() if keep else None


CURVES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
