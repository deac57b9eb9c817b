"""One of many workers: networks on one device, and the slot engine, fed while it runs. Nothing here knows Ray."""

from __future__ import annotations

import os
import platform
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from genkit.cluster.feed import Feed
from genkit.cluster.units import Drawn, Given, Unit
from genkit.job.drawing import Drawing, logged
from genkit.job.load import hashes, load, run_config
from genkit.job.masks import recall_masks
from genkit.job.plan import Job
from genkit.rows.result import Result
from genkit.runs.look_again import look_again, unseen
from genkit.runs.recorder import Part
from genkit.runs.records import Key, read_config, read_results
from genkit.runs.rescore import rescore
from genkit.version import __version__


class Worker:
    """Draws units of a job into its own part of the run folder. `load`, `open`, then `draw` from several threads."""

    def __init__(self, job: Job, folder: Path, name: str, threads: int = 0) -> None:
        """threads: of a network on the CPU; 0: torch's own number."""
        self.job, self.folder, self.name, self.threads = job, folder, name, threads
        self.rows = {str(row.id): row for row in job.rows}
        self.notes: list[str] = []
        self._chunks: dict[int, tuple[set[int], list[Drawn], Future[list[Drawn]]]] = {}  # by a unit's number
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._opened = threading.Event()  # orders may come while it opens
        self.counted = {"done": 0, "failed": 0}

    def load(self, recorded: dict[str, Any] | None, masks: bool = False) -> dict[str, Any]:
        """Load the networks; return what the driver compares, and run.json for a new run.

        masks: find the masks in words of all rows, and return them. Raises InputError and HostError as `load` does.
        """
        if self.threads:
            os.environ["OMP_NUM_THREADS"] = str(self.threads)
            import torch

            torch.set_num_threads(self.threads)
        with ThreadPoolExecutor(1, "genkit-hash") as pool:
            weights = pool.submit(hashes, self.job)
            lacking = [row for row in self.job.rows if row.mask is not None] if masks else []
            self.parts = load(self.job, recorded, lacking)
            config = run_config(self.job, self.parts, None, weights.result())
        generator = self.parts[0]
        note = generator.budget.line(generator.device, self.job.options.memory)
        slots = min(self.job.options.batch_size or generator.budget.slots, generator.most_slots or 4096)
        return {
            "host": platform.node(), "genkit": __version__, "torch": version("torch"), "weights": weights.result(),
            "config": config, "slots": slots, "notes": [note] if note else [],
            "masks": {str(row.id): (row._found, row._empty) for row in lacking},
        }  # fmt: skip

    def look_back(self, detect: bool) -> list[Result]:
        """Return images of earlier starts scored again, or looked at again for the rows' new words."""
        run = _Looking(self)
        panel = self.parts[1]
        if not detect:
            rescore(run, panel)  # type: ignore[arg-type]
        elif stale := unseen(run):  # type: ignore[arg-type]
            for _ in look_again(run, panel, stale):  # type: ignore[arg-type]
                pass
        self.notes += panel.news()
        return run.found

    def open(self) -> None:
        """Begin the part of the run folder, and the engine."""
        self.part = Part(self.folder, self.job.rows, self.name)
        config = read_config(self.folder)
        assert config is not None
        self.drawing = Drawing(self.job, self.part, config["binding"], self.parts, self.name, self._written)
        self.feed = Feed(self.rows, self.drawing.passed, self._finished)
        self._engine = threading.Thread(target=self._run, name="genkit-engine", daemon=True)
        self._engine.start()
        self._opened.set()

    def draw(self, units: list[Unit]) -> list[Drawn]:
        """Draw units; return once all are recorded, or given back. Raises what stopped the engine."""
        self._opened.wait()
        recall_masks(self.folder, [self.rows[unit.row_id] for unit in units])
        done: Future[list[Drawn]] = Future()
        numbers = {unit.number for unit in units}
        with self._lock:
            if self._error is not None:
                raise self._error
            self._chunks |= dict.fromkeys(numbers, (numbers, [], done))
        self.feed.add(units)
        return done.result()

    def give_back(self) -> list[Given]:
        """Return half of what is not begun."""
        self._opened.wait()
        given = self.feed.give_back()
        for one in given:
            if one.indexes is None:
                self._settle(one.number, None)
        return given

    def halt(self) -> None:
        """Begin nothing more: units end with what is in flight."""
        self._opened.wait()
        self.feed.halt()

    def finish(self) -> None:
        """End the engine at its next step, and write what is finished. Raises HostError when the disk is full."""
        self._opened.wait()
        self.feed.stop()
        self._engine.join()
        self._fail(InterruptedError("finished"))

    def news(self) -> list[str]:
        """Return the notes since the last call."""
        with self._lock:  # several calls may ask at once
            new = self.notes[:]
            del self.notes[: len(new)]
        return new

    @property
    def slots_full(self) -> float | None:
        """Share of the slots in use at this moment."""
        engine = self.feed.engine
        return None if engine is None else engine.held / engine.slots

    def _run(self) -> None:
        try:
            with self.part, self.drawing, logged(self.notes.append):
                self._stream()
                self.notes += self.drawing.last_notes()
        except BaseException as error:
            self._fail(error)

    def _stream(self) -> None:
        ended, busy = None, 0.0
        while self.feed.wait():
            began = time.monotonic()
            if ended is not None and busy:
                self.feed.idled((began - ended) / busy)
            for _ in self.drawing.results(self.feed):
                self.notes += self.drawing.notes()
            self.feed.stream_ended()
            ended = time.monotonic()
            busy += ended - began

    def _written(self, result: Result) -> None:
        self.counted["failed" if result.status == "failed" else "done"] += 1
        if result.status == "failed":
            self.notes.append(f"row {result.id}, image {result.index}: failed: {result.reason}")
        self.feed.written(result)

    def _finished(self, drawn: Drawn) -> None:
        self._settle(drawn.number, drawn)

    def _settle(self, number: int, drawn: Drawn | None) -> None:
        """Count a unit as over; its chunk returns with the last one."""
        with self._lock:
            if number not in self._chunks:
                return
            left, found, done = self._chunks.pop(number)
            left.discard(number)
            if drawn is not None:
                found.append(drawn)
            over = not left  # outside the lock two threads could see that of the last two units
        if over:
            done.set_result(found)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            waiting = {id(done): done for _, _, done in self._chunks.values()}
            self._chunks.clear()
        for done in waiting.values():
            done.set_exception(error)


class _Looking:
    """As much of a Run as `rescore` and `look_again` use, in a process without its lock; `found` is for the driver."""

    def __init__(self, worker: Worker) -> None:
        self.folder, self.rows, self.found = worker.folder, worker.rows, list[Result]()
        self.config = {"binding": worker.job.senses}  # whose names are those of the binding
        results = [r for r in read_results(self.folder) if r.id in self.rows and r.status in ("done", "pruned")]
        self.done: dict[Key, Result] = {(r.id, r.index): r for r in results}

    def rescore(self, results: list[Result]) -> None:
        self.found += results
