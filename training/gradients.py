"""The gradients of a step: by plain accumulation, or for CLIP's loss over all pictures of the step together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from genkit.training.setup import Setup


def accumulate(s: Setup, feed: Iterator[Any]) -> tuple[torch.Tensor, list[str]]:
    """Accumulate the gradients of this process's passes of a step; return the weighted loss and the pictures' names.

    The weights are such that the mean over the processes, of losses as of gradients, is the mean over all pictures of
    the step. Gradients are synchronised after the last pass.
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
    """Accumulate the gradients of a contrastive loss over all pictures of a step; return as `accumulate` does.

    First the embeddings of all passes and processes are computed, then the gradient of the loss with respect to them,
    and then, pass by pass, that with respect to the weights (GradCache, Gao et al. 2021).
    """
    if s.passes * s.accelerator.num_processes == 1:
        return accumulate(s, feed)
    passes = [next(feed) for _ in range(s.passes)]
    again = s.passes > 1  # the graph of a single pass is kept; those of several would not fit into memory
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
        s.seeded(s.state.step, part)  # the same dropout as before
        with _synchronised(s, part), s.accelerator.autocast():
            images, texts = s.task.embed(tensors) if again else found[part]
            first = s.place_of(part) == 0  # the gradient of the scale is added once over all processes
            towards = (images * slopes[0][own[part]]).sum() + (texts * slopes[1][own[part]]).sum()
            towards = towards + s.task.scale * slopes[2] * first
            s.accelerator.backward(towards * s.accelerator.num_processes)  # since gradients are averaged
    return loss.detach(), [key for _, names, _ in passes for key in names]


def _everywhere(
    s: Setup, batches: list[dict[str, torch.Tensor]], found: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Gather images, texts, ids and weights of all pictures of a step, in order; return also the own ones' indices."""
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
    """Synchronise gradients in the last pass only; sharded ones in each, since unsharded ones would not fit."""
    with contextlib.ExitStack() as stack:
        if part < s.passes - 1 and not s.sharded:
            for net in s.task.nets.values():
                stack.enter_context(s.accelerator.no_sync(net))
        yield
