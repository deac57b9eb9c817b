"""Attention backends: kernels of torch and xformers, and plain products. device/probes.py chooses between them.

torch's kernels are called directly by their operators, because torch.nn.attention.sdpa_kernel switches them for the
whole process, including a thread that decodes at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.functional import scaled_dot_product_attention

aten = torch.ops.aten

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

NARROW = 16  # head width up to which plain products are faster on a CPU (measured: 1.5x at 3, 1.1 to 1.7x at 6)
NARROW_TRAINED = (
    8  # the same for forward and backward pass (2.4x at 3, 1.8 to 2.0x at 6, 1.1 to 1.8x at 8, 0.7 to 1.2x at 12)
)
# Attention weights that are computed at a time
CACHED = 2**18  # on a CPU: 1 MB stays in the caches
SLICE = 2**25  # on other devices: 64 MB in half precision, and enough work for a GPU
EXPONENT = 60.0  # bound on exponents: 2^60 summed over 2^20 positions is finite in float32, 2^-60 is a normal number


def sliced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(width)) v by plain products, for some heads, or some queries of one, at a time.

    Takes little memory on any device. On a CPU it is also the fastest for heads with few channels: see _Blocks.
    """
    in_place = q.device.type == "cpu" and not torch.compiler.is_compiling()  # not under a compiler
    if in_place:
        return _Blocks.apply(q, k, v)
    batch, heads, length, width = q.shape
    n, others = batch * heads, k.shape[2]
    at_once = min(n, max(1, SLICE // (length * others)))
    rows = min(length, max(1, SLICE // others))
    parts = [slice(i, min(i + at_once, n)) for i in range(0, n, at_once)]
    queries = [slice(i, min(i + rows, length)) for i in range(0, length, rows)]
    q, k = q.reshape(n, length, width) * width**-0.5, k.reshape(n, others, width).transpose(1, 2)
    v = v.reshape(n, others, width)
    return torch.cat(
        [torch.cat([(q[p, r] @ k[p]).softmax(dim=-1) @ v[p] for r in queries], dim=1) for p in parts]
    ).view(batch, heads, length, width)


class _Blocks(torch.autograd.Function):
    """Attention on a CPU in blocks that fit the cache; the backward pass recomputes the weights.

    All products are transposed, which avoids outputs of only `width` columns.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = q.shape
        n, others = batch * heads, k.shape[2]
        q = q.transpose(2, 3).reshape(n, width, length).contiguous()
        # An extra row of ones in v sums the weights in the second product: softmax needs no pass of its own.
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=3).transpose(2, 3).reshape(n, width + 1, others)
        k = k.reshape(n, others, width) * (width**-0.5 * math.log2(math.e))
        # Cauchy-Schwarz bounds the exponents; only if the bound allows overflow the maximum is subtracted first
        largest = math.sqrt(_largest(q, 1) * _largest(k, 2))
        ctx.normalise = torch.exp2 if largest < EXPONENT else _softmax2
        out = q.new_empty(n, width + 1, length)
        for p, r, (w,) in _blocks(q, k, 1):
            torch.bmm(k[p], q[p, :, r], out=w)
            ctx.normalise(w, out=w)
            torch.bmm(v[p], w, out=out[p, :, r])
        ctx.save_for_backward(q, k, v, out)
        return (out[:, :width] / out[:, width:]).view(batch, heads, width, length).transpose(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, out = ctx.saved_tensors
        batch, heads, _, width = grad.shape
        # The scores' gradient is w (v g - delta), delta = g out; an extra row of g, for the ones in v, subtracts it.
        g = grad.transpose(2, 3).reshape(q.shape) / out[:, width:]
        g = torch.cat([g, (g * out[:, :width]).sum(dim=1, keepdim=True) / -out[:, width:]], dim=1)
        rows = v.transpose(1, 2).contiguous()
        to_q, (to_k, to_v) = torch.empty_like(q), q.new_zeros(2, len(q), width, k.shape[1])
        for p, r, (w, d) in _blocks(q, k, 2):
            torch.bmm(k[p], q[p, :, r], out=w)
            ctx.normalise(w, out=w)
            torch.bmm(rows[p], g[p, :, r], out=d)
            to_v[p].baddbmm_(g[p, :width, r], w.transpose(1, 2))
            d.mul_(w)
            torch.bmm(k[p].transpose(1, 2), d, out=to_q[p, :, r])
            to_k[p].baddbmm_(q[p, :, r], d.transpose(1, 2))
        found = to_q * math.log(2), to_k * width**-0.5, to_v
        return tuple(x.view(batch, heads, width, -1).transpose(2, 3) for x in found)


def _blocks(q: torch.Tensor, k: torch.Tensor, count: int) -> Iterator[tuple[slice, slice, list[torch.Tensor]]]:
    """Yield slices of heads and of queries, and buffers for `count` blocks of weights, (heads, S, queries).

    q: (n, width, L). k: (n, S, width).
    """
    (n, _, length), others = q.shape, k.shape[1]
    at_once, rows = min(n, max(1, CACHED // (length * others))), min(length, max(1, CACHED // others))
    room = q.new_empty(count, at_once, others, rows)
    for i in range(0, n, at_once):
        for j in range(0, length, rows):
            heads, queries = slice(i, min(i + at_once, n)), slice(j, min(j + rows, length))
            yield heads, queries, list(room[:, : heads.stop - i, :, : queries.stop - j])


def _largest(x: torch.Tensor, dim: int) -> float:
    """Return the largest squared norm, ignoring NaN: a sample with a NaN must not affect the others."""
    return float(x.float().square().sum(dim=dim).nan_to_num(0.0, 0.0).amax())


def _softmax2(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write 2^x over its sum along dimension 1 to `out`."""
    return torch.softmax(x.mul_(math.log(2)), dim=1, out=out)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention as torch has it: half precision and widths up to 256 on a GPU, anything on a CPU."""
    if q.is_cuda:
        return _flash_on_gpu(q, k, v)
    if not (q.numel() and k.numel() and q.dtype == k.dtype == v.dtype and q.shape[-1] == k.shape[-1] == v.shape[-1]):
        raise NotImplementedError
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Call xformers (its kernels do not load with every version of torch)."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _checked(can_use: Callable[[Any], bool], kernel: Attend) -> Attend:
    """Return one of torch's GPU kernels, called only with what torch says it can compute; else NotImplementedError.

    The operators check too little themselves: cuDNN's in float32 writes out of bounds (NVIDIA/cudnn-frontend#424).
    """

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and not (
            q.is_cuda and can_use(SDPAParams(q, k, v, None, 0.0, False, False))
        ):
            raise NotImplementedError
        return kernel(q, k, v)

    return attend


_flash_on_gpu = _checked(can_use_flash_attention, lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v)[0])
# q (B, heads, L, width), k and v (B, heads, S, width) -> (B, heads, L, width). Names: genkit.device.devices.ATTENTION
BACKENDS: dict[str, Attend] = {
    "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v),  # torch's own choice
    "flash": flash,
    "cudnn": _checked(
        can_use_cudnn_attention, lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    ),
    "efficient": _checked(
        can_use_efficient_attention,
        lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0],
    ),
    "xformers": xformers,
    "sliced": sliced,
    "math": lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v)[0],
}
