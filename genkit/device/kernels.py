# mypy: allow-untyped-defs
"""Triton kernels on channels-last data: x[n, position, channel], contiguous."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["positions", "channels", "chunks"])
def sum_up(x, sums, positions, channels, chunks, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """sums[n, chunk, 0 and 1, c]: of the values, and of their squares, at the positions of a chunk."""
    n, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    squares = tl.zeros([COLS], tl.float32)
    for first in range(0, CHUNK, ROWS):
        at = chunk * CHUNK + first + tl.arange(0, ROWS)
        here = (at < positions)[:, None] & (cols < channels)[None, :]
        values = tl.load(x + (n * positions + at[:, None]) * channels + cols[None, :], here, 0.0).to(tl.float32)
        total += tl.sum(values, 0)
        squares += tl.sum(values * values, 0)
    out = sums + (n * chunks + chunk) * 2 * channels + cols
    tl.store(out, total, cols < channels)
    tl.store(out + channels, squares, cols < channels)


@triton.jit(do_not_specialize=["positions", "channels", "chunks", "width", "step"])
def to_scale(
    sums, weight, bias, added, scale, positions, channels, chunks, eps, width, step,
    ADD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """scale[n, 0 and 1, c]: what a value is multiplied by, and what is added then."""
    n, group = tl.program_id(0), tl.program_id(1)
    cols = group * width + tl.arange(0, WIDTH)
    here = tl.arange(0, WIDTH) < width
    total = tl.zeros([WIDTH], tl.float32)
    squares = tl.zeros([WIDTH], tl.float32)
    for chunk in range(chunks):
        at = sums + (n * chunks + chunk) * 2 * channels + cols
        total += tl.load(at, here, 0.0)
        squares += tl.load(at + channels, here, 0.0)
    more = tl.zeros([WIDTH], tl.float32)
    if ADD:
        more = tl.load(added + n * step + cols, here, 0.0).to(tl.float32)
        squares += more * (2 * total + positions * more)
        total += positions * more
    count = positions * width
    mean = tl.sum(total, 0) / count
    variance = tl.maximum(tl.sum(squares, 0) / count - mean * mean, 0.0)
    factor = tl.load(weight + cols, here, 0.0).to(tl.float32) / tl.sqrt(variance + eps)
    tl.store(scale + n * 2 * channels + cols, factor, here)
    offset = tl.load(bias + cols, here, 0.0).to(tl.float32) + (more - mean) * factor
    tl.store(scale + n * 2 * channels + channels + cols, offset, here)


@triton.jit
def apply(x, scale, out, positions, channels, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    here = (at < positions)[:, None] & (cols < channels)[None, :]
    place = (n * positions + at[:, None]) * channels + cols[None, :]
    factor = tl.load(scale + n * 2 * channels + cols, cols < channels, 0.0)
    offset = tl.load(scale + n * 2 * channels + channels + cols, cols < channels, 0.0)
    y = tl.load(x + place, here, 0.0).to(tl.float32) * factor[None, :] + offset[None, :]
    if SILU:
        y = y / (1 + tl.exp(-y))
    tl.store(out + place, y.to(out.dtype.element_ty), here)


@triton.jit
def add(x, other, bias, out, count, channels, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    here = at < count
    total = tl.load(x + at, here, 0.0).to(tl.float32) + tl.load(other + at, here, 0.0).to(tl.float32)
    total += tl.load(bias + at % channels).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), here)


@triton.jit(do_not_specialize=["add"])
def add_norm(
    x, other, weight, bias, total, out, count, channels, eps, add, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """total = x + other if `add`, and out = layer_norm(total), over the channels of each of `count` positions."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    here = (at < count)[:, None] & (cols < channels)[None, :]
    place = at[:, None] * channels + cols[None, :]
    value = tl.load(x + place, here, 0.0).to(tl.float32)
    if add:
        rounded = (value + tl.load(other + place, here, 0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + place, rounded, here)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 1) / channels
    value = tl.where(here, value - mean[:, None], 0.0)
    value = value / tl.sqrt(tl.sum(value * value, 1) / channels + eps)[:, None]
    factor = tl.load(weight + cols, cols < channels, 0.0).to(tl.float32)
    offset = tl.load(bias + cols, cols < channels, 0.0).to(tl.float32)
    tl.store(out + place, (value * factor[None, :] + offset[None, :]).to(out.dtype.element_ty), here)


@triton.jit
def gate(x, out, count, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out = a * gelu(b), of x that holds a and b side by side, 2 * width, at each of `count` positions."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    here = (at < count)[:, None] & (cols < width)[None, :]
    place = at[:, None] * 2 * width + cols[None, :]
    a = tl.load(x + place, here, 0.0).to(tl.float32)
    b = tl.load(x + place + width, here, 0.0).to(tl.float32)
    y = a * 0.5 * b * (1 + tl.erf(b * 0.7071067811865476))
    tl.store(out + at[:, None] * width + cols[None, :], y.to(out.dtype.element_ty), here)
