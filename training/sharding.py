"""Fully sharded training (FSDP, Zhao et al. 2023): each process keeps a shard of every weight.

torch's `fully_shard` is called directly: accelerate's plugin for it takes only one network, together with an existing
optimizer.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# Classes of modules that are sharded, and gathered, as units; all other weights form a unit of the whole network.
BLOCK = re.compile(r"Block|EncoderLayer$")


def shard(networks: Mapping[str, torch.nn.Module], device: torch.device) -> None:
    """Shard each network over all processes, block by block; its parameters become DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The warning concerns in-place changes of outputs that are views, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for network in networks.values():
        inner = [m for m in network.modules() if m is not network and BLOCK.search(type(m).__name__)]
        for module in [*reversed([m for m in inner if any(True for _ in m.parameters())]), network]:
            before = type(module)
            fully_shard(module, mesh=mesh)
            # transformers looks up its classes by their printed names.
            type(module).__module__, type(module).__qualname__ = before.__module__, before.__qualname__


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is sharded over the processes."""
    return isinstance(tensor, torch.distributed.tensor.DTensor) if torch.distributed.is_available() else False


def full(tensor: Any) -> torch.Tensor:
    """Return the unsharded tensor; for a sharded one this is a collective call of all processes."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def as_sharded(value: torch.Tensor, like: Any) -> Any:
    """Return `value`, which all processes have, on the device of `like` and sharded like it."""
    if not is_sharded(like):
        return value.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def whole(networks: Mapping[str, Any], averaged: Mapping[str, torch.Tensor], main: bool) -> Iterator[None]:
    """Turn the networks into plain modules in the main process, with their averaged weights if there are any.

    This is a collective call: all processes must enter it. In the others the networks must not be called within it.
    """
    from torch.distributed.fsdp import FSDPModule

    own: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []
    try:
        for name, network in networks.items():
            for key, parameter in list(network.named_parameters()):
                data = full(averaged.get(f"{name}.{key}", parameter).detach()).to(parameter.dtype)
                if main:
                    module = network.get_submodule(key.rpartition(".")[0])
                    own.append((module, key.rpartition(".")[2], parameter))
                    module._parameters[own[-1][1]] = torch.nn.Parameter(data, parameter.requires_grad)
            for module in [m for m in network.modules() if main and isinstance(m, FSDPModule)]:
                for kind in ("_forward_pre_hooks", "_forward_hooks"):
                    found = vars(module)[kind]
                    hooks.append((found, dict(found)))
                    for key, hook in hooks[-1][1].items():  # hooks that communicate with the other processes
                        if type(getattr(hook, "__self__", None)).__name__ == "FSDPState":
                            del found[key]
        yield
    finally:
        for module, key, parameter in own:
            module._parameters[key] = parameter
        for found, kept in hooks:
            merged = {**kept, **found}  # in the old order, with hooks that transformers has added meanwhile
            found.clear()
            found.update(merged)
