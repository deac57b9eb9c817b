"""Run a VAE's large feature maps in strips of rows: a quarter of the memory, the same picture up to rounding.

Decoding in independent tiles changes the picture, because GroupNorm normalises over the whole picture and a tile has
its own mean and variance (diffusers' tiling of the embedded VAE at 512x512: 4 to 8 of 255 levels on average, up to
125). Here the statistics of each normalisation are first summed over all strips, and every strip is computed with the
rows above and below that its convolutions read. Rows computed twice make it about twice the work. Attention, and layers
at a quarter of the picture's size or less, run whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import batch_norm

from genkit.components.footprint import COUNT, LEAST, STRIPED


@dataclasses.dataclass(frozen=True)
class _Map:
    """A feature map (1, C, height, W). `rows(a, b)` computes its rows a to b, or slices them from `data`."""

    height: int
    rows: Callable[[int, int], torch.Tensor]
    data: torch.Tensor | None = None


def can_strip(vae: Any) -> bool:
    """Whether the VAE has the structure of AutoencoderKL, without attention in the blocks that run in strips."""
    if not all(hasattr(vae, part) for part in ("decoder", "encoder", "quant_conv", "post_quant_conv")):
        return False
    up, down = list(vae.decoder.up_blocks), list(vae.encoder.down_blocks)
    cut = [*up[-STRIPED:], *down[:STRIPED]]
    resized = [len(a.upsamplers or ()) == len(b.downsamplers or ()) == 1 for a, b in zip(up[:-1], down, strict=False)]
    return len(up) > 1 and all(resized) and not any(getattr(block, "attentions", None) for block in cut)


def decode_in_strips(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return the picture (1, 3, H, W) of one latent (1, C, h, w), as vae.decode does."""
    decoder, blocks = vae.decoder, list(vae.decoder.up_blocks)
    x = latents if vae.post_quant_conv is None else vae.post_quant_conv(latents)
    x = decoder.mid_block(decoder.conv_in(x))
    split = max(1, len(blocks) - STRIPED)
    for block in blocks[: split - 1]:
        x = block(x)
    for resnet in blocks[split - 1].resnets:
        x = resnet(x, None)
    for before, block in zip(blocks[split - 1 :], blocks[split:], strict=False):
        x = _upsample(before.upsamplers[0], x)
        for resnet in block.resnets:
            x = _stored(_resnet(resnet, x))
    statistics = _statistics(x, decoder.conv_norm_out)
    return _collect(_around(x, lambda part: decoder.conv_out(decoder.conv_act(_norm(part, *statistics))), 1))


def encode_in_strips(vae: Any, picture: torch.Tensor) -> torch.Tensor:
    """Return the moments (1, 2C, h, w) of one picture (1, 3, H, W), as vae.encode(...).latent_dist.parameters."""
    encoder, blocks = vae.encoder, list(vae.encoder.down_blocks)
    count = min(STRIPED, len(blocks) - 1)
    x = _around(_stored(picture), encoder.conv_in, 1)
    for block in blocks[:count]:
        for resnet in block.resnets:
            x = _stored(_resnet(resnet, x))
        x = _stored(_collect(_downsample(block.downsamplers[0], x)))
    whole = x.rows(0, x.height)
    for block in blocks[count:]:
        whole = block(whole)
    whole = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(whole))))
    return whole if vae.quant_conv is None else vae.quant_conv(whole)


def _strips(height: int) -> Iterator[tuple[int, int]]:
    rows = max(LEAST, -(-height // COUNT))
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def _stored(x: torch.Tensor) -> _Map:
    return _Map(x.shape[2], lambda a, b: x[:, :, a:b], x)


def _around(x: _Map, layer: Callable[[torch.Tensor], torch.Tensor], reach: int) -> _Map:
    """Return the lazy map of a layer that keeps the size and reads `reach` rows above and below."""

    def rows(a: int, b: int) -> torch.Tensor:
        top = max(0, a - reach)
        return layer(x.rows(top, min(x.height, b + reach)))[:, :, a - top : b - top]

    return _Map(x.height, rows)


def _upsample(layer: Any, x: Any) -> _Map:
    """Return the lazy map of Upsample2D: nearest neighbours, then a 3x3 convolution."""
    low = x if isinstance(x, _Map) else _stored(x)

    def rows(a: int, b: int) -> torch.Tensor:
        top = max(0, a - 1) // 2
        return layer(low.rows(top, min(low.height, b // 2 + 1)))[:, :, a - 2 * top : b - 2 * top]

    return _Map(2 * low.height, rows)


def _downsample(layer: Any, x: _Map) -> _Map:
    """Return the lazy map of Downsample2D: 3x3 with stride 2, padded at the bottom and right only."""
    return _Map(x.height // 2, lambda a, b: layer(x.rows(2 * a, min(x.height, 2 * b + 1))))


def _resnet(block: Any, x: _Map) -> torch.Tensor:
    """Return the output of ResnetBlock2D; it overwrites a stored input with the same number of channels."""
    act, first = block.nonlinearity, _statistics(x, block.norm1)

    def opened(part: torch.Tensor) -> torch.Tensor:
        return block.conv1(act(_norm(part, *first)))

    second = _statistics(_around(x, opened, 1), block.norm2)

    def whole(part: torch.Tensor) -> torch.Tensor:
        inner = block.conv2(act(_norm(opened(part), *second)))
        outer = part if block.conv_shortcut is None else block.conv_shortcut(part)
        return (outer + inner) / block.output_scale_factor

    return _collect(_around(x, whole, 2), x.data if block.conv_shortcut is None else None)


def _collect(x: _Map, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a map as one tensor, in `out` if given: a strip is written once the next one has been computed from it."""
    last: tuple[slice, torch.Tensor] | None = None
    for a, b in _strips(x.height):
        part = x.rows(a, b)
        if out is None:
            out = part.new_empty((*part.shape[:2], x.height, part.shape[3]))
        if last is not None:
            out[:, :, last[0]] = last[1]
        last = slice(a, b), part
    assert out is not None and last is not None
    out[:, :, last[0]] = last[1]
    return out


def _statistics(x: _Map, norm: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return (norm, mean, variance by channel) of a map for a GroupNorm, merged over strips (Chan et al. 1983)."""
    count, mean, spread = 0, torch.zeros(()), torch.zeros(())
    for a, b in _strips(x.height):
        part = x.rows(a, b).reshape(norm.num_groups, -1).float()
        var, middle = torch.var_mean(part, dim=1, correction=0)
        total = count + part.shape[1]
        delta = middle - mean.to(middle.device)
        spread = spread.to(var.device) + part.shape[1] * (var + delta**2 * (count / total))
        mean, count = middle - delta * (count / total), total
    each = norm.num_channels // norm.num_groups
    return norm, mean.repeat_interleave(each), (spread / count).repeat_interleave(each)


def _norm(x: torch.Tensor, norm: Any, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """Return GroupNorm of x with the given statistics; for a single picture batch_norm computes the same."""
    return batch_norm(x, mean, var, norm.weight.float(), norm.bias.float(), eps=norm.eps)
