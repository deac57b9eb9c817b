"""The environment for bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from genkit.device.devices import pick_device, usable_cores
from genkit.device.norms import unusable
from genkit.device.probes import table
from genkit.version import __version__


def environment() -> dict[str, Any]:
    """Return what a bug report needs: versions, processor, each device with its memory, attention backends."""
    found: dict[str, Any] = {"genkit": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pillow", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    found["cpu"] = (
        f"{usable_cores()} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = (
            f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}, CUDA {torch.version.cuda}"
        )
    device, dtype = pick_device()
    found["auto"] = f"{device}, {str(dtype).removeprefix('torch.')}"
    found["fused blocks"] = unusable(device, dtype) or "yes"
    found["attention"] = table(device, dtype)
    return found
