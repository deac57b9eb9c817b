"""Which image to draw next: every row's num_images, then more for the rows whose gate still wants some."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping

from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.scoring.gates import Expression, passes


@dataclasses.dataclass
class _Row:
    request: Request
    gate: Expression | None
    least: int  # images that it will have at the end
    expected: int  # … and how many it probably will, by what passed so far
    issued: int = 0
    in_flight: int = 0
    passed: int = 0
    finished: int = 0

    @property
    def wants_more(self) -> bool:
        """Whether another image is needed whatever those in flight come to: one more for each failure."""
        r = self.request
        return self.issued < r.num_images or (self.open and self.passed + self.in_flight < (r.keep or 0))

    @property
    def open(self) -> bool:
        """Whether the gate may ask for more than is issued."""
        r = self.request
        return r.max_images is not None and self.issued < r.max_images and self.passed < (r.keep or 0)

    def shortfall(self, rate: float) -> float:
        """Return how many more than those in flight it takes to satisfy the row, if images pass as its own have.

        Few images say little: `rate`, that of the whole run, weighs as much as two of the row's own.
        """
        own = (self.passed + 2 * rate) / (self.finished + 2)
        return ((self.request.keep or 0) - self.passed) / own - self.in_flight


class Draws:
    """Hands out (request, index) pairs and learns from the results.

    `done` holds the images of an earlier run of the same rows; they count as drawn. most: images of the run, those
    included; until: a time.monotonic(). Past either nothing new is handed out, and `short` says which it was.

    A row's images are handed out in order. Those that count end with the first by which `keep` of them passed
    (`selection.needed`): whatever was drawn ahead, in whatever order the results came, and however often the run
    was interrupted, the same images are kept.
    """

    def __init__(
        self,
        rows: Iterable[Request],
        done: Mapping[tuple[str, int], Result] | None = None,
        most: int | None = None,
        until: float | None = None,
    ) -> None:
        self._done = done or {}
        self._most, self._until = most, until
        self._rows: dict[str, _Row] = {}
        self._next: deque[_Row] = deque()
        self._open: dict[str, _Row] = {}  # that wait for results, and may draw ahead of them
        self._held: tuple[Request, int] | None = None
        self._drawn = len(self._done)
        self._passed = self._finished = 0  # of the rows that draw until some pass
        self.total = 0  # images that this run will probably hold at the end
        self.short: str | None = None
        self.slots_full: float | None = None  # told by who draws: `Engine.slots_full`
        earlier = Counter(row_id for row_id, _ in self._done)
        for request in rows:
            gate = None if request.gate is None else Expression(request.gate, request.labels, names=None)
            least = max(request.num_images, earlier[str(request.id)])
            row = self._rows[str(request.id)] = _Row(request, gate, least, least)
            self._next.append(row)
            self.total += least

    def earlier(self, request: Request) -> list[Result]:
        """Return the records of an earlier run of the images that the row asks for."""
        keys = ((str(request.id), index) for index in range(request.num_images))
        return [self._done[key] for key in keys if key in self._done]

    def take(self) -> tuple[Request, int] | None:
        """Return the next image to draw, or None when there is none, or none before more results are reported.

        First what is needed for certain, a row after the other. When that runs out and slots would run empty, the rows
        that wait for results draw ahead, the one that probably lacks most first, as far as they probably need.
        """
        if self._held is not None:
            held, self._held = self._held, None
            return held
        while self._next:
            row = self._next[0]
            if not row.wants_more:
                self._next.popleft()
                if row.open:
                    self._open[str(row.request.id)] = row
            elif (drawn := self._issue(row)) is not None:
                return drawn
            elif self.short:
                return None
        return self._ahead()

    def _ahead(self) -> tuple[Request, int] | None:
        if self._most is not None:  # a budget is not for images that may turn out not to be needed
            return None
        rate = self._rate
        while self._open:
            row = max(self._open.values(), key=lambda row: row.shortfall(rate))
            if not row.open:  # it has drawn all that it may
                self._open.pop(str(row.request.id), None)
                continue
            if row.shortfall(rate) <= 0:
                return None
            drawn = self._issue(row)
            if drawn is not None or self.short:
                return drawn
        return None

    def _issue(self, row: _Row) -> tuple[Request, int] | None:
        """Return the row's next image; None where an earlier run drew it, which then counts, or a budget is spent."""
        index = row.issued
        earlier = self._done.get((str(row.request.id), index))
        if earlier is None:
            self.short = self._spent()
            if self.short:
                return None
            self._drawn += 1
        row.issued += 1
        row.in_flight += 1
        if earlier is None:
            self._expect(row)
            return row.request, index
        self._count(row, earlier)
        return None

    def _spent(self) -> str | None:
        if self._most is not None and self._drawn >= self._most:
            return "max_total_images"
        return "max_seconds" if self._until is not None and time.monotonic() >= self._until else None

    @property
    def lacking(self) -> int:
        """How many rows lack images that they need, as after a budget is spent."""
        return sum(row.wants_more for row in self._rows.values())

    def repeated(self) -> Counter[tuple[str, int]]:
        """Return how often each (`Request.drawing`, seed) will be drawn that two rows, or one row twice, ask for.

        Rows without a seed of their own derive one from their id, and never repeat another.
        """
        groups: dict[str, list[Request]] = defaultdict(list)
        for row in self._rows.values():
            if row.request.seed is not None and row.request.prune is None:
                groups[row.request.drawing()].append(row.request)
        found = Counter(
            (drawing, r.seed_of(k))
            for drawing, rows in groups.items()
            if len(rows) > 1 or isinstance(rows[0].seed, list)
            for r in rows
            for k in range(r.max_images or r.num_images)
        )
        return Counter({key: times for key, times in found.items() if times > 1})

    def upcoming(self, count: int) -> list[Request]:
        """Return the next rows that images are drawn of, at most `count`."""
        return [row.request for row in itertools.islice(self._next, count)]

    def has_next(self) -> bool:
        """Return whether `take` has an image to draw right now."""
        self._held = self.take()
        return self._held is not None

    def report(self, result: Result) -> None:
        """Count a finished image: its row draws another one if it still lacks some that pass."""
        row = self._rows[result.id]
        self._count(row, result)
        self._open.pop(result.id, None)
        if row.wants_more:
            self._next.append(row)
        elif row.open:
            self._open[result.id] = row

    def _count(self, row: _Row, result: Result) -> None:
        row.in_flight -= 1
        row.finished += 1
        passed = result.status == "done" and passes(row.gate, result.scores)
        row.passed += passed
        if row.request.max_images is not None:
            self._finished += 1
            self._passed += passed
        self._expect(row)

    def _expect(self, row: _Row) -> None:
        """Have `total` follow what a row will probably draw."""
        more = 0
        if row.open and row.request.max_images is not None:
            more = min(row.request.max_images - row.issued, max(0, math.ceil(row.shortfall(self._rate))))
        expected = max(row.least, row.issued + more)
        self.total += expected - row.expected
        row.expected = expected

    @property
    def _rate(self) -> float:
        """The share of images that pass, of all rows that draw until some do."""
        return (self._passed + 1) / (self._finished + 2)
