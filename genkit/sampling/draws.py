"""Which image to draw next: num_images of every row, then more for rows that need more images to pass their gate."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any

from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.scoring.gates import Expression, passes


@dataclasses.dataclass
class _Row:
    request: Request
    gate: Expression | None
    least: int  # images that the row will have at least at the end
    expected: int  # images that it will probably have, by the share that passed so far
    cap: float = math.inf  # most images that may be issued, for a row with a budget
    issued: int = 0
    in_flight: int = 0
    passed: int = 0
    finished: int = 0

    @property
    def wants_more(self) -> bool:
        """Whether another image is needed even if all in flight pass."""
        r = self.request
        wanted = self.issued < r.num_images or (self.open and self.passed + self.in_flight < (r.keep or 0))
        return wanted and self.issued < self.cap

    @property
    def open(self) -> bool:
        """Whether more images may be drawn to satisfy the gate."""
        r = self.request
        most = 0 if r.max_images is None else min(r.max_images, self.cap)
        return self.issued < most and self.passed < (r.keep or 0)

    def shortfall(self, rate: float) -> float:
        """Return how many more images than those in flight are needed, if images pass at the row's own rate.

        rate: the pass rate of the whole run, a prior with the weight of two images.
        """
        own = (self.passed + 2 * rate) / (self.finished + 2)
        return ((self.request.keep or 0) - self.passed) / own - self.in_flight


class Draws:
    """Hands out (request, index) pairs, and receives the results.

    done: the images of earlier starts of the run; they count as drawn. most: limit of images, those included; until: a
    time.monotonic(). Past either limit nothing new is handed out, and `short` names the limit.

    stopped: whether the stream ends at the next step of its network, without finishing what is in flight.

    A row's images are handed out in order. Those that count end with the image at which `keep` of them have passed (see
    selection/decide.py), so the same images are kept however many were drawn ahead, in whatever order results came,
    and however often the run was interrupted.
    """

    watch: Any = None  # follows what is drawn: an engine.Watch

    def __init__(
        self,
        rows: Iterable[Request],
        done: Mapping[tuple[str, int], Result] | None = None,
        most: int | None = None,
        until: float | None = None,
    ) -> None:
        self._done = done or {}
        self._most, self._until = most, until
        self._thrifty = most is not None  # a limited number of images is not spent on ones that may not be needed
        self._rows: dict[str, _Row] = {}
        self._next: deque[_Row] = deque()
        self._open: dict[str, _Row] = {}  # waiting for results; may draw ahead
        self._held: tuple[Request, int] | None = None
        self._drawn = len(self._done)
        self._passed = self._finished = 0  # over the rows with max_images
        self.total = 0  # images that the run will probably have at the end
        self.short: str | None = None
        self.stopped = False
        self.engine: Any = None  # of the stream that draws, set by it
        earlier = Counter(row_id for row_id, _ in self._done)
        for request in rows:
            self._admit(request, earlier[str(request.id)])

    def _admit(self, request: Request, earlier: int) -> _Row:
        """Add a row. earlier: how many images of it earlier starts recorded."""
        gate = None if request.gate is None else Expression(request.gate, request.labels, names=None)
        least = max(request.num_images, earlier)
        row = self._rows[str(request.id)] = _Row(request, gate, least, least)
        self._next.append(row)
        self.total += least
        return row

    @property
    def slots_full(self) -> float | None:
        """`Engine.slots_full` of the stream that drew; None before it begins."""
        return None if self.engine is None else self.engine.slots_full

    def stop(self) -> None:
        """Let the stream end at its next step."""
        self.stopped = True

    def anew(self, done: Mapping[tuple[str, int], Result]) -> Draws:
        """Return the same draws from the beginning, with other results of earlier starts."""
        return Draws((row.request for row in self._rows.values()), done, self._most, self._until)

    def settle(self, results: Mapping[tuple[str, int], Result], short: str | None) -> None:
        """Take over the results of other processes, so that `lacking` is right. short: the limit that ended the run."""
        ended = Draws((row.request for row in self._rows.values()), results)
        for row_id, row in ended._rows.items():
            while row.wants_more and (row_id, row.issued) in results:
                ended._issue(row)
        self._rows, self.short = ended._rows, short

    @property
    def until(self) -> float | None:
        """The time.monotonic() after which nothing is begun."""
        return self._until

    def earlier(self, request: Request) -> list[Result]:
        """Return the results that earlier starts of the run recorded for the row."""
        keys = ((str(request.id), index) for index in range(request.num_images))
        return [self._done[key] for key in keys if key in self._done]

    def take(self) -> tuple[Request, int] | None:
        """Return the next image to draw; None if there is none, or none before more results are reported.

        Images that are certainly needed come first, row by row. After that, so that no slot stays empty, rows waiting
        for results draw ahead: the row that probably lacks most first, and as many as are probably needed.
        """
        if self._held is not None:
            held, self._held = self._held, None
            return held
        return self._certain() or (None if self.short else self._ahead())

    def _certain(self) -> tuple[Request, int] | None:
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
        return None

    def _ahead(self) -> tuple[Request, int] | None:
        if self._thrifty:
            return None
        rate = self._rate
        while self._open:
            row = max(self._open.values(), key=lambda row: row.shortfall(rate))
            if not row.open:  # has drawn max_images
                self._open.pop(str(row.request.id), None)
                continue
            if row.shortfall(rate) <= 0:
                return None
            drawn = self._issue(row)
            if drawn is not None or self.short:
                return drawn
        return None

    def _issue(self, row: _Row) -> tuple[Request, int] | None:
        """Return the row's next image; None if it is recorded already (it is then counted), or a limit is reached."""
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
        """How many rows lack images that they need, e.g. after a limit was reached."""
        return sum(row.wants_more for row in self._rows.values())

    def repeated(self) -> Counter[tuple[str, int]]:
        """Count the draws of each (`Request.drawing`, seed) that occurs more than once.

        Rows without a seed derive one from their id, and are never repeated.
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
        """Return the rows that are drawn next, at most `count`."""
        return [row.request for row in itertools.islice(self._next, count)]

    def has_next(self) -> bool:
        """Return whether `take` has an image to draw right now."""
        self._held = self.take()
        return self._held is not None

    def more(self) -> bool:
        """Return whether to go on once everything is drawn: a source to which rows are added waits for them here."""
        return False

    def scored(self, request: Request) -> bool:
        """Return whether the scores of a row's images are of use to anyone."""
        return True

    def report(self, result: Result) -> None:
        """Count a finished image; its row draws another one if too few have passed."""
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
        """Update `total` by what the row will probably draw."""
        more = 0
        if row.open and row.request.max_images is not None:
            more = min(row.request.max_images - row.issued, max(0, math.ceil(row.shortfall(self._rate))))
        expected = max(row.least, row.issued + more)
        self.total += expected - row.expected
        row.expected = expected

    @property
    def _rate(self) -> float:
        """The pass rate over all rows with max_images."""
        return (self._passed + 1) / (self._finished + 2)
