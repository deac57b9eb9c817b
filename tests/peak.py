"""The most bytes of tensors that a call has alive at once, weights not counted: on the CPU, or on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Alive(TorchDispatchMode):
    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.sizes, self.now, self.most = known, dict[int, int](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in self.known:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak_bytes(call: Callable[[], Any], *networks: Any) -> int:
    """Return the peak of `call`; the weights of `networks` are not counted."""
    known = {t.untyped_storage()._cdata for n in networks for t in [*n.parameters(), *n.buffers()]}
    with torch.inference_mode(), _Alive(known) as alive:
        call()
    return alive.most
