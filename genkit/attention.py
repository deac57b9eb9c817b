"""Attention on the CPU for networks with narrow heads, where PyTorch's own kernel spends its time on overhead."""

from __future__ import annotations

from typing import Any

import torch

NARROW = 16  # head width up to which this is the faster way (measured: 1.8x at 3, 1.6x at 6, even at 16, slower at 40)
SCORES = 2**21  # attention weights at a time: 8 MB stay in the caches


def narrow_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(width)) v as scaled_dot_product_attention does, to rounding.

    q: (n, L, width); k, v: (n, S, width), n = batch * heads. Plain batched products, some heads at a time: with so few
    channels a head the work is the L x S weights, and those go fastest through memory as one block in cache. The second
    product is made transposed, which spares it an output of `width` columns.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(
            dim=-1
        ) @ v  # what is written in place has no gradient
    n, length, width = q.shape
    rows = max(1, SCORES // k.shape[1])
    if length > rows:  # a large picture: the weights of one head alone are more
        return torch.cat([narrow_attention(q[:, i : i + rows], k, v) for i in range(0, length, rows)], dim=1)
    at_once = max(1, SCORES // (length * k.shape[1]))
    q, k, v = q * width**-0.5, k.transpose(1, 2), v.transpose(1, 2).contiguous()
    weights = q.new_empty(min(at_once, n), length, k.shape[2])
    out = q.new_empty(n, width, length)
    for i in range(0, n, at_once):
        part = slice(i, min(i + at_once, n))
        w = weights[: part.stop - i]
        torch.bmm(q[part], k[part], out=w)
        torch.softmax(w, dim=-1, out=w)
        torch.bmm(v[part], w.transpose(1, 2), out=out[part])
    return out.transpose(1, 2)


class NarrowAttention:
    """Processor for the transformer blocks of a diffusers UNet: projections, `narrow_attention`, output projection.

    first: this is the first attention of the network. Guidance computes a sample twice, with its prompt and without,
    and until something looks at the prompt the two rows are the same: here they are computed once.
    """

    def __init__(self, first: bool = False) -> None:
        self.first = first

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states: (B, L, C); encoder_hidden_states: (B, S, D) for cross-attention. Returns (B, L, C)."""
        half = len(hidden_states) // 2
        if self.first and encoder_hidden_states is None and torch.equal(hidden_states[:half], hidden_states[half:]):
            return self(attn, hidden_states[:half], temb=temb).repeat(2, 1, 1)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        batch, length, channels = q.shape
        heads = attn.heads

        def split(x: torch.Tensor) -> torch.Tensor:
            return (
                x.view(batch, -1, heads, channels // heads)
                .transpose(1, 2)
                .reshape(batch * heads, -1, channels // heads)
            )

        out = narrow_attention(split(q), split(k), split(v))
        out = out.view(batch, heads, length, -1).transpose(1, 2).reshape(batch, length, channels)
        return attn.to_out[1](attn.to_out[0](out))


def speed_up_attention(network: Any) -> int:
    """Give a UNet's transformer blocks the faster attention where their heads are narrow; returns how many.

    Left alone: wide heads, which PyTorch does better, and attention with norms, masks or residuals of its own.
    """
    from diffusers.models.attention import BasicTransformerBlock

    changed = 0
    for block in network.modules():
        if not isinstance(block, BasicTransformerBlock):
            continue
        for attn in (block.attn1, block.attn2):
            plain = (
                attn is not None and attn.norm_q is None and attn.added_kv_proj_dim is None and attn.norm_cross is None
            )
            if plain and attn.to_q.out_features // attn.heads <= NARROW:
                attn.set_processor(NarrowAttention(first=changed == 0))  # type: ignore[arg-type]
                changed += 1
    return changed
