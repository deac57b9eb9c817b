"""What a server measures, as Prometheus reads it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from genkit.rows.result import Result
from genkit.serve.engine import ServingEngine
from genkit.serve.line import Ticket

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SUMMED = ("rows_waiting", "queue_cost", "queue_most", "images_in_flight", "slots", "slots_used", "rate")
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Metrics:
    """Counters of one server, in a registry of their own. engines: of its models, the first one's first."""

    def __init__(self, engines: Sequence[ServingEngine]) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.pictures = Counter("genkit_pictures", "Pictures that were drawn.", **own)
        self.failures = Counter("genkit_failures", "Pictures that failed, by reason.", ["reason"], **own)
        self.refusals = Counter("genkit_refusals", "Calls that were refused, by code.", ["code"], **own)
        self.latency = Histogram(
            "genkit_picture_seconds", "From the request to the finished picture.", buckets=SECONDS, **own
        )
        self.drawing = Histogram(
            "genkit_drawing_seconds", "From the slot to the finished picture.", buckets=SECONDS, **own
        )
        self.registry.register(_Now(engines))
        for engine in engines:
            engine.observers.append(self.finished)

    def finished(self, result: Result, ticket: Ticket) -> None:
        """Count a result, in the thread that draws."""
        if result.status != "done":
            self.failures.labels(_short(result.reason)).inc()
            return
        self.pictures.inc()
        self.latency.observe(time.monotonic() - ticket.submitted)
        self.drawing.observe(result.seconds or 0.0)

    def refuse(self, code: str) -> None:
        """Count a refused call."""
        self.refusals.labels(code).inc()

    def text(self) -> tuple[bytes, int, dict[str, str]]:
        """Return body, status and headers of /metrics."""
        return generate_latest(self.registry), 200, {"Content-Type": CONTENT_TYPE_LATEST}


class _Now:
    """Gauges that are read when they are asked for."""

    def __init__(self, engines: Sequence[ServingEngine]) -> None:
        self.engines = engines

    def collect(self) -> Iterable[GaugeMetricFamily]:
        each = [engine.snapshot() for engine in self.engines]
        now = {name: sum(one[name] or 0 for one in each) for name in SUMMED}
        gauges = {
            "genkit_ready": ("1 once a picture was drawn.", float(each[0]["ready"])),
            "genkit_models_loaded": ("Models in memory.", sum(engine.loaded for engine in self.engines)),
            "genkit_queue_rows": ("Rows with something to begin.", now["rows_waiting"]),
            "genkit_queue_cost": (
                "What is not drawn, in pictures of the model's own size and steps.",
                now["queue_cost"],
            ),
            "genkit_queue_most": ("The cost at which calls are refused.", now["queue_most"]),
            "genkit_in_flight": ("Images in flight.", now["images_in_flight"]),
            "genkit_slots": ("Slots of the engine.", now["slots"]),
            "genkit_slots_used": ("Slots in use.", now["slots_used"]),
            "genkit_rate": ("Cost drawn a second of busy time.", now["rate"]),
            **_memory(),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=float(value))


def _memory() -> dict[str, tuple[str, float]]:
    found: dict[str, tuple[str, float]] = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        found["genkit_resident_bytes"] = "Memory of the process.", float(statm.read_text().split()[1]) * PAGE
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["genkit_device_bytes"] = "Memory that torch holds on the GPU.", float(torch.cuda.memory_reserved())
    return found


def _short(reason: str | None) -> str:
    """Return one of a few labels for a reason, so that clients cannot create new time series."""
    known = ("cancelled", "nan", "out of memory")
    return next((one for one in known if (reason or "").startswith(one)), "other")
