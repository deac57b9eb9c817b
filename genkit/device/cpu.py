"""Make a network faster on a CPU, with the same results up to rounding."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn.functional import linear

from genkit.device.memory import MOST_PACKED

WORTH_PACKING = 64 * 64  # elements of a weight; below that the overhead of the call dominates


def suit_cpu(network: Any) -> None:
    """Use channels-last memory format and, in float32, packed linear layers."""
    network.to(memory_format=torch.channels_last)
    if network.dtype == torch.float32:
        pack_linears(network)


def pack_linears(network: Any) -> int:
    """Compute linear layers with oneDNN on weights packed once; returns the number of packed layers.

    torch uses MKL, which is slow on processors of other vendors (oneDNN takes half the time on an AMD EPYC). This is
    the operation that torch.compile's CPU backend uses. Modules and parameters are kept, so that packed weights take
    memory again: of a large network none is packed.
    """
    layers = _worthwhile(network)
    return _computed_by(_PackedLinear, layers) if sum(layer.weight.nbytes for layer in layers) <= MOST_PACKED else 0


def through_onednn(network: Any) -> int:
    """Compute linear layers with oneDNN on their own weights; returns the number of these layers.

    As `pack_linears` without the memory: each call arranges the weight anew, which costs little of a call on many rows.
    """
    return _computed_by(_Linear, _worthwhile(network))


def _worthwhile(network: Any) -> list[torch.nn.Linear]:
    return [m for m in network.modules() if type(m) is torch.nn.Linear and m.weight.numel() >= WORTH_PACKING]


def _computed_by(kind: type[_Linear | _PackedLinear], layers: list[torch.nn.Linear]) -> int:
    """Give layers a forward of this kind, if it runs on this torch; return how many have it."""
    found = 0
    for module in layers:
        with contextlib.suppress(AttributeError, RuntimeError, TypeError, NotImplementedError):  # another torch
            forward = kind(module)
            forward(torch.zeros(1, module.in_features))
            module.forward = forward  # type: ignore[method-assign, assignment]
            found += 1
    return found


def _plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN may compute a linear layer: in float32 on a CPU, without gradients, not while compiling."""
    return (
        x.dtype == weight.dtype == torch.float32
        and weight.device.type == x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad))
    )


class _Linear:
    """The forward of one linear layer, on the weight as it is."""

    def __init__(self, module: torch.nn.Linear) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.module.weight, self.module.bias
        if not _plain(x, weight) or x.numel() == 0:
            return linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _PackedLinear:
    """The forward of one linear layer; packs the weight again if it was changed or replaced."""

    def __init__(self, module: torch.nn.Linear) -> None:
        self.module = module
        self.state: tuple[int, int] | None = None
        self.weight: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.module.weight, self.module.bias
        if not _plain(x, weight):
            return linear(x, weight, bias)
        state = weight.data_ptr(), weight._version
        if self.weight is None or state != self.state:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), x[..., 0].numel())
            self.state = state
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
