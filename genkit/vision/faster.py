"""Speed up networks of transformers; results stay the same up to rounding."""

from __future__ import annotations

from typing import Any

import torch

from genkit.device.cpu import through_onednn


def quicken(model: Any) -> None:
    """Use fused attention in BLIP, and oneDNN for linear layers on a CPU, in place. No weight is copied."""
    from transformers.models.blip.modeling_blip import BlipAttention

    for module in model.modules():
        if type(module) is BlipAttention:
            module.forward = _Attention(module)  # type: ignore[method-assign, assignment]
    first = next(model.parameters())
    if first.device.type == "cpu" and first.dtype == torch.float32:
        through_onednn(model)


class _Attention:
    """BLIP's vision attention with the fused kernel; transformers holds the whole attention matrix in memory."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Return (x, None) for (B, tokens, width); a fused kernel has no attention weights to return."""
        own = self.module
        shape = hidden_states.shape
        three = own.qkv(hidden_states).view(*shape[:2], 3, own.num_heads, shape[2] // own.num_heads)
        query, key, value = three.permute(2, 0, 3, 1, 4)
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=own.scale)
        return own.projection(found.transpose(1, 2).reshape(shape)), None
