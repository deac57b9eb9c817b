"""Make networks of transformers faster with the same results up to rounding."""

from __future__ import annotations

from typing import Any

import torch

from genkit.device.cpu import through_onednn


def quicken(model: Any) -> None:
    """Compute attention that transformers writes out in one operation, and on a CPU linear layers with oneDNN.

    Modules and parameters are kept, and no weight is copied.
    """
    from transformers.models.blip.modeling_blip import BlipAttention

    for module in model.modules():
        if type(module) is BlipAttention:
            module.forward = _Attention(module)  # type: ignore[method-assign, assignment]
    first = next(model.parameters())
    if first.device.type == "cpu" and first.dtype == torch.float32:
        through_onednn(model)


class _Attention:
    """The forward of BLIP's attention over a picture, which transformers computes with all scores in memory."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Return (x, None) of (B, tokens, width); there are no scores to return."""
        own = self.module
        shape = hidden_states.shape
        three = own.qkv(hidden_states).view(*shape[:2], 3, own.num_heads, shape[2] // own.num_heads)
        query, key, value = three.permute(2, 0, 3, 1, 4)
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=own.scale)
        return own.projection(found.transpose(1, 2).reshape(shape)), None
