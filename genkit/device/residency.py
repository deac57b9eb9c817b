"""Moves networks to the device and back: the four memory levels of device/memory.py."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from genkit.device.memory import LAYERS, PARTS, RESIDENT, TURNS, at_each_step
from genkit.errors import shown

log = logging.getLogger("genkit")

Hold = Callable[[], AbstractContextManager[Any]]


class Residency:
    """Moves networks to the device for their work.

    The weights of a network that is not on the device are in RAM, pinned if possible. Weights never change, so moving a
    network off only drops the device's copy. Besides the UNet (or instead of it, at the level "turns") at most one
    other network is on the device; it stays until the next one is needed. Memory layouts must be final before `add`.
    """

    def __init__(self, device: torch.device, level: str = RESIDENT) -> None:
        self.device, self.level = device, level
        self._networks: dict[str, Any] = {}
        self._homes: dict[
            str, list[tuple[torch.Tensor, torch.Tensor]]
        ] = {}  # RAM tensors of the networks on the device
        self._lock = threading.RLock()  # denoising and decoding may be different threads

    @property
    def resident(self) -> bool:
        """Whether every network stays on the device."""
        return self.level == RESIDENT

    @property
    def steady(self) -> bool:
        """Whether the UNet stays on the device: graphs may capture it, and decoding may run at the same time."""
        return self.level in (RESIDENT, PARTS)

    def add(self, name: str, network: Any) -> Hold:
        """Manage a network; return the context manager in which it may be used.

        For UNets and ControlNets it does nothing: they are moved by a hook when they are called.
        """
        if self.resident or network is None or (at_each_step(name) and self.level == PARTS):
            return contextlib.nullcontext
        self._networks[name] = network
        if at_each_step(name) and self.level == LAYERS:
            _by_layer(network, self.device)
            return contextlib.nullcontext
        if at_each_step(name):
            network.register_forward_pre_hook(lambda module, given: self.bring(name))
            return contextlib.nullcontext
        return lambda: self._holding(name)

    @contextlib.contextmanager
    def _holding(self, name: str) -> Iterator[None]:
        with self._lock:
            self.bring(name)
            yield

    def bring(self, name: str) -> None:
        """Move a network to the device, and those off that it does not share the device with."""
        with self._lock:
            if name in self._homes:
                return
            for other in list(self._homes):
                self.park(other)
            # Not in inference mode: its tensors would make the parameters inference tensors for good.
            with torch.inference_mode(False), torch.no_grad():
                tensors = _tensors(self._networks[name])
                there = [t.data.to(self.device, non_blocking=True, copy=True) for t in tensors]
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
                self._homes[name] = [(t, t.data) for t in tensors]
                for tensor, copy in zip(tensors, there, strict=True):
                    tensor.data = copy

    def park(self, name: str) -> None:
        """Move a network off the device."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for tensor, home in self._homes.pop(name, ()):
                tensor.data = home
            if self.level == TURNS and self.device.type == "cuda":
                torch.cuda.empty_cache()  # the next network needs blocks of other sizes

    def release(self) -> None:
        """Move everything off the device, and know no network any more."""
        with self._lock:
            for name, network in self._networks.items():
                if at_each_step(name) and self.level == LAYERS:
                    _whole(network)
                self.park(name)
            self._networks.clear()

    @contextlib.contextmanager
    def float32(self, unet: Any) -> Iterator[None]:
        """Let the UNet compute in float32 within this context; its half-precision weights are restored exactly."""
        dtype = unet.dtype
        self._settle(unet)
        before = [] if self.steady else [(t, t.data) for t in _tensors(unet)]
        try:
            unet.to(torch.float32)
            self._resume(unet)
            yield
        finally:
            self._settle(unet)
            unet.to(dtype)
            for tensor, data in before:  # pinned
                tensor.data = data
            self._resume(unet)

    def _settle(self, unet: Any) -> None:
        """Bring the weights of a UNet that is moved back to RAM, where they can be changed."""
        name = self._name_of(unet)
        if name is not None and self.level == LAYERS:
            _whole(unet)
        elif name is not None:
            self.park(name)

    def _resume(self, unet: Any) -> None:
        if self.level == LAYERS and self._name_of(unet) is not None:
            _by_layer(unet, self.device)

    def _name_of(self, unet: Any) -> str | None:
        """Return the name of a network that is moved, or of one within a wrapper around it."""
        inside = {id(module) for module in unet.modules()}
        return next((name for name, network in self._networks.items() if id(network) in inside), None)


def _tensors(network: Any) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def _by_layer(unet: Any, device: torch.device) -> None:
    """Move each layer to the device when it is called, and prefetch the next one on a second stream.

    Without `record_stream`, so that a layer's memory is free before the next but one is fetched, however far the CPU
    runs ahead of the device.
    """
    from diffusers.hooks import apply_group_offloading

    home = torch.device("cpu")
    if device.type == "cuda":
        try:
            apply_group_offloading(unet, device, home, offload_type="leaf_level", use_stream=True)
            return
        except (RuntimeError, ValueError) as error:  # e.g. RAM that cannot be pinned
            log.warning("layers come to the device without a stream of their own: %s", shown(str(error), 120))
            _whole(unet)
    apply_group_offloading(unet, device, home, offload_type="leaf_level")


def _whole(unet: Any) -> None:
    """Undo `_by_layer`: all weights are in RAM, without hooks."""
    from diffusers.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(unet)
    for name in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
        registry.remove_hook(name, recurse=True)
