"""Pools of workers for tests: real workers in threads of this process, and simulated ones that only count."""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
from pathlib import Path
from typing import Any

from genkit.cluster.units import Event, Unit
from genkit.cluster.worker import Worker
from genkit.errors import HostError, InputError, reason
from genkit.job.plan import Job


class ThreadPool:
    """Real workers in threads of this process: a `Pool` without Ray."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.workers: dict[str, Worker] = {}
        self.loading = threading.Lock()
        self.recorded: dict[str, Any] | None = None

    def _call(self, worker: str, kind: str, *arguments: Any, method: str | None = None) -> None:
        def work() -> None:
            if (one := self.workers.get(worker)) is None:
                return  # it died a moment ago, which is told already
            try:
                with self.loading if kind == "ready" else contextlib.nullcontext():  # it patches torch meanwhile
                    value = getattr(one, method or kind)(*copy.deepcopy(arguments))
            except InterruptedError:
                return
            except (InputError, HostError) as error:
                self.events.put(Event("error", worker, error))
            except Exception as error:
                if self.workers.pop(worker, None) is not None:
                    self.events.put(Event("died", worker, f"{type(error).__name__}: {reason(error)}"))
            else:
                feed = getattr(one, "feed", None)
                use = (0.0, 0.0) if feed is None else feed.use()
                self.events.put(Event(kind, worker, value, tuple(one.news()), use))

        threading.Thread(target=work, daemon=True).start()

    def start(self, worker: str, *, masks: bool = False) -> None:
        self.workers[worker] = Worker(self.job, self.folder, worker)
        self._call(worker, "ready", self.recorded, masks, method="load")

    def open(self, worker: str) -> None:
        if (one := self.workers.get(worker)) is not None:
            one.open()

    def send(self, worker: str, units: list[Unit]) -> None:
        self._call(worker, "drawn", units, method="draw")

    def recall(self, worker: str) -> None:
        self._call(worker, "given", method="give_back")

    def halt(self, worker: str) -> None:
        self._call(worker, "halted", method="halt")

    def finish(self, worker: str) -> None:
        self._call(worker, "ended", method="finish")

    def look_back(self, worker: str, detect: bool) -> None:
        self._call(worker, "looked", detect, method="look_back")

    def kill(self, worker: str) -> None:
        self.workers.pop(worker, None)

    def poll(self, seconds: float) -> list[Event]:
        found: list[Event] = []
        try:
            found.append(self.events.get(timeout=seconds))
            while True:
                found.append(self.events.get_nowait())
        except queue.Empty:
            return found

    def close(self) -> None:
        pass
