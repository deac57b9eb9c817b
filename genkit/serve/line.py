"""The line in which rows of many clients wait for slots: draws to which rows are added while a stream draws."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.sampling.draws import Draws

if TYPE_CHECKING:
    from genkit.sampling.engine import Trajectory

log = logging.getLogger("genkit")
Event = dict[str, Any]


class Ticket:
    """Rows that were submitted together.

    results: its events, in order, as `on` gets them: {"type": …, "row": id, "index": k, …} with the types queued, step
    ("step", "steps"), preview (the same and "image", (h, w, 3) uint8), image ("result", a Result with pixels), failed
    ("reason", "result") and done, the last one ("cancelled": whether it was). rows: as they were submitted. cost: of
    its images that are not drawn yet, see `Line`.
    """

    def __init__(
        self, number: int, rows: Sequence[Request], client: str, on: Callable[[Event], None] | None, previews: int,
        steps: bool,
    ) -> None:  # fmt: skip
        self.id, self.rows, self.client, self.previews, self.steps = f"t{number}", list(rows), client, previews, steps
        self.results: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.cancelled = self.done = self.scored = False  # scored: by all scorers, whatever its rows ask for
        self.judge: Callable[[Result], None] | None = None  # changes the scores of a result before its gate reads them
        self.cost = 0.0
        self.submitted = time.monotonic()
        self._on = on
        self._entries: list[_Entry] = []
        self._close: Callable[[Ticket], None] = lambda _: None

    def cancel(self) -> None:
        """Draw no more of it: images in flight leave their slots at the next step of the network."""
        self._close(self)

    def tell(self, kind: str, **about: Any) -> None:
        """Hand out an event."""
        event = {"type": kind, "ticket": self.id, **about}
        if self._on is None:
            self.results.put(event)
            return
        try:
            self._on(event)
        except Exception:  # of one client: the thread that draws goes on for the others
            log.exception("an event of %s was not taken", self.id)

    def wait(self) -> Iterator[Event]:
        """Yield its events until the last; for a ticket without `on`."""
        while True:
            event = self.results.get()
            yield event
            if event["type"] == "done":
                return


@dataclasses.dataclass
class _Entry:
    """A row of a ticket. request: the row under an id that is unique in the line, and with a seed for each image."""

    ticket: Ticket
    row: Request
    request: Request
    draws: Draws
    each: float  # cost of an image
    flying: int = 0
    ready: bool = True
    over: bool = False


class Line(Draws):
    """Draws of a server: clients take turns, and within a client its rows; thread-safe.

    A row that is cancelled ends with results that failed as "cancelled".
    """

    def __init__(
        self, cost: Callable[[Request], float], picture: Callable[[Any], Any],
        finished: Callable[[Result, Ticket, float], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        """cost: of an image of a row. picture: makes a preview, (h, w, 3) uint8, of a predicted latent (C, h, w).

        finished: called in the thread that draws with each result, its ticket, and its cost.
        """
        super().__init__(())
        self._cost, self._picture, self._told = cost, picture, finished
        self._lock = threading.RLock()
        self._came = threading.Condition(self._lock)
        self._numbers = itertools.count(1)
        self._clients: OrderedDict[str, deque[_Entry]] = OrderedDict()  # rows with something to draw
        self._of: dict[str, _Entry] = {}
        self.tickets: dict[str, Ticket] = {}
        self.halted = self.closed = False
        self.idle = 0.0  # seconds in which there was nothing to draw
        self.watch = self
        # Whether the stream has to end, once what is in flight is finished, because it is another engine's turn; called
        # with whether there is something to draw
        self.gives_way: Callable[[bool], bool] = lambda busy: False

    # What clients do

    def submit(
        self, rows: Sequence[Request], client: str, on: Callable[[Event], None] | None = None, previews: int = 0,
        steps: bool = False, seed: int = 0, check: Callable[[Ticket], None] = lambda _: None,
        done: Mapping[tuple[str, int], Result] | None = None,
    ) -> Ticket:  # fmt: skip
        """Add rows; return their ticket. seed: what rows without a seed derive theirs from.

        check: called before anything changes, within the lock; may raise. done: images of theirs that are there.
        """
        with self._came:
            ticket = Ticket(next(self._numbers), rows, client, on, previews, steps)
            entries = ticket._entries = [self._entry(ticket, n, row, seed, done or {}) for n, row in enumerate(rows)]
            ticket.cost = sum(e.each * (e.row.max_images or e.row.num_images) for e in entries)
            check(ticket)
            ticket._close = self._cancel
            self.tickets[ticket.id] = ticket
            for entry in entries:
                self._of[str(entry.request.id)] = entry
            ticket.tell("queued", rows=[str(row.id) for row in rows], cost=ticket.cost)
            self._clients.setdefault(client, deque()).extend(entries)
            self._came.notify()
        return ticket

    def _entry(
        self, ticket: Ticket, number: int, row: Request, seed: int, done: Mapping[tuple[str, int], Result]
    ) -> _Entry:
        most = row.max_images or row.num_images
        seeds = [row.seed_of(index, seed) for index in range(most)]  # of its own id, before it gets another
        request = row.model_copy(update={"id": f"{ticket.id}.{number}", "seed": seeds})
        keys = ((str(row.id), index) for index in range(most if done else 0))
        there = {(str(request.id), key[1]): done[key] for key in keys if key in done}
        return _Entry(ticket, row, request, Draws([request], there), self._cost(row))

    def _cancel(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.cancelled or ticket.done:
                return
            ticket.cancelled = True
            for entry in ticket._entries:
                self._unready(entry)
                entry.over = True
            self._close_if_over(ticket)

    def wind_up(self, ticket: Ticket) -> None:
        """Begin no more images of a ticket; those in flight are finished."""
        with self._lock:
            for entry in ticket._entries:
                self._unready(entry)
                entry.over = True
            self._close_if_over(ticket)

    def cost(self, client: str | None = None) -> float:
        """Return the cost of the images that are not drawn yet, of all clients or of one."""
        with self._lock:
            return sum(t.cost for t in self.tickets.values() if client is None or t.client == client)

    def waiting(self) -> tuple[int, int]:
        """Return how many rows have something left to begin, and how many images are in flight."""
        with self._lock:
            return sum(map(len, self._clients.values())), sum(e.flying for e in self._of.values())

    def halt(self) -> None:
        """Begin nothing more."""
        with self._came:
            self.halted = True
            self._came.notify()

    def close(self) -> None:
        """Begin nothing more, cancel all tickets, and let the stream end."""
        with self._came:
            self.halted = self.closed = True
            for ticket in list(self.tickets.values()):
                self._cancel(ticket)
            self._came.notify()

    def fail(self, reason: str) -> None:
        """End everything, as after an error of the stream that draws."""
        with self._lock:
            for entry in self._of.values():
                self._unready(entry)
                entry.over, entry.flying = True, 0
            for ticket in list(self.tickets.values()):
                if not ticket.cancelled:
                    ticket.tell("failed", row=None, index=None, reason=reason, result=None)
                self._close_if_over(ticket)

    # What the stream does

    def take(self) -> tuple[Request, int] | None:
        with self._lock:
            if self._held is not None:
                held, self._held = self._held, None
                return held
            while self._clients and not self.halted and not self.gives_way(True):
                client, entries = next(iter(self._clients.items()))
                entry = entries.popleft()
                drawn = entry.draws.take()
                if drawn is None:
                    entry.ready = False
                else:
                    entry.flying += 1
                    entries.append(entry)
                self._clients.move_to_end(client)
                if not entries:
                    del self._clients[client]
                if drawn is not None:
                    return drawn
                self._end(entry)
            return None

    def has_next(self) -> bool:
        with self._lock:
            return super().has_next()

    def more(self) -> bool:
        """Wait for rows; False once the line is closed, and when it gives way."""
        return self.wait(lambda: self.gives_way(self._some())) and not self.gives_way(self._some())

    def _some(self) -> bool:
        return not self.halted and (bool(self._clients) or self._held is not None)

    def wait(self, ended: Callable[[], bool] = lambda: False) -> bool:
        """Wait for rows, or until `ended`; False once the line is closed."""
        with self._came:
            began = time.monotonic()
            self._came.wait_for(lambda: self.closed or self._some() or ended())
            self.idle += time.monotonic() - began
            return not self.closed

    def nudge(self) -> None:
        """Let the stream look whether it has to give way."""
        with self._came:
            self._came.notify()

    def report(self, result: Result) -> None:
        with self._lock:
            entry = self._of.get(result.id)
            if entry is None:  # its row ended with `fail`
                return
            entry.flying -= 1
            ticket = entry.ticket
            if ticket.judge is not None:
                ticket.judge(result)
            entry.draws.report(result)
            ticket.cost = max(0.0, ticket.cost - entry.each)
            own = dataclasses.replace(result, id=str(entry.row.id))
            about = {"row": own.id, "index": own.index, "result": own}
            if not ticket.cancelled:
                if result.status == "done":
                    ticket.tell("image", **about)
                else:
                    ticket.tell("failed", reason=result.reason, **about)
            self._told(result, ticket, entry.each)
            if not entry.over and not entry.ready and entry.draws.has_next():
                entry.ready = True
                self._clients.setdefault(ticket.client, deque()).append(entry)
            self._end(entry)

    def upcoming(self, count: int) -> list[Request]:
        with self._lock:
            return [e.request for entries in self._clients.values() for e in entries][:count]

    def repeated(self) -> Counter[tuple[str, int]]:
        return Counter()

    def earlier(self, request: Request) -> list[Result]:
        return []

    def scored(self, request: Request) -> bool:
        """Whether a row asks for scores: to pass a gate, to be ranked, or by labels and questions."""
        r, entry = request, self._of.get(str(request.id))
        asked = (r.gate, r.rank_by, r.keep, r.labels, r.detect, r.ask)
        return (entry is not None and entry.ticket.scored) or any(value is not None for value in asked)

    # What the engine does: engine.Watch

    def gone(self, tag: Any) -> bool:
        entry = self._of.get(str(tag[0].id))
        return entry is None or entry.ticket.cancelled

    def wants(self, trajectory: Trajectory) -> bool:
        entry = self._of.get(str(trajectory.tag[0].id))
        if entry is None or not entry.ticket.previews:
            return False
        step = trajectory.step + 1
        return step % entry.ticket.previews == 0 and step < trajectory.plan.nfe

    def stepped(self, trajectory: Trajectory) -> None:
        entry = self._of.get(str(trajectory.tag[0].id))
        x0, trajectory.x0 = trajectory.x0, None
        if entry is None or entry.ticket.cancelled:
            return
        about = {
            "row": str(entry.row.id), "index": trajectory.tag[1], "step": trajectory.step, "steps": trajectory.plan.nfe
        }  # fmt: skip
        if x0 is not None and entry.ticket.previews:
            entry.ticket.tell("preview", image=self._picture(x0), **about)
        if entry.ticket.steps:
            entry.ticket.tell("step", **about)

    # Ends

    def _unready(self, entry: _Entry) -> None:
        entries = self._clients.get(entry.ticket.client)
        if entries is not None and entry in entries:
            entries.remove(entry)
            if not entries:
                del self._clients[entry.ticket.client]
        entry.ready = False

    def _end(self, entry: _Entry) -> None:
        """Mark a row as over if no image of it is in flight or left to draw."""
        if not entry.ready and not entry.flying:
            entry.over = True
            self._close_if_over(entry.ticket)

    def _close_if_over(self, ticket: Ticket) -> None:
        if ticket.done or not all(e.over and not e.flying for e in ticket._entries):
            return
        ticket.done, ticket.cost = True, 0.0
        for entry in ticket._entries:
            del self._of[str(entry.request.id)]
        del self.tickets[ticket.id]
        ticket.tell("done", cancelled=ticket.cancelled)
