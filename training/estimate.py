"""Estimate memory and operations of training by running a step on meta tensors, which take no memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from genkit.components import Components, ModelInfo
from genkit.components.footprint import vae_encode
from genkit.components.loading import construct, load_tokenizer
from genkit.errors import InputError
from genkit.schedulers import Scheduler
from genkit.training.data import Batch
from genkit.training.processes import world
from genkit.training.recipe import Recipe
from genkit.training.tasks import make_task

SHAPES = torch.device("meta")


def task_on_shapes(recipe: Recipe, info: ModelInfo) -> Any:
    """Return the Task of a recipe with networks on the meta device. Raises InputError as `make_task`."""
    with SHAPES:
        networks = {name: construct(part).eval().requires_grad_(False) for name, part in info.parts.items()}
    parts = Components(
        info=info, device=SHAPES, tokenizer=load_tokenizer(info.tokenizer, info.text_config),
        tokenizer_2=load_tokenizer(info.tokenizer_2, info.configs.get("text_encoder_2", {})),
        scheduler=_scheduler(info), **networks,
    )  # fmt: skip
    task = make_task(recipe, parts, torch.float32)
    task.everything = [*networks.values(), *task.networks.values()]
    task.tokenizer = parts.tokenizer
    for network in task.networks.values():
        network.train()
    return task


def _scheduler(info: ModelInfo) -> Scheduler | None:
    try:
        return Scheduler.from_config(info.scheduler_config) if info.scheduler_config else None
    except InputError as error:
        raise InputError(f"scheduler: {error}") from None


def training_memory(recipe: Recipe, info: ModelInfo, task: Any, size: tuple[int, int]) -> dict[str, int]:
    """Return the bytes that each process needs to train on pictures of `size` (width, height), by purpose.

    task: of `task_on_shapes`. weights: float32 if trained, else in the recipe's precision. gradients, Adam (two
    moments) and average (EMA): 4, 8 and 4 bytes for each trained weight. activations: those saved for the backward pass
    of a batch, half as many bytes in mixed precision, or those of encoding the pictures if that is more. Not included:
    workspaces of libraries, and the block that gradient checkpointing recomputes.
    """
    item = 4 if recipe.train.mixed_precision == "fp32" else 2
    every = {id(p): p for network in task.everything for p in network.parameters()}
    share = world() if recipe.train.sharding == "full" else 1
    spread = {id(p) for network in task.networks.values() for p in network.parameters()}
    learns = sum(p.numel() for p in every.values() if p.requires_grad) // share
    weights = sum(
        p.numel() * (4 if p.requires_grad else item) // (share if key in spread else 1) for key, p in every.items()
    )
    activations = _kept(task, size, {p.untyped_storage()._cdata for p in every.values()}) * item // 4
    vae = info.configs.get("vae")
    if vae is not None and recipe.task != "autoencoder" and not recipe.data.cache:
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        activations = max(activations, item * vae_encode(vae, size[1] // scale, size[0] // scale))
    return {
        "weights": weights, "gradients": 4 * learns, "Adam": 8 * learns,
        "average": 4 * learns * bool(recipe.train.ema), "activations": activations * recipe.train.batch_size,
    }  # fmt: skip


def training_work(recipe: Recipe, task: Any, size: tuple[int, int]) -> int:
    """Return the floating-point operations of a step for one picture of `size`, forward and backward.

    Matrix products and convolutions are counted, by torch; those of encoding too, unless latents are cached.
    """
    with FlopCounterMode(display=False) as counter:
        batch = _nothing(size)
        tensors = task.encode(batch)
        before = counter.get_total_flops()
        with torch.enable_grad():
            task.loss(tensors, None, torch.zeros(2, dtype=torch.long, device=SHAPES)).sum().backward()
    for network in task.networks.values():
        network.zero_grad(set_to_none=True)
    return (counter.get_total_flops() - before * bool(recipe.data.cache)) // 2


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured FLOP/s of matrix products on a device, an upper bound for networks."""
    for side in (4096,) if device.type == "cuda" else (256, 1024):
        one = torch.ones(side, side, device=device, dtype=dtype)
        one @ one
        best = float("inf")
        for _ in range(10 if device.type == "cuda" else 3):
            began = time.perf_counter()
            (one @ one)[0, 0].item()  # synchronises
            best = min(best, time.perf_counter() - began)
        if best > 0.01:  # a CPU that emulates half precision would take seconds for the larger one
            break
    return 2 * side**3 / best


def _nothing(size: tuple[int, int]) -> Batch:
    """Return a batch of two pictures as meta tensors."""
    pixels = torch.zeros(2, 3, size[1], size[0], device=SHAPES)
    sizes = torch.zeros(2, 6, dtype=torch.long, device=SHAPES)
    return Batch(
        pixels, [""] * 2, [""] * 2, sizes, torch.ones(2), torch.zeros(2, dtype=torch.bool), conditioning=pixels.byte()
    )


def _kept(task: Any, size: tuple[int, int], own: set[int]) -> int:
    """Return the bytes, in float32, that are saved for the backward pass of one picture.

    They are half those of a batch of two: norms refuse a single value per channel. own: the storages of weights, which
    are not counted.
    """
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # kept alive, so that its address is not reused
        return tensor

    tensors = task.encode(_nothing(size))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.enable_grad(), hooks, _FusedAttention():
        loss = task.loss(tensors, None, torch.zeros(2, dtype=torch.long, device=SHAPES))
    total = sum(storage.nbytes() for storage in storages.values())
    del loss  # frees the graph, whose storages had to live until here
    return total // 2


class _FusedAttention(TorchFunctionMode):
    """Lets attention save what the fused kernels save; on the meta device it would save the attention matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            return _Attention.apply(named["query"], named["key"], named["value"])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


def lasting(seconds: float) -> str:
    """Return a duration as text in a suitable unit."""
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86_400:,.0f} days"
