"""The thread that draws the runs of clients: rows into the engine's line, pictures into run folders."""

from __future__ import annotations

import dataclasses
import functools
import logging
import queue
import threading
import time
from collections import deque
from typing import Any

from genkit.errors import HostError
from genkit.job.drawing import Drawing
from genkit.job.load import hashes, run_config
from genkit.job.plan import Job, plan_job
from genkit.job.run import conclude
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.records import read_config, read_rows
from genkit.runs.run import Run
from genkit.scoring.names import CLIP_SCORES
from genkit.serve.engine import ServingEngine
from genkit.serve.line import Event, Ticket
from genkit.serve.store import Served, Store, unavailable

log = logging.getLogger("genkit")
ACTIVE = 8  # runs that are drawn at once
AGAIN = 30.0  # seconds after which a run that could not go on is tried again
AHEAD = 2  # images that one run has in the engine's line, for each slot


class Active:
    """A run that is being drawn, with its folder locked. left: rows to submit; flying: rows in the engine's line."""

    def __init__(self, served: Served, engine: ServingEngine, events: queue.SimpleQueue[Any]) -> None:
        """Open it. Raises InputError if the server cannot draw it as it was begun, HostError if its folder is held."""
        self.served, self.engine, self._events = served, engine, events
        config, rows = read_config(served.folder), read_rows(served.folder)
        assert config is not None and engine.generator is not None
        seed = config["binding"]["seed"]
        self.job = plan_job(rows, run_options(engine, seed, served.format, served.quality), {}, engine.models)
        self.run = Run.open(served.folder, run_config(self.job, None, config, hashes(self.job)), self.job.rows)
        try:
            binding, parts = self.run.config["binding"], (engine.generator, engine.panel)
            self.drawing = Drawing(self.job, self.run, binding, parts, written=self._written)
        except BaseException:
            self.run.close()
            raise
        self._panels: tuple[Any, Any] | None = None
        self.left = deque(row for row in self.job.rows if self._lacks(row))
        self.flying: dict[str, tuple[Ticket, Request]] = {}
        self._failed: set[tuple[str, int]] = set()
        self.stopped = self.cut = False  # cut: something of it was not begun, or not finished
        self._count()

    def _lacks(self, row: Request) -> bool:
        return any((str(row.id), k) not in self.run.done for k in range(row.max_images or row.num_images))

    def feed(self, slots: float) -> None:
        """Add rows to the engine's line, as many as keep its slots full."""
        inside = sum(row.num_images for _, row in self.flying.values())
        while self.left and not self.stopped and (not self.flying or inside < AHEAD * slots):
            row = self.left.popleft()
            done = {key: r for k in range(row.max_images or row.num_images)
                    if (r := self.run.done.get(key := (str(row.id), k))) is not None}  # fmt: skip
            setup = functools.partial(self._set_up, row)
            on = functools.partial(self._tell, row)
            ticket = self.engine.line.submit(
                [row], f"runs of {self.served.owner}", on, seed=self.job.options.seed, check=setup, done=done
            )
            if not ticket.done:
                self.flying[ticket.id] = ticket, row
            inside += row.num_images

    def _set_up(self, row: Request, ticket: Ticket) -> None:
        ticket.scored = True
        ticket.judge = functools.partial(self._judge, row)
        # A row with max_images counts its first images only: other clients' calls are not refused for all it may draw
        ticket.cost = min(ticket.cost, self.engine.cost_of(row) * row.num_images)

    def _tell(self, row: Request, event: Event) -> None:
        self._events.put((self, row, event))

    def _judge(self, row: Request, result: Result) -> None:
        """Recompute a picture's CLIP scores, which compare it with the other prompts of its run."""
        if result.embedding is not None:
            others = {name: value for name, value in result.scores.items() if name not in CLIP_SCORES}
            result.scores = others | self._panel().of_embedding(result.embedding, row.plain_prompt, row.labels)

    def _panel(self) -> Any:
        """Return the engine's scorers with the prompts of the run, made again where the engine has loaded again."""
        from genkit.scoring.panel import Panel

        own = self.engine.panel
        if self._panels is None or self._panels[0] is not own:
            self._panels = own, Panel(own.clip, [row.plain_prompt for row in self.job.rows], own.head)
        return self._panels[1]

    def take(self, row: Request, event: Event) -> None:
        """Handle an event of one of its rows. Raises HostError for the disk, and when the engine has stopped."""
        if event["type"] in ("image", "failed") and event["result"] is not None:
            self.drawing.writers.put(event["result"])
        elif event["type"] == "failed":
            raise HostError(event["reason"])
        elif event["type"] == "done":
            self.flying.pop(event["ticket"], None)
            self.cut |= event["cancelled"]

    def _written(self, result: Result) -> None:
        """Count a record that is on the disk, in the thread that wrote it."""
        key = result.id, result.index
        with self.served.lock:
            self.served.done += result.status == "done"
            self._failed = self._failed - {key} if result.status == "done" else self._failed | {key}
            self.served.failed = len(self._failed)

    def _count(self) -> None:
        with self.served.lock:
            results = list(self.run.results.values())
            self._failed = {(r.id, r.index) for r in results if r.status == "failed"}
            self.served.failed = len(self._failed)
            self.served.done = sum(r.status == "done" for r in results)

    def settle(self) -> None:
        """Begin no more images of the run; those in flight are finished."""
        self.stopped, self.cut = True, bool(self.left or self.flying)
        for ticket, _ in list(self.flying.values()):
            self.engine.line.wind_up(ticket)

    def cancel(self) -> None:
        """Cancel what is in flight."""
        self.stopped = True
        for ticket, _ in list(self.flying.values()):
            ticket.cancel()

    @property
    def over(self) -> bool:
        """Whether nothing is in flight and nothing left, or nothing to be begun."""
        return not self.flying and (self.stopped or not self.left)

    def release(self, finish: bool) -> None:
        """Finish writing, and close the folder. finish: also decide what is kept, and write the gallery."""
        try:
            self.drawing.writers.close()
            if finish:
                with self.served.lock:
                    self.served.kept = conclude(self.job, self.run)[1]
        finally:
            self._count()
            self.run.close()


