"""CUDA graphs: a network call is captured once per shape and then replayed, so that a GPU never waits for Python.

At small batches the kernels of a UNet run for less time than Python needs to launch them. A captured call is launched
as a whole. Its shapes and addresses are fixed: rows are padded to a bucket, inputs copied in and the output copied out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from genkit.errors import reason
from genkit.phases import phase

Call = Callable[..., torch.Tensor]
Recorded = tuple[Callable[[], None], torch.Tensor]  # the replay function, and the tensor it writes its output to
Record = Callable[[Call, list[torch.Tensor]], Recorded]

MOST_KEPT = 32  # captured calls; the least recently used one is dropped
# Positions (rows times height times width) above which a call takes a GPU longer than Python needs to launch the next
# one: SD1.5's UNet takes 3 ms a row of 64 x 64 and 40 ms to launch. The bound also limits memory.
MOST_POSITIONS = 32 * 64 * 64
RECORDING = threading.Lock()  # held while capturing; other streams must not allocate then


def bucket(rows: int) -> int:
    """Return the number of rows that `rows` are padded to: exact up to 16, then in steps of at most an eighth."""
    step = max(1, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def record_cuda(call: Call, inputs: list[torch.Tensor]) -> Recorded:
    """Record `call(*inputs)` as a CUDA graph; all graphs share one pool of memory, as no two run at a time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(inputs[0].device), RECORDING:
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=_pool(inputs[0].device), capture_error_mode="thread_local"):
            output = call(*inputs)
    return graph.replay, output


class Graphs:
    """A function of tensors that is captured as a CUDA graph for each shape, and replayed.

    call(*inputs) -> output: the first dimension of every input and of the output is rows, which do not depend on each
    other; it must not synchronise with the device. The first call of a shape and bucket runs normally, so that
    libraries choose their kernels; the second is captured. `reason`: why capturing failed and was given up, or None.
    """

    def __init__(self, call: Call, record: Record = record_cuda, most: int = MOST_KEPT) -> None:
        self.call, self.record, self.most = call, record, most
        self.reason: str | None = None
        self._inputs: OrderedDict[Any, list[torch.Tensor]] = OrderedDict()  # padded, at fixed addresses
        self._recorded: dict[Any, Recorded] = {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return call(*inputs), up to rounding: kernels may differ with the number of rows."""
        rows = len(inputs[0])
        size = bucket(rows)
        if self.reason:
            return self.call(*inputs)
        large = size * inputs[0][0, 0].numel() > MOST_POSITIONS  # padded, too: kernels are chosen by shape
        key = (size, *((i.shape[1:], i.dtype) for i in inputs))
        known = key in self._inputs
        if not known:
            self._forget(self.most - 1)
            self._inputs[key] = [i.new_zeros(size, *i.shape[1:]) for i in inputs]
        self._inputs.move_to_end(key)
        fixed = self._inputs[key]
        for place, given in zip(fixed, inputs, strict=True):
            place[:rows].copy_(given, non_blocking=True)
        if large or not known:
            with phase("network call, not captured"):
                return self.call(*fixed)[:rows]
        if key not in self._recorded and not self._try(key):
            return self.call(*inputs)
        replay, output = self._recorded[key]
        replay()
        return output[:rows].clone()  # the next replay overwrites it

    def reset(self) -> None:
        """Drop all captured calls; needed when the network's weights move."""
        self._forget(0)

    def _try(self, key: Any) -> bool:
        """Capture the call of `key`; if that fails, set `reason` and do not try again."""
        try:
            with phase("capture a CUDA graph"):
                self._recorded[key] = self.record(self.call, self._inputs[key])
        except Exception as error:  # anything a graph cannot capture, or out of memory
            self._forget(0)
            self.reason = f"CUDA graphs are off: {reason(error)}"
        return self.reason is None

    def _forget(self, most: int) -> None:
        while len(self._inputs) > most:
            key, _ = self._inputs.popitem(last=False)
            self._recorded.pop(key, None)


_pools: dict[torch.device, tuple[Any, Any]] = {}  # a pool for each device, and a graph that keeps it


def _pool(device: torch.device) -> Any:
    """Return the pool of a device's graphs. torch frees a pool with its last graph, and it cannot be used again."""
    if device not in _pools:
        handle, keeper = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(keeper, pool=handle, capture_error_mode="thread_local"):
            torch.zeros(1, device=device)
        _pools[device] = handle, keeper
    return _pools[device][0]
