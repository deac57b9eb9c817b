"""Probes of attention backends: which work on this machine, how fast they are, and which one a network takes.

Results are cached in the cache folder by machine, dtype and versions: those on a GPU, and those of xformers, whose
kernels can crash a process and are therefore probed in a child process. The next start probes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from genkit.device.attention import BACKENDS, NARROW, Attend
from genkit.device.devices import cache_folder
from genkit.durable import json_line, write_whole
from genkit.errors import HostError, InputError, reason
from genkit.files import read_json
from genkit.version import __version__

TIMED = 4096  # positions, as at 512 x 512 pixels
TOKENS = 77
CLOSE = 1.05  # a backend must be faster than those listed before it by more than this factor
# Common widths of heads; cross-attention up to 160, 512 is the VAE's
WIDTHS = {"cpu": (3, 16, 40, 64, 512), "cuda": (40, 64, 80, 160, 512)}
ISOLATED = ("xformers",)  # probed in a child process
CHILD_SECONDS = 300.0
KEPT = "attention.json"
_PROBING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Probe:
    """The result of probing a backend: why it cannot be used, or None; on a GPU its milliseconds a call."""

    reason: str | None = None
    ms: float | None = None

    @property
    def shown(self) -> bool | float | str:
        """The table's cell: milliseconds, True if it works but was not timed, or the reason why it does not."""
        return self.reason or (True if self.ms is None else round(self.ms, 3))


@functools.cache
def probe(attend: Attend, device: torch.device, dtype: torch.dtype, width: int, cross: bool) -> Probe:
    """Run a backend once, compare its output with float64, and on a GPU time it.

    q, k and v are views of one tensor, as with fused projections.
    """
    try:
        with torch.no_grad():
            q, k, v = _inputs(device, dtype, width, cross, rows=2, length=256)
            expected = scaled_dot_product_attention(q.cpu().double(), k.cpu().double(), v.cpu().double())
            error = float((attend(q, k, v).cpu().double() - expected).abs().max() / expected.abs().max())
            exact = 1e-4 if device.type == "cpu" else 4e-3  # a GPU may multiply in TF32
            if not error < max(exact, 8 * torch.finfo(dtype).eps):  # also true for NaN
                return Probe(f"wrong numbers (off by {error:.2g})")
            return Probe(ms=_milliseconds(attend, device, dtype, width, cross) if device.type == "cuda" else None)
    except Exception as error:  # any error of a library means that the backend does not work
        return Probe(next((text for kind, text in _REASONS.items() if isinstance(error, kind)), reason(error)))


def known(name: str, device: torch.device, dtype: torch.dtype, width: int, cross: bool) -> Probe:
    """Return the probe of a backend for heads of `width` channels, from the cache if it is there."""
    if name in ISOLATED and importlib.util.find_spec(name) is None:
        return Probe("not installed")
    if device.type != "cuda" and name not in ISOLATED:
        return probe(BACKENDS[name], device, dtype, width, cross)  # takes milliseconds
    with _PROBING:  # a thread may probe ahead (device/warm.py)
        return _probe_cached(name, device, dtype, width, cross)


def _probe_cached(name: str, device: torch.device, dtype: torch.dtype, width: int, cross: bool) -> Probe:
    answers, kind = _answers(_machine(device, dtype)), f"{name} {_kind(width, cross)}"
    if kind not in answers:
        if name in ISOLATED:
            every = {(width, cross), *((w, c) for w in WIDTHS.get(device.type, ()) for c in (False, True))}
            answers |= {f"{name} {k}": found for k, found in _in_child(name, device, dtype, sorted(every)).items()}
        else:
            answers[kind] = probe(BACKENDS[name], device, dtype, width, cross)
        _keep(_machine(device, dtype), answers)
    return answers[kind]


def _in_child(name: str, device: torch.device, dtype: torch.dtype, kinds: list[tuple[int, bool]]) -> dict[str, Probe]:
    """Probe a backend for some (width, cross) in a process of its own, which it may bring down."""
    code = f"from genkit.device.probes import child; child({name!r}, {str(device)!r}, {str(dtype)[6:]!r}, {kinds!r})"
    reason = f"takes more than {CHILD_SECONDS:.0f} s"
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=CHILD_SECONDS)
        reason = f"brings the process down (exit code {done.returncode})"
        if done.returncode == 0:
            return {kind: Probe(**found) for kind, found in json.loads(done.stdout.splitlines()[-1]).items()}
    return {_kind(*kind): Probe(reason) for kind in kinds}


def child(name: str, device: str, dtype: str, kinds: list[tuple[int, bool]]) -> None:
    """Print the probes of a backend as JSON."""
    found = {_kind(*kind): probe(BACKENDS[name], torch.device(device), getattr(torch, dtype), *kind) for kind in kinds}
    print(json.dumps({kind: dataclasses.asdict(result) for kind, result in found.items()}))


def _kind(width: int, cross: bool) -> str:
    return f"{'cross' if cross else 'self'} {width}"


