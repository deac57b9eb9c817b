"""Attention backends of torch and xformers: each is probed before use, and the fastest one that works is chosen.

torch's kernels are called directly by their operators, because torch.nn.attention.sdpa_kernel switches them for the
whole process, including a thread that decodes at the same time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

aten = torch.ops.aten

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

NARROW = 16  # head width up to which plain products are faster on a CPU (measured: 1.5x at 3, 1.1 to 1.7x at 6)
NARROW_TRAINED = 8  # … forwards and backwards (2.4x at 3, 1.8 to 2.0x at 6, 1.1 to 1.8x at 8, 0.7 to 1.2x at 12)
CACHED = 2**18  # attention weights at a time on a CPU: 1 MB stays in the caches
EXPONENT = 60.0  # 2 to this times 2^20 positions is finite in float32, and 2 to minus this is not small
SLICE = 2**25  # … elsewhere: 64 MB in half precision, and enough work for a GPU
TIMED = 4096  # positions, as at 512 x 512 pixels
TOKENS = 77
CLOSE = 1.05  # a backend must be faster than those listed before it by more than this factor
# Common widths of heads; cross-attention up to 160, 512 is the VAE's
WIDTHS = {"cpu": (3, 16, 40, 64, 512), "cuda": (40, 64, 80, 160, 512)}


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
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Call xformers (its kernels do not load with every version of torch)."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@dataclasses.dataclass(frozen=True)
class Probe:
    """The result of probing a backend: why it cannot be used, or None; on a GPU its milliseconds a call."""

    reason: str | None = None
    ms: float | None = None

    @property
    def shown(self) -> bool | float | str:
        """The table's cell: milliseconds, True if it works but was not timed, or the reason why it does not."""
        return self.reason or (True if self.ms is None else round(self.ms, 3))


@functools.cache
def probe(attend: Attend, device: torch.device, dtype: torch.dtype, width: int, cross: bool) -> Probe:
    """Run a backend once, compare its output with float64, and on a GPU time it.

    q, k and v are views of one tensor, as with fused projections.
    """
    try:
        with torch.no_grad():
            q, k, v = _inputs(device, dtype, width, cross, rows=2, length=256)
            expected = scaled_dot_product_attention(q.cpu().double(), k.cpu().double(), v.cpu().double())
            error = float((attend(q, k, v).cpu().double() - expected).abs().max() / expected.abs().max())
            exact = 1e-4 if device.type == "cpu" else 4e-3  # a GPU may multiply in TF32
            if not error < max(exact, 8 * torch.finfo(dtype).eps):  # also true for NaN
                return Probe(f"wrong numbers (off by {error:.2g})")
            return Probe(ms=_milliseconds(attend, device, dtype, width, cross) if device.type == "cuda" else None)
    except Exception as error:  # any error of a library means that the backend does not work
        return Probe(next((text for kind, text in _REASONS.items() if isinstance(error, kind)), first_line(error)))


def choose(asked: str, device: torch.device, dtype: torch.dtype, width: int, cross: bool) -> tuple[str, str | None]:
    """Return the name of the backend for heads of `width` channels, and why it is not the one asked for, or None."""
    reason = None
    if asked != "auto":
        reason = probe(BACKENDS[asked], device, dtype, width, cross).reason
        if reason is None:
            return asked, None
    if device.type == "cuda":
        times = {name: probe(BACKENDS[name], device, dtype, width, cross).ms for name in _TIMED}
        working = {name: ms for name, ms in times.items() if ms is not None}
        for name, ms in working.items():
            if ms <= CLOSE * min(working.values()):
                return name, reason
    narrow = device.type == "cpu" and dtype == torch.float32 and width <= NARROW
    for name in ("sliced", "sdpa", "math") if narrow else ("sdpa", "sliced", "math"):
        if probe(BACKENDS[name], device, dtype, width, cross).reason is None:
            return name, reason
    return "sdpa", reason


def table(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, bool | float | str]]:
    """Return for each backend and kind of attention ("self 40") the probe's result, and for "auto" the choice."""
    widths = WIDTHS.get(device.type, WIDTHS["cuda"])
    kinds = {f"{'cross' if cross else 'self'} {w}": (w, cross) for cross in (False, True) for w in widths}
    del kinds[f"cross {widths[-1]}"]
    found = {
        name: {kind: probe(attend, device, dtype, *key).shown for kind, key in kinds.items()}
        for name, attend in BACKENDS.items()
    }
    return {"auto": {kind: choose("auto", device, dtype, *key)[0] for kind, key in kinds.items()}, **found}


def table_lines(found: dict[str, dict[str, bool | float | str]]) -> list[str]:
    """Return a `table` as lines of text; a dash is what does not work, with the reasons at the end of the line."""
    kinds = list(found["auto"])
    timed = any(isinstance(cell, float) for cells in found.values() for cell in cells.values())
    lines = [["ms" if timed else "attention", *kinds]]
    for name, cells in found.items():
        if name == "auto":
            lines.append([name, *map(str, cells.values())])
            continue
        reasons = list(dict.fromkeys(cell for cell in cells.values() if isinstance(cell, str)))
        shown = ["yes" if cell is True else "-" if cell in reasons else str(cell) for cell in cells.values()]
        everywhere = len(reasons) == 1 and set(shown) == {"-"}
        lines.append([name, *([] if everywhere else shown), *([f"- {', '.join(reasons)}"] if reasons else [])])
    width = max(len(kind) for kind in kinds)
    return [f"{name:<10}" + "  ".join(f"{cell:<{width}}" for cell in cells).rstrip() for name, *cells in lines]


def _inputs(
    device: torch.device, dtype: torch.dtype, width: int, cross: bool, rows: int, length: int
) -> Iterable[torch.Tensor]:
    """Return q (rows, 2, length, width), k and v, 77 long for cross-attention, as views of one tensor of noise."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = {1: length, 2: TOKENS} if cross else {3: length}
    for parts, size in sizes.items():
        noise = torch.randn(rows, size, parts * 2 * width, device=device, dtype=dtype, generator=generator)
        yield from (x.view(rows, size, 2, width).transpose(1, 2) for x in noise.chunk(parts, dim=-1))


def _milliseconds(attend: Attend, device: torch.device, dtype: torch.dtype, width: int, cross: bool) -> float:
    """Return the median milliseconds of a call large enough to hide its launch."""
    with torch.cuda.device(device):
        q, k, v = _inputs(device, dtype, width, cross, rows=32 if cross else max(1, 256 // width), length=TIMED)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
        attend(q, k, v)
        attend(q, k, v)
        for event in events:
            event.record()
            attend(q, k, v)
        torch.cuda.current_stream().synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 100 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:100]


_REASONS: dict[type[Exception], str] = {
    ModuleNotFoundError: "not installed",
    NotImplementedError: "no kernel for this device, dtype or width",
    torch.OutOfMemoryError: "out of memory",
}
# Backends timed on a GPU, preferred first. Not "math", which computes in float32.
_TIMED = ("sdpa", "flash", "cudnn", "efficient", "xformers", "sliced")
# q (B, heads, L, width), k and v (B, heads, S, width) -> (B, heads, L, width). Names: genkit.device.devices.ATTENTION
BACKENDS: dict[str, Attend] = {
    "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v),  # torch's own choice
    "flash": flash,
    "cudnn": lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0],
    "efficient": lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0],
    "xformers": xformers,
    "sliced": sliced,
    "math": lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v)[0],
}
