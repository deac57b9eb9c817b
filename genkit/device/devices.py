"""Device and dtype: choosing and checking them, free memory, and the environment for bug reports."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError, nearest, shown

if TYPE_CHECKING:
    import torch

DTYPES = {"float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16", "half": "float16",
          "bfloat16": "bfloat16", "bf16": "bfloat16", "int8": "int8"}  # fmt: skip
ATTENTION = ("auto", "sdpa", "flash", "cudnn", "efficient", "xformers", "sliced", "math")
CPU_SLOTS = 16  # with more rows the CPU's caches overflow: no more images a second
CUDA_SLOTS = 32  # from about 32 rows on, the time for a row no longer falls


def check_device(device: str, dtype: str) -> None:
    """Raise InputError, without importing torch, for a device or dtype that does not exist."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", device):
        hint = nearest(device, ["auto", "cpu", "mps", "cuda"])
        raise InputError(f"--device: {shown(device)} is not auto, cpu, mps, cuda or cuda:N{hint}")
    if dtype != "auto" and dtype not in DTYPES:
        hint = nearest(dtype, DTYPES)
        raise InputError(f"--dtype: {shown(dtype)} is not auto, float32, float16, bfloat16 or int8{hint}")
    if device == "cpu" and DTYPES.get(dtype) == "float16":
        raise InputError("--dtype: float16 on a CPU overflows and is slow: use float32 or bfloat16")


def check_attention(name: str) -> None:
    """Raise InputError, without importing torch, for an unknown attention backend."""
    if name not in ATTENTION:
        known = f"{', '.join(ATTENTION[:-1])} or {ATTENTION[-1]}"
        raise InputError(f"--attention: {shown(name)} is not {known}{nearest(name, ATTENTION)}")


def pick_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype to use: the first GPU in float16 when there is one, else the CPU in float32.

    Raises InputError for a device that this machine does not have or a dtype that it cannot compute in.
    """
    import torch

    check_device(device, dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    chosen = torch.device(device)
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}[chosen.type]
    if (chosen.index or 0) >= count:
        raise InputError(f"--device: {shown(device)} is not here: this machine has {count} {chosen.type} devices")
    if dtype == "auto":
        return chosen, torch.float32 if chosen.type == "cpu" else torch.float16
    check_device(chosen.type, dtype)
    return chosen, getattr(torch, DTYPES[dtype])


def compute_dtype(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a network computes in: `dtype`, but for int8 weights the device's default."""
    import torch

    if dtype != torch.int8:
        return dtype
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def free_memory(device: torch.device) -> float:
    """Return the free bytes on `device`, including those that torch has reserved but not allocated."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return host_memory()


def peak_memory(device: torch.device) -> float:
    """Return the peak bytes allocated by torch on a GPU, or by this process on a CPU (0 if unknown)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def host_memory() -> float:
    """Return the bytes of RAM that this process may still allocate: by the system, its cgroup and `ulimit -v`."""
    found = []
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows; no /proc
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            found.append(max(0, limit - pages * os.sysconf("SC_PAGE_SIZE")))
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):  # no Linux
        if "SC_PHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    try:
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        used = int((group / "memory.current").read_text()) - int(cache)
        found.append(int((group / "memory.max").read_text()) - used)
    except (OSError, KeyError, ValueError):  # no group, or "max": no limit
        pass
    return float(min(found, default=math.inf))


def reuse_memory() -> None:
    """Make glibc keep freed blocks for the next allocation.

    By default it returns every large block to the system, which then clears the pages again for the next layer's
    output: a tenth of the time of a network on the CPU. For the command line only; a library should not change it.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def trim_memory() -> None:
    """Return what glibc keeps of freed blocks to the system, wherever it lies between blocks in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def give_back(device: Any) -> None:
    """Return unused memory to the device and the system, after a network was released."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    trim_memory()


def cache_folder() -> Path:
    """Return the cache folder: $XDG_CACHE_HOME/genkit, by default ~/.cache/genkit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genkit"


def usable_cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
