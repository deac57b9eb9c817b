"""The gradients of a step: pass by pass, or for CLIP of all pictures of the step together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from genkit.training.setup import Setup


def accumulate(s: Setup, feed: Iterator[Any]) -> tuple[torch.Tensor, list[str]]:
    """Add the gradients of this process's passes of a step; return its loss, by weight, and its pictures' names.

    The mean of the losses over the processes is that of all pictures of the step, which weigh alike; so are the
    gradients once they are synchronised, after the last pass.
    """
    losses, keys = [], []
    for part in range(s.passes):
        tensors, names, weight = next(feed)
        generator = s.seeded(s.state.step, part)
        with _synchronised(s, part), s.accelerator.autocast():
            loss = (s.task.loss(tensors, generator) * tensors["weights"]).mean()
            s.accelerator.backward(loss * weight)
        losses.append(loss.detach() * weight)
        keys += names
    return torch.stack(losses).sum(), keys


def contrast(s: Setup, feed: Iterator[Any]) -> tuple[torch.Tensor, list[str]]:
    """Add the gradients of a loss that compares all pictures of a step with each other, as `accumulate` does.

    The embeddings of all passes and processes come first, then the gradients of the loss with respect to them, then
    those of the weights, pass by pass (GradCache, Gao et al. 2021).
    """
    if s.passes * s.accelerator.num_processes == 1:
        return accumulate(s, feed)
    passes = [next(feed) for _ in range(s.passes)]
    again = s.passes > 1  # of one pass the graph is kept; of more it would not fit
    found = []
    for part, (tensors, _, _) in enumerate(passes):
        s.seeded(s.state.step, part)
        with torch.set_grad_enabled(not again), s.accelerator.autocast():
            found.append(s.task.embed(tensors))
    leaves, own = _everywhere(s, [tensors for tensors, _, _ in passes], found)
    leaves["scale"] = s.task.scale.detach().clone()
    weights = leaves.pop("weights")
    for name in ("images", "texts", "scale"):
        leaves[name].requires_grad_(True)
    with s.accelerator.autocast():
        loss = (s.task.contrast(**leaves) * weights).mean()
    loss.backward()
    slopes: list[Any] = [leaves[name].grad for name in ("images", "texts", "scale")]
    for part, (tensors, _, _) in enumerate(passes):
        s.seeded(s.state.step, part)  # dropout as before
        with _synchronised(s, part), s.accelerator.autocast():
            images, texts = s.task.embed(tensors) if again else found[part]
            first = s.place_of(part) == 0  # one for all, and the others' gradients are waited for
            towards = (images * slopes[0][own[part]]).sum() + (texts * slopes[1][own[part]]).sum()
            towards = towards + s.task.scale * slopes[2] * first
            s.accelerator.backward(towards * s.accelerator.num_processes)  # whose gradients are averaged
    return loss.detach(), [key for _, names, _ in passes for key in names]


def _everywhere(
    s: Setup, batches: list[dict[str, torch.Tensor]], found: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return images, texts, ids and weights of a step's pictures in the order of its places, and where own ones are."""
    longest, world, passes = s.recipe.train.batch_size, s.accelerator.num_processes, s.passes
    parts = [
        {"images": images.detach().float(), "texts": texts.detach().float(), "ids": t["ids"], "weights": t["weights"]}
        for t, (images, texts) in zip(batches, found, strict=True)
    ]
    lengths = s.accelerator.gather(torch.tensor([[len(p["ids"]) for p in parts]], device=s.device))  # (world, passes)
    lengths = lengths.T.flatten()
    real = torch.arange(longest, device=s.device)[None] < lengths[:, None]  # (places, longest)
    every = {}
    for name in parts[0]:
        padded = torch.cat([pad(p[name], (*[0] * (2 * p[name].ndim - 1), longest - len(p[name]))) for p in parts])
        together = s.accelerator.gather(padded)  # (world * passes * longest, …)
        shape = together.shape[1:]
        every[name] = together.view(world, passes, longest, *shape).transpose(0, 1).flatten(0, 1)[real].contiguous()
    ends = lengths.cumsum(0).tolist()
    places = [s.place_of(part) for part in range(passes)]
    return every, [torch.arange(ends[p] - int(lengths[p]), ends[p], device=s.device) for p in places]


@contextlib.contextmanager
def _synchronised(s: Setup, part: int) -> Iterator[None]:
    """Synchronise gradients in the last pass alone; sharded ones in each, since whole ones would not fit."""
    with contextlib.ExitStack() as stack:
        if part < s.passes - 1 and not s.sharded:
            for net in s.task.nets.values():
                stack.enter_context(s.accelerator.no_sync(net))
        yield