def _machine(device: torch.device, dtype: torch.dtype) -> str:
    """Return the key of the cache: everything that a probe depends on."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    with contextlib.suppress(PackageNotFoundError):
        card += f", xformers {version('xformers')}"
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    return f"{card}, torch {torch.__version__}, cuDNN {cudnn}, genkit {__version__}, {str(dtype)[6:]}"


@functools.cache
def _answers(machine: str) -> dict[str, Probe]:
    """Return the cached probes, {"flash self 40": Probe}, without malformed entries."""
    found: dict[str, Probe] = {}
    with contextlib.suppress(InputError, AttributeError):  # AttributeError: the entry is no object
        for kind, answer in read_json(cache_folder() / KEPT).get(machine, {}).items():
            with contextlib.suppress(TypeError):
                found[kind] = Probe(**answer)
    return found


def _keep(machine: str, answers: dict[str, Probe]) -> None:
    """Write the probes to the cache, beside those of other machines; a failure only means that they are made again."""
    others: dict[str, Any] = {}
    with contextlib.suppress(InputError):
        others = read_json(cache_folder() / KEPT)
    written = {**others, machine: {kind: dataclasses.asdict(answer) for kind, answer in answers.items()}}
    with contextlib.suppress(OSError, HostError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_whole(cache_folder() / KEPT, json_line(written).encode())


def choose(asked: str, device: torch.device, dtype: torch.dtype, width: int, cross: bool) -> tuple[str, str | None]:
    """Return the name of the backend for heads of `width` channels, and why it is not the one asked for, or None."""
    reason = None
    if asked != "auto":
        reason = known(asked, device, dtype, width, cross).reason
        if reason is None:
            return asked, None
    if device.type == "cuda":
        times = {name: known(name, device, dtype, width, cross).ms for name in _TIMED}
        working = {name: ms for name, ms in times.items() if ms is not None}
        for name, ms in working.items():
            if ms <= CLOSE * min(working.values()):
                return name, reason
    narrow = device.type == "cpu" and dtype == torch.float32 and width <= NARROW
    for name in ("sliced", "sdpa", "math") if narrow else ("sdpa", "sliced", "math"):
        if known(name, device, dtype, width, cross).reason is None:
            return name, reason
    return "sdpa", reason


def table(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, bool | float | str]]:
    """Return for each backend and kind of attention ("self 40") the probe's result, and for "auto" the choice."""
    widths = WIDTHS.get(device.type, WIDTHS["cuda"])
    kinds = {_kind(w, cross): (w, cross) for cross in (False, True) for w in widths}
    del kinds[f"cross {widths[-1]}"]
    found = {name: {kind: known(name, device, dtype, *key).shown for kind, key in kinds.items()} for name in BACKENDS}
    return {"auto": {kind: choose("auto", device, dtype, *key)[0] for kind, key in kinds.items()}, **found}


def table_lines(found: dict[str, dict[str, bool | float | str]]) -> list[str]:
    """Return a `table` as lines of text; a dash is what does not work, with the reasons at the end of the line."""
    kinds = list(found["auto"])
    timed = any(isinstance(cell, float) for cells in found.values() for cell in cells.values())
    lines = [["ms" if timed else "attention", *kinds]]
    for name, cells in found.items():
        if name == "auto":
            lines.append([name, *map(str, cells.values())])
            continue
        reasons = list(dict.fromkeys(cell for cell in cells.values() if isinstance(cell, str)))
        shown = ["yes" if cell is True else "-" if cell in reasons else str(cell) for cell in cells.values()]
        everywhere = len(reasons) == 1 and set(shown) == {"-"}
        lines.append([name, *([] if everywhere else shown), *([f"- {', '.join(reasons)}"] if reasons else [])])
    width = max(len(kind) for kind in kinds)
    return [f"{name:<10}" + "  ".join(f"{cell:<{width}}" for cell in cells).rstrip() for name, *cells in lines]


def _inputs(
    device: torch.device, dtype: torch.dtype, width: int, cross: bool, rows: int, length: int
) -> Iterable[torch.Tensor]:
    """Return q (rows, 2, length, width), k and v, 77 long for cross-attention, as views of one tensor of noise."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = {1: length, 2: TOKENS} if cross else {3: length}
    for parts, size in sizes.items():
        noise = torch.randn(rows, size, parts * 2 * width, device=device, dtype=dtype, generator=generator)
        yield from (x.view(rows, size, 2, width).transpose(1, 2) for x in noise.chunk(parts, dim=-1))


def _milliseconds(attend: Attend, device: torch.device, dtype: torch.dtype, width: int, cross: bool) -> float:
    """Return the median milliseconds of a call large enough to hide its launch."""
    with torch.cuda.device(device):
        q, k, v = _inputs(device, dtype, width, cross, rows=32 if cross else max(1, 256 // width), length=TIMED)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(8)]
        attend(q, k, v)
        attend(q, k, v)
        for event in events:
            event.record()
            attend(q, k, v)
        torch.cuda.current_stream().synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


_REASONS: dict[type[Exception], str] = {
    ModuleNotFoundError: "not installed",
    NotImplementedError: "no kernel for this device, dtype or width",
    torch.OutOfMemoryError: "out of memory",
}
# Backends timed on a GPU, preferred first. Not "math", which computes in float32.
_TIMED = ("sdpa", "flash", "cudnn", "efficient", "xformers", "sliced")
