"""torch.compile in the background: calls run uncompiled until the compiled network is ready and found faster."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from genkit.device.devices import cache_folder
from genkit.device.graphs import Call, Graphs, bucket
from genkit.errors import reason

WORTH = 0.75  # a batch with fewer than this share of the compiled rows is faster uncompiled than padded
TRIALS = 3
THREAD = "genkit-compile"


def compile_network(network: Any, call: Callable[[Any], Call]) -> Call:
    """Return call(network), compiled for fixed shapes.

    On a GPU the compiled code is replayed as a CUDA graph. It runs a copy of the network with channels-last convolution
    weights, which are faster compiled but slower in eager mode; all other weights are shared.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    weights = list(network.parameters())
    if weights[0].is_cuda:
        shared = {id(w): w for w in weights if w.ndim != 4}
        network = copy.deepcopy(network, shared).to(memory_format=torch.channels_last)
    compiled: Call = torch.compile(call(network), dynamic=False)
    return Graphs(compiled) if weights[0].is_cuda else compiled


class Compiled:
    """A function of tensors, compiled in a thread for the shapes of its first call while calls run uncompiled.

    make() -> the compiled call; run in that thread. note: a message about the outcome, once there is one.
    """

    def __init__(self, make: Callable[[], Call]) -> None:
        self.make = make
        self.note: str | None = None
        self._inputs: list[torch.Tensor] | None = None  # at the compiled shapes
        self._thread: threading.Thread | None = None
        self._call: Call | None = None  # set by the thread
        self._seconds: list[tuple[float, float]] = []  # of trial calls: (uncompiled, compiled)
        self._chosen = False

    def __call__(self, other: Call, *inputs: torch.Tensor) -> torch.Tensor:
        """Return other(*inputs), up to rounding; by the compiled code if it is ready and fits the shapes."""
        if self._inputs is None:
            self._start(inputs)
        if self._call is None or not self._fits(inputs):
            return other(*inputs)
        if not self._chosen:
            return self._compare(other, inputs)
        return self._run(inputs)

    def wait(self) -> None:
        """Wait until compiling has ended."""
        if self._thread is not None:
            self._thread.join()

    def _start(self, inputs: tuple[torch.Tensor, ...]) -> None:
        size = bucket(len(inputs[0]))
        self._inputs = [i.new_zeros(size, *i.shape[1:]) for i in inputs]
        # Not a daemon: torch aborts a process that exits while it compiles. The command line does not wait for it.
        self._thread = threading.Thread(target=self._compile, args=(self._inputs,), name=THREAD)
        self._thread.start()

    def _compile(self, inputs: list[torch.Tensor]) -> None:
        began = time.monotonic()
        try:
            with torch.inference_mode(), _side_stream(inputs[0].device):
                call = self.make()
                call(*inputs)
                if inputs[0].is_cuda:
                    torch.cuda.current_stream().synchronize()
        except Exception as error:  # no compiler, or an unsupported network: the job goes on uncompiled
            self.note = f"not compiled: {reason(error)}"
            return
        self.note = f"compiled in {time.monotonic() - began:.0f} s"
        self._call = call

    def _fits(self, inputs: tuple[torch.Tensor, ...]) -> bool:
        assert self._inputs is not None
        same = all(i.shape[1:] == f.shape[1:] and i.dtype == f.dtype for i, f in zip(inputs, self._inputs, strict=True))
        size = len(self._inputs[0])
        return same and WORTH * size <= len(inputs[0]) <= size

    def _run(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        assert self._inputs is not None and self._call is not None
        rows = len(inputs[0])
        for place, given in zip(self._inputs, inputs, strict=True):
            place[:rows].copy_(given, non_blocking=True)
        return self._call(*self._inputs)[:rows].clone()

    def _compare(self, other: Call, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Time a call both ways; after TRIALS of them keep the faster way."""
        out, slow = _timed(lambda: other(*inputs), inputs[0].device)
        try:
            _, fast = _timed(lambda: self._run(inputs), inputs[0].device)
        except Exception as error:
            self._call, self.note = None, f"compiled code failed: {reason(error)}"
            return out
        self._seconds.append((slow, fast))
        if len(self._seconds) == TRIALS:
            slow, fast = (min(times) for times in zip(*self._seconds, strict=True))
            self._chosen = True
            self.note = f"{self.note}; {1000 * fast:.1f} ms a call, {1000 * slow:.1f} without"
            if fast >= slow:
                self._call, self.note = None, f"{self.note}: not used"
        return out


def _timed(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return time.perf_counter()

    began = wait()
    out = work()
    return out, wait() - began


def _side_stream(device: torch.device) -> Any:
    """Return a context with a CUDA stream of its own; on a CPU, one that does nothing."""
    return torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None)
