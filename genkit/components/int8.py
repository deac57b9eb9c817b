"""Weights stored in 8 bits: half the memory of half precision, for a picture that differs a little."""

from __future__ import annotations

from typing import Any

import torch

LEAST = 4096  # smaller weights stay as they are


class _Codes:
    """Base of the layers below: `weight` is computed on access from int8 codes and a scale for each output channel.

    Rounding to 254 levels between a channel's extremes is three to four times closer than float8_e4m3fn, whose levels
    are spread over magnitudes that weights do not have (embedded model, 12 steps: 0.5 of 255 a picture against 2.2).
    """

    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return self.codes * self.scale


class _Linear(_Codes, torch.nn.Linear):  # type: ignore[override]
    pass


class _Conv2d(_Codes, torch.nn.Conv2d):  # type: ignore[override]
    pass


def store_in_8_bits(network: Any) -> int:
    """Turn the weights of convolutions and linear layers into int8 codes, for inference only; returns how many.

    Everything else, and what layers compute in, stays: `.to(dtype)` converts biases, norms and scales as before.
    """
    stored = 0
    for module in network.modules():
        kind = _KINDS.get(type(module))
        if kind is None or module.weight.numel() < LEAST:
            continue
        weight = module.weight.detach()
        scale = weight.float().abs().flatten(1).amax(dim=1).clamp(min=1e-4) / 127
        scale = scale.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
        codes = (weight.float() / scale.float()).round_().clamp_(-127, 127).to(torch.int8)
        del module._parameters["weight"]
        module.register_buffer("codes", codes)
        module.register_buffer("scale", scale)
        module.__class__ = kind
        stored += 1
    return stored


def is_8_bit(network: Any) -> bool:
    """Whether `store_in_8_bits` has converted layers of the network."""
    return any(isinstance(module, _Codes) for module in network.modules())


_KINDS: dict[type, type] = {torch.nn.Linear: _Linear, torch.nn.Conv2d: _Conv2d}
