"""Networks spread over several processes (FSDP, Zhao et al. 2023): each keeps a share of every weight.

torch's `fully_shard` is called directly: accelerate's plugin, which calls it too, takes one network, and with it an
optimizer that exists already.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# Classes of modules whose weights are together at a time; what is in none of them is so with the whole network.
BLOCK = re.compile(r"Block|EncoderLayer$")


def shard(networks: Mapping[str, torch.nn.Module], device: torch.device) -> None:
    """Spread the weights of each network over all processes, block by block; their parameters become DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for network in networks.values():
        for module in reversed(list(network.modules())):  # inner ones first
            if module is not network and BLOCK.search(type(module).__name__) and any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
        fully_shard(network, mesh=mesh)


def is_sharded(tensor: Any) -> bool:
    """Return whether each process has only a share of a tensor."""
    return isinstance(tensor, torch.distributed.tensor.DTensor) if torch.distributed.is_available() else False


def full(tensor: Any) -> torch.Tensor:
    """Return a tensor as it is in one process; of a sharded one all processes must ask at once."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def as_sharded(value: torch.Tensor, like: Any) -> Any:
    """Return `value`, which all processes have, on the device of `like` and in shares as its are."""
    if not is_sharded(like):
        return value.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def whole(networks: Mapping[str, Any], averaged: Mapping[str, torch.Tensor], main: bool) -> Iterator[None]:
    """Let the networks be plain modules in the main process, with their averaged weights where there are any.

    All processes must enter: they give their shares. In the others the networks are not to be called within.
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
                for found in (
                    vars(module)["_forward_pre_hooks"],
                    vars(module)["_forward_hooks"],
                ):  # which wait for the others
                    hooks.append((found, dict(found)))
                    found.clear()
        yield
    finally:
        for module, key, parameter in own:
            module._parameters[key] = parameter
        for found, kept in hooks:
            found.update(kept)
