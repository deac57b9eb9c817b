"""The thread that draws for a server: rows of all clients in one batch, through `Generator.stream`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from genkit.errors import HostError, reason
from genkit.job.load import load
from genkit.job.plan import Job, Models, inspect_models, plan_job
from genkit.job.words import Inversions
from genkit.options import Options
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.rows.settings import STEPS, cost
from genkit.serve.line import Event, Line, Ticket
from genkit.serve.turns import Turns

if TYPE_CHECKING:
    from genkit.sampling.generators import Generator

log = logging.getLogger("genkit")
WINDOW = 256  # finished images over which the rate is measured
MOST_CUT = 1000  # prompts that are remembered for being too long
STOPPING = "the server is stopping"
TRIES = 3  # errors of the stream in a row after which the engine is given up


class Full(Exception):
    """The queue has no room. seconds: after which it probably has."""

    def __init__(self, seconds: float) -> None:
        super().__init__("the queue is full")
        self.seconds = seconds


class ServingEngine:
    """Loads a job's networks and draws rows that are submitted, from any thread.

    options: of the job; `seed` is not used. defaults: fields for rows that do not state them. most_cost: of what may
    wait, in pictures of the model's own size and steps; one client may have half of it. turns: of several engines on
    one device; it loads again when its turn comes, if it had to leave. Raises InputError for options and defaults that
    do not fit the model.
    """

    def __init__(
        self, options: Options, defaults: dict[str, Any] | None = None, most_cost: float = 256.0,
        turns: Turns | None = None,
    ) -> None:  # fmt: skip
        self.options, self.defaults, self.most_cost = options, defaults or {}, most_cost
        self.turns = turns or Turns()
        self.models: Models = inspect_models(options)
        self.ready, self.why, self.broken = False, "the model is loading", False
        self.started = time.monotonic()
        self.generator: Generator | None = None  # stays when its networks leave memory
        self.loaded = False
        self.counts: Counter[str] = Counter()  # done, and failures by reason
        self.line: Line = Line(self.cost_of, lambda latent: self._preview(latent), self._count)
        self.observers: list[Callable[[Result, Ticket], None]] = []
        self._ends: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # busy seconds so far, cost
        self._preview: Callable[[Any], Any] = lambda latent: None
        self._thread = threading.Thread(target=self._run, name="genkit-engine", daemon=True)
        self._began = 0.0
        self.panel: Any = None
        self.job = self.plan([self.sample()])  # its notes are of the model's files
        self._long: list[Any] = []  # sets of prompts that were cut
        self.line.gives_way = lambda busy: self.turns.gives_way(self, busy)

    def start(self) -> ServingEngine:
        """Load the networks, then start the thread. Raises InputError and HostError as `load`."""
        self.turns.ask(self)
        with self.turns.turn(self):
            self._load()
        self.why = "no picture was drawn yet"
        self._thread.start()
        return self

    def start_later(self) -> None:
        """Start the thread, which loads when there is something to draw."""
        self.ready, self.why = True, ""
        self._thread.start()

    def _load(self) -> None:
        self.generator, self.panel = load(dataclasses.replace(self.job, inversions=self.words()), None)
        from genkit.serve.previews import Preview

        g = self.generator
        self._preview = Preview(g.codec, g.geometry.channels, g.device)
        self._long = [encoder.truncated for encoder in self._encoders()]
        self._began, self.line.idle, self.loaded = time.monotonic(), 0.0, True
        self._ends.clear()

    def unload(self) -> None:
        """Leave memory; it is loaded again when its turn comes."""
        if self.loaded and self.generator is not None:
            self.loaded, self._preview = False, lambda latent: None
            self.panel.unload()
            self.generator.unload()

    def warm(self) -> None:
        """Draw a picture, after which the engine is ready. Raises HostError where that fails."""
        for event in self.submit(
            self.plan([self.sample(seed=0, num_inference_steps=1, scheduler="ddim")]).rows, client="genkit"
        ).wait():
            if event["type"] == "failed":
                raise HostError(f"the first picture failed: {event['reason']}")

    def sample(self, **fields: Any) -> Request:
        """Return a row that the model can draw, whatever its kind."""
        g = self.models.info.geometry
        assert g is not None
        fields |= {"prompt": "a red apple"} if g.text else {}
        if g.inpaints or g.refines:
            from PIL import Image

            fields["image"] = Image.new("RGB", (g.width, g.height), "gray")
            fields |= {"mask_image": Image.new("L", (g.width, g.height), 255)} if g.inpaints else {}
        row = Request(**fields)
        row._source = "command line"
        return row

    def words(self) -> Inversions:
        """Return all textual inversions that were given, as any row may use them."""
        from genkit.components.words import all_embeddings

        o = self.options
        found, _ = all_embeddings(o.embeddings, o.embedding_dir, self.models.info.configs)
        return Inversions(used=tuple(found))

    # Rows

    def plan(self, rows: Sequence[Request]) -> Job:
        """Check rows as `genkit generate` checks a prompt file, and fill in every default. Raises InputError."""
        return plan_job(rows, self.options, self.defaults, self.models)

    def cut(self, rows: Sequence[Request]) -> list[str]:
        """Return notes on drawn rows whose prompts the text encoders truncated."""
        long = self._long  # the thread that draws may add to them
        named = [(name, getattr(row, name)) for row in rows for name in ("prompt", "negative_prompt")]
        fields = dict.fromkeys(name for name, text in named if any(text in found for found in long))
        return [f"{name}: is longer than the text encoder reads: its end was cut off" for name in fields]

    def _encoders(self) -> list[Any]:
        text = None if self.generator is None else self.generator.text
        inner = [getattr(text, name, None) for name in ("first", "second", "encoder")]
        return [one for one in inner if one is not None] or ([] if text is None else [text])

    def cost_of(self, row: Request) -> float:
        """Return what an image of a planned row costs, in pictures of the model's own size and steps."""
        info = self.models.info
        assert info.geometry is not None
        return cost(row, info.geometry, usual_steps=info.defaults.get("num_inference_steps", STEPS))

    def submit(
        self, rows: Sequence[Request], client: str = "local", on: Callable[[Event], None] | None = None,
        previews: int = 0, steps: bool = False, seed: int | None = None,
    ) -> Ticket:  # fmt: skip
        """Queue planned rows; return their Ticket. previews: steps between two, or 0 for none; steps: report each step.

        on: called with each event in the thread that draws, instead of `Ticket.results`; it must return at once. seed:
        what rows without one derive theirs from; None is any. Raises Full, and HostError once the engine is closed.
        """
        if self.line.closed or self.broken:
            raise HostError(f"the server draws no more: {self.why}")
        seed = secrets.randbits(32) if seed is None else seed
        return self.line.submit(rows, client, on, previews, steps, seed, self._check_room)

    def _check_room(self, ticket: Ticket) -> None:
        parts = (self.line.cost(), self.most_cost), (self.line.cost(ticket.client), self.most_cost / 2)
        # A request that is larger than the limit is accepted when nothing else waits
        over = max((held + ticket.cost - most for held, most in parts if held), default=0.0)
        if over > 0:
            raise Full(max(1.0, over / rate if (rate := self.rate) else 10.0))

    # Facts

    @property
    def rate(self) -> float | None:
        """Cost drawn a second of busy time, over the last images; None before there are any."""
        ends = list(self._ends)  # the thread that draws adds to them, and drops them when it loads anew
        if len(ends) < 2 or ends[-1][0] <= ends[0][0]:
            return None
        return sum(cost for _, cost in ends[1:]) / (ends[-1][0] - ends[0][0])

    def snapshot(self) -> dict[str, Any]:
        """Return the state of engine and queue, for /health, /metrics and progress."""
        waiting, flying = self.line.waiting()
        engine = self.line.engine
        budget = None if self.generator is None else self.generator.budget
        counts = dict(self.counts)  # at once: the thread that draws may add a reason
        return {
            "ready": self.ready,
            "why": self.why,
            "model": self.models.info.name,
            "rows_waiting": waiting,
            "images_in_flight": flying,
            "queue_cost": round(self.line.cost(), 4),
            "queue_most": self.most_cost,
            "rate": self.rate,
            "slots": 0.0 if budget is None else (budget.slots if engine is None else engine.slots),
            "slots_used": 0.0 if engine is None else engine.held,
            "images": counts.get("done", 0),
            "failures": {name: n for name, n in counts.items() if name != "done"},
            "seconds": round(time.monotonic() - self.started, 3),
        }

    # The thread

    def _run(self) -> None:
        errors = 0
        while self.line.wait() and errors < TRIES:
            self.turns.ask(self)
            waits = time.monotonic()
            try:
                with self.turns.turn(self) as mine:
                    if not mine:
                        return
                    self.line.idle += time.monotonic() - waits
                    if not self.loaded:
                        self._load()
                    self.turns.begin()
                    for _ in self._stream():
                        errors = 0
            except Exception as error:
                errors += 1
                log.warning("drawing stopped: %s", reason(error))
                self.line.fail(f"the engine stopped: {type(error).__name__}: {reason(error)}")
        if not self.line.closed:
            self.ready, self.broken, self.why = False, True, f"the engine stopped {errors} times"

    def _stream(self) -> Iterator[Result]:
        assert self.generator is not None
        stream: Any = self.generator.stream(self.line, scorer=self.panel, slots=self.options.batch_size, seed=0)
        with contextlib.closing(stream):
            yield from stream

    def _count(self, result: Result, ticket: Ticket, cost: float) -> None:
        done = result.status == "done"
        self.counts["done" if done else (result.reason or "failed")[:60]] += 1
        if done:
            self.ready, self.why = True, ""
            self._ends.append((time.monotonic() - self._began - self.line.idle, cost))
        for found in self._long:
            if len(found) > MOST_CUT:
                found.clear()
        for observer in self.observers:
            observer(result, ticket)

    def drain(self, seconds: float) -> bool:
        """Let what was submitted be drawn, for at most so long; return whether all of it was."""
        end = time.monotonic() + seconds
        while self.line.tickets and time.monotonic() < end:
            time.sleep(0.05)
        return not self.line.tickets

    def give_up(self) -> None:
        """Draw no more, and fail all tickets with that reason."""
        self.ready, self.why = False, STOPPING
        self.line.halt()
        self.line.fail(STOPPING)

    def close(self) -> None:
        """Cancel what is left and end the thread."""
        self.ready, self.why = False, STOPPING
        self.turns.close()
        self.line.close()
        if self._thread.is_alive():
            self._thread.join(60)
