"""CUDA graphs: a network call is recorded once per shape and then replayed, so that a GPU never waits for Python.

A UNet at batch 2 launches some hundred kernels that run for less time than Python needs to launch them. A recorded
call is launched as a whole. It has fixed shapes and addresses: rows are padded up to a bucket, inputs copied in and the
output out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from genkit.errors import reason

Call = Callable[..., torch.Tensor]
Recorded = tuple[Callable[[], None], torch.Tensor]  # what replays the call, and where its output then lies
Record = Callable[[Call, list[torch.Tensor]], Recorded]

MOST_KEPT = 32  # recorded calls; the one that was not used for longest goes
# Positions (rows times height times width) above which a call keeps a GPU busy for longer than Python takes to launch
# the next: an SD1.5-shaped network needs 3 ms a row of 64 x 64 and 40 ms to launch. The bound is also one on memory.
MOST_POSITIONS = 32 * 64 * 64
RECORDING = threading.Lock()  # held while recording; work on other streams must not allocate meanwhile


def bucket(rows: int) -> int:
    """Return the number of rows that `rows` are padded to: 1 to 16, then in steps of an eighth or less."""
    step = max(1, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def record_cuda(call: Call, inputs: list[torch.Tensor]) -> Recorded:
    """Record `call(*inputs)` as a CUDA graph; all graphs share one pool of memory, as no two run at a time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(inputs[0].device), RECORDING:
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
            output = call(*inputs)
    return graph.replay, output


class Graphs:
    """A function of tensors that replays what it did at the same shapes before.

    call(*inputs) -> output: rows in the first dimension of every input and of the output, no row depending on another,
    no step that waits for the device. The first call of a shape and bucket runs as it is, which lets libraries choose
    their kernels; the second is recorded. `reason` says, once it failed, why nothing is recorded any more.
    """

    def __init__(self, call: Call, record: Record = record_cuda, most: int = MOST_KEPT) -> None:
        self.call, self.record, self.most = call, record, most
        self.reason: str | None = None
        self._inputs: OrderedDict[Any, list[torch.Tensor]] = OrderedDict()  # padded, at fixed addresses
        self._recorded: dict[Any, Recorded] = {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return call(*inputs), rounding apart: kernels may differ with the number of rows."""
        rows = len(inputs[0])
        size = bucket(rows)
        if self.reason:
            return self.call(*inputs)
        large = size * inputs[0][0, 0].numel() > MOST_POSITIONS  # padded all the same: kernels are chosen by shape
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
            return self.call(*fixed)[:rows]
        if key not in self._recorded and not self._try(key):
            return self.call(*inputs)
        replay, output = self._recorded[key]
        replay()
        return output[:rows].clone()  # the next replay writes there

    def reset(self) -> None:
        """Forget everything: to be called when the network's weights move."""
        self._forget(0)

    def _try(self, key: Any) -> bool:
        """Record the call of `key`; where that cannot be done, say why and leave it for good."""
        try:
            self._recorded[key] = self.record(self.call, self._inputs[key])
        except Exception as error:  # whatever a network does that no graph can hold, and memory
            self._forget(0)
            self.reason = f"CUDA graphs are off: {reason(error)}"
        return self.reason is None

    def _forget(self, most: int) -> None:
        while len(self._inputs) > most:
            key, _ = self._inputs.popitem(last=False)
            self._recorded.pop(key, None)


_pools: list[Any] = []


def _pool() -> Any:
    if not _pools:
        _pools.append(torch.cuda.graph_pool_handle())
    return _pools[0]
