"""Prepare a GPU in a thread (libraries, kernels, attention probes) while networks are imported and weights are read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable

import torch
from torch.nn.functional import conv2d

from genkit.device.norms import unusable
from genkit.device.probes import choose


def warm_up(device: torch.device, dtype: torch.dtype, widths: Iterable[int] = ()) -> None:
    """Start to load CUDA's libraries, compile kernels, and probe attention for these widths of heads."""
    if device.type == "cuda":
        given = device, dtype, sorted(widths)
        threading.Thread(target=_warm_up, args=given, name="genkit-warm", daemon=True).start()


def _warm_up(device: torch.device, dtype: torch.dtype, widths: list[int]) -> None:
    with (
        contextlib.suppress(Exception),
        torch.inference_mode(),
        torch.cuda.device(device),
    ):  # the job itself reports the error
        x = torch.zeros(1, 64, 64, 64, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        conv2d(x, x.new_zeros(64, 64, 3, 3).to(memory_format=torch.channels_last), padding=1).flatten(2) @ x.flatten(
            2
        ).mT
        unusable(device, dtype)
        for width in widths:
            for cross in (False, True):
                choose("auto", device, dtype, width, cross)
