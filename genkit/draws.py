"""Which image to draw next: every row's num_images, then more for the rows whose gate still wants some."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping

from genkit.request import Request, Result
from genkit.scoring.gates import Expression
from genkit.selection import passes


@dataclasses.dataclass
class _Row:
    request: Request
    gate: Expression | None
    issued: int = 0
    in_flight: int = 0
    passed: int = 0

    @property
    def wants_more(self) -> bool:
        """One more draw for each failure, so that the images drawn do not depend on the order in which they end.

        The last one drawn is then the smallest index by which `keep` images passed: a resumed run draws the same ones.
        """
        r = self.request
        if self.issued < r.num_images:
            return True
        return r.max_images is not None and self.issued < r.max_images and self.passed + self.in_flight < (r.keep or 0)


class Draws:
    """Hands out (request, index) pairs and learns from the results.

    `done` holds the images of an earlier run of the same rows; they count as drawn.
    """

    def __init__(self, rows: Iterable[Request], done: Mapping[tuple[str, int], Result] | None = None) -> None:
        self._done = done or {}
        self._rows: dict[str, _Row] = {}
        self._next: deque[_Row] = deque()
        self._held: tuple[Request, int] | None = None
        self.total = 0  # images that this run will hold at the end, as far as is known now
        for request in rows:
            gate = None if request.gate is None else Expression(request.gate, labels=request.labels)
            row = self._rows[str(request.id)] = _Row(request, gate)
            self._next.append(row)
            self.total += request.num_images

    def earlier(self, request: Request) -> list[Result]:
        """Return the records of an earlier run of the images that the row asks for."""
        keys = ((str(request.id), index) for index in range(request.num_images))
        return [self._done[key] for key in keys if key in self._done]

    def take(self) -> tuple[Request, int] | None:
        """Return the next image to draw, or None when there is none, or none before more results are reported."""
        if self._held is not None:
            held, self._held = self._held, None
            return held
        while self._next:
            row = self._next[0]
            if not row.wants_more:
                self._next.popleft()
                continue
            index = row.issued
            row.issued += 1
            row.in_flight += 1
            self.total += index >= row.request.num_images
            earlier = self._done.get((str(row.request.id), index))
            if earlier is None:
                return row.request, index
            self._count(row, earlier)
        return None

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

    def has_next(self) -> bool:
        """Return whether `take` has an image to draw right now."""
        self._held = self.take()
        return self._held is not None

    def report(self, result: Result) -> None:
        """Count a finished image: its row draws another one if it still lacks some that pass."""
        row = self._rows[result.id]
        self._count(row, result)
        if row.wants_more:
            self._next.append(row)

    def _count(self, row: _Row, result: Result) -> None:
        row.in_flight -= 1
        if result.status == "done" and passes(row.gate, result.scores):
            row.passed += 1
