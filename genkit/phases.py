"""Where a command's time goes: the phases of its start, and each stage's share from the first picture on.

`phase` costs next to nothing until `record` was called. A phase within another one is not counted twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from pathlib import Path
from typing import Any

KEPT = 512  # pairs of GPU events that are collected before they are read


@dataclasses.dataclass
class _Total:
    began: float  # seconds since the process started, of the first time
    times: int = 0
    seconds: float = 0.0


class _Recording:
    """The totals by (whether the first picture was saved, which thread or "GPU", phase)."""

    def __init__(self) -> None:
        self.zero = _process_start()
        self.first: float | None = None  # seconds to the first picture
        self.totals: dict[tuple[bool, str, str], _Total] = {}
        self.events: list[tuple[tuple[bool, str, str], Any, Any]] = []
        self.lock = threading.Lock()
        self.add("main", "start of Python, command line", self.zero, time.monotonic() - self.zero)

    def add(self, who: str, name: str, began: float, seconds: float) -> None:
        with self.lock:
            key = (self.first is not None, who, name)
            total = self.totals.setdefault(key, _Total(began - self.zero))
            total.times += 1
            total.seconds += seconds

    def read_events(self, wait: bool = False) -> None:
        """Add the GPU's times of events that have completed. wait: wait for the others, too."""
        with self.lock:
            left = []
            for key, start, end in self.events:
                if wait:
                    end.synchronize()
                elif not end.query():
                    left.append((key, start, end))
                    continue
                total = self.totals.setdefault(key, _Total(0.0))
                total.times += 1
                total.seconds += start.elapsed_time(end) / 1000
            self.events = left


_recording: _Recording | None = None
_running = threading.local()  # .within: for each open phase of this thread, the seconds of the phases inside it


def record() -> None:
    """Record from now on; what came before counts as the start of Python."""
    global _recording
    _recording = _Recording()


def first_picture() -> None:
    """Note that the first picture is saved: what follows is the steady state."""
    if _recording is not None and _recording.first is None:
        _recording.first = time.monotonic() - _recording.zero


class phase:
    """Context manager around a phase of work in this thread. on: a torch.device; on a GPU its time is taken, too."""

    def __init__(self, name: str, on: Any = None) -> None:
        self.name, self.on = name, on

    def __enter__(self) -> None:
        self.recording = _recording
        if self.recording is None:
            return
        if not hasattr(_running, "within"):
            _running.within = []
        _running.within.append(0.0)
        self.began = time.monotonic()
        self.start = _event() if self.on is not None and self.on.type == "cuda" else None

    def __exit__(self, *_: object) -> None:
        if self.recording is None:
            return
        seconds = time.monotonic() - self.began
        own = seconds - _running.within.pop()
        if _running.within:
            _running.within[-1] += seconds
        self.recording.add(_thread(), self.name, self.began, own)
        if self.start is not None:
            key = (self.recording.first is not None, "GPU", self.name)
            with self.recording.lock:
                self.recording.events.append((key, self.start, _event()))
            if len(self.recording.events) > KEPT:
                self.recording.read_events()


def report() -> list[str]:
    """Return the table as lines; none if nothing was recorded. A share is of the section's wall time."""
    if _recording is None:
        return []
    now = time.monotonic() - _recording.zero
    _recording.read_events(wait=True)
    first = now if _recording.first is None else _recording.first
    lines = []
    for after, title, wall in ((False, "until the first picture", first), (True, "from then on", now - first)):
        totals = {(who, name): t for (late, who, name), t in _recording.totals.items() if late == after}
        if not totals:
            continue
        main = sum(t.seconds for (who, _), t in totals.items() if who == "main")
        totals["main", "anything else"] = _Total(now, 1, max(0.0, wall - main))
        lines.append(f"{title}: {wall:.2f} s" + ("" if after else " since the process started"))
        order = {"main": 0, "GPU": 1}
        for (who, name), t in sorted(totals.items(), key=lambda i: (order.get(i[0][0], 2), i[0][0], i[1].began)):
            times = f"  {t.times} times" if t.times > 1 else ""
            lines.append(f"  {who:<7}{name:<34}{t.seconds:>9.2f} s {100 * t.seconds / max(wall, 1e-9):>5.1f} %{times}")
    return lines


def _thread() -> str:
    """Return "main", or what a thread of genkit does: its name without genkit and number."""
    if threading.current_thread() is threading.main_thread():
        return "main"
    return threading.current_thread().name.removeprefix("genkit-").split("_")[0]


def _event() -> Any:
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _process_start() -> float:
    """Return when this process started, on the clock of time.monotonic; now, where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - age
    return time.monotonic()