class Feeder:
    """Draws the runs of a store through an engine, in a thread of its own."""

    def __init__(self, engine: ServingEngine, store: Store) -> None:
        self.engine, self.store = engine, store
        self.active: dict[str, Active] = {}
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.settling = self.ended = False
        self._later: dict[str, float] = {}  # when a run that could not go on is tried again
        self._thread = threading.Thread(target=self._run, name="genkit-runs", daemon=True)

    def start(self) -> None:
        """Draw, once the engine is ready."""
        self._thread.start()

    def wake(self) -> None:
        """Look for new runs, and for those that were cancelled."""
        self.events.put(None)

    def settle(self, seconds: float) -> bool:
        """Begin nothing more, and wait until what is in flight is saved; return whether it is."""
        self.settling = True
        self.wake()
        end = time.monotonic() + seconds
        while self.active and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        return not self.active

    def close(self) -> None:
        """End the thread; what is not finished is left for the next start."""
        self.settling = self.ended = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join(60)

    def _run(self) -> None:
        while not self.ended:
            try:
                self._turn()
            except Exception:
                log.exception("drawing runs stopped for a while")
                time.sleep(1)
        for active in list(self.active.values()):
            self._pause(active, None)

    def _turn(self) -> None:
        if not self.settling and self.engine.ready:
            self._begin()
        slots = float(self.engine.snapshot()["slots"]) or 1.0
        for active in list(self.active.values()):
            if active.served.state == "cancelled" and not active.stopped:
                active.cancel()
            elif self.settling and not active.stopped:
                active.settle()
            if self.engine.ready:
                self._guard(active, functools.partial(active.feed, slots))
            if active.over and active.served.id in self.active:
                self._finish(active)
        try:
            event = self.events.get(timeout=0.5)
        except queue.Empty:
            return
        while event is not None:
            active, row, told = event
            if self.active.get(active.served.id) is active:
                self._guard(active, functools.partial(active.take, row, told))
            try:
                event = self.events.get_nowait()
            except queue.Empty:
                return

    def _begin(self) -> None:
        """Open runs that wait, those first of whose owner the fewest are open."""
        now = time.monotonic()
        waiting = [r for r in self.store.waiting() if r.id not in self.active and self._later.get(r.id, 0.0) <= now]
        while waiting and len(self.active) < ACTIVE:
            owners = [active.served.owner for active in self.active.values()]
            run = min(waiting, key=lambda run: owners.count(run.owner))  # of these the oldest
            waiting.remove(run)
            with run.lock:  # opening removes temporary files: nothing else may write there
                if run.over:
                    continue
                try:
                    self.active[run.id] = Active(run, self.engine, self.events)
                    run.state, run.reason = "drawing", None
                except Exception as error:
                    self._postpone(run, error)

    def _guard(self, active: Active, work: Any) -> None:
        """Call `work` for a run; if it fails, the run is closed and tried again later."""
        try:
            work()
        except Exception as error:
            self._pause(active, error)

    def _pause(self, active: Active, error: Exception | None) -> None:
        active.cancel()
        self.active.pop(active.served.id, None)
        if error is not None:
            self._postpone(active.served, error)
        try:
            active.release(finish=False)
        except Exception as another:
            self._postpone(active.served, another)

    def _postpone(self, run: Served, error: Exception) -> None:
        run.reason = unavailable(error)
        run.state = run.state if run.over else "waiting"
        log.warning("run %s waits: %s", run.id, run.reason)
        self._later[run.id] = time.monotonic() + AGAIN

    def _finish(self, active: Active) -> None:
        run = active.served
        if active.cut and not run.over:
            self._pause(active, None)
            return
        try:
            active.release(finish=True)
        except Exception as error:
            self._postpone(run, error)
            if not run.over:
                self.active.pop(run.id, None)
                return
        self.active.pop(run.id, None)
        try:
            run.end("done")
        except HostError as error:
            self._postpone(run, error)


def run_options(engine: ServingEngine, seed: int, form: str, quality: int | None) -> Any:
    """Return the options of a served run: those of the server, with the run's seed and format."""
    return dataclasses.replace(engine.options, seed=seed, format=form, quality=quality)


def config_of(job: Job, engine: ServingEngine) -> dict[str, Any]:
    """Return run.json of a new run. The weights are hashed once, by the first."""
    return run_config(job, (engine.generator, engine.panel), None, hashes(job))


__all__ = ["Active", "Feeder", "config_of", "run_options"]
