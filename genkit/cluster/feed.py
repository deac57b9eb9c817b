"""Draws to which units are added, and from which they are taken back, while a stream draws them."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping

from genkit.cluster.units import Drawn, Given, Unit
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.sampling.draws import Draws


@dataclasses.dataclass
class _State:
    unit: Unit
    request: Request
    left: deque[int]  # images not begun; of a whole row, Draws knows
    begun: int = 0
    images: list[tuple[int, str, bool]] = dataclasses.field(default_factory=list)  # recorded


class Feed(Draws):
    """Draws of one worker. Images of a unit are handed out as they are asked for; thread-safe.

    rows: of the whole job, by id. passed: whether a result passes its row's gate. finished: called with each unit of
    which everything is recorded and nothing more is to be drawn, from whichever thread notices.

    As rows come and go, rows that ask for the same picture are not detected: each draws it, with equal results.
    """

    def __init__(
        self, rows: Mapping[str, Request], passed: Callable[[Result], bool], finished: Callable[[Drawn], None]
    ) -> None:
        super().__init__(())
        self._done: dict[tuple[str, int], Result] = {}
        self._all, self._passes, self._finish = rows, passed, finished
        self._lock = threading.RLock()
        self._came = threading.Condition(self._lock)
        self._units: dict[int, _State] = {}
        self._of: dict[tuple[str, int] | str, _State] = {}  # by image, or by row if it is whole
        self._plain: deque[_State] = deque()
        self.halted = False
        self._use = (0.0, 0.0)  # of streams that ended

    def add(self, units: list[Unit]) -> None:
        """Add units, to be drawn after those that are there."""
        with self._came:
            for unit in units:
                request = self._all[unit.row_id]
                state = self._units[unit.number] = _State(unit, request, deque(unit.indexes or ()))
                if unit.indexes is None:
                    self._add_row(state)
                else:
                    self._of |= {(unit.row_id, index): state for index in unit.indexes}
                    self._plain.append(state)
            self._came.notify()
        self._complete(units)

    def _add_row(self, state: _State) -> None:
        unit, request = state.unit, state.request
        self._done |= {(r.id, r.index): r for r in unit.earlier}
        self._of[unit.row_id] = state
        row = self._admit(request, len(unit.earlier))
        if unit.most is not None:
            self._thrifty = True
            missing = (k for k in range(request.max_images or request.num_images) if (unit.row_id, k) not in self._done)
            row.cap = next((k for n, k in enumerate(missing) if n == unit.most), math.inf)

    def take(self) -> tuple[Request, int] | None:
        """Return the next image to draw: of whole rows, which depend on results, before others."""
        with self._lock:
            if self.halted:
                return None
            drawn = self._certain()
            while drawn is None and self._plain:
                state = self._plain[0]
                if state.left:
                    drawn = state.request, state.left.popleft()
                else:
                    self._plain.popleft()
            drawn = drawn or self._ahead()
            if drawn is not None:
                state = self._state(str(drawn[0].id), drawn[1])
                state.begun += 1
            return drawn

    def report(self, result: Result) -> None:
        """Count a finished image, which is not recorded yet."""
        with self._lock:
            if result.id in self._rows:
                super().report(result)

    def upcoming(self, count: int) -> list[Request]:
        """Return the rows that are drawn next, at most `count`."""
        with self._lock:
            return [*super().upcoming(count), *(state.request for state in self._plain)][:count]

    def repeated(self) -> Counter[tuple[str, int]]:
        return Counter()

    def earlier(self, request: Request) -> list[Result]:
        with self._lock:
            return super().earlier(request)

    def written(self, result: Result) -> None:
        """Count an image whose record is on the disk."""
        with self._lock:
            state = self._state(result.id, result.index)
            state.images.append((result.index, result.status, self._passes(result)))
        self._complete([state.unit])

    def give_back(self) -> list[Given]:
        """Give up half of the images that are not begun, rounded up, and return them."""
        with self._lock:
            states = [s for s in self._units.values() if s.left or (s.unit.indexes is None and not s.begun)]
            many = math.ceil(sum(max(1, len(s.left)) for s in states) / 2)
            given: list[Given] = []
            for state in reversed(states):
                if many <= 0:
                    break
                if state.unit.indexes is None:
                    self._forget(state)
                    given.append(Given(state.unit.number, None))
                    many -= 1
                    continue
                back = [state.left.pop() for _ in range(min(many, len(state.left)))]
                many -= len(back)
                state.unit.indexes = [k for k in state.unit.indexes if k not in back]
                for index in back:
                    del self._of[state.unit.row_id, index]
                given.append(Given(state.unit.number, sorted(back)))
            touched = [self._units[g.number].unit for g in given if g.indexes is not None]
            for one in given:
                if one.indexes is None:
                    touched.append(self._units.pop(one.number).unit)
        self._complete(touched)
        return given

    def halt(self) -> None:
        """Hand out nothing more."""
        with self._came:
            self.halted = True
            units = [state.unit for state in self._units.values()]
            self._came.notify()
        self._complete(units)

    def wait(self) -> bool:
        """Wait until there is something to draw; False once it is stopped."""
        with self._came:
            self._came.wait_for(lambda: self.stopped or (not self.halted and self._some()))
            return not self.stopped

    def stop(self) -> None:
        """End the stream and `wait`."""
        with self._came:
            self.stopped = True
            self._came.notify()

    def use(self) -> tuple[float, float]:
        """Return `Engine.use`, summed over all streams so far."""
        used, slots = (0.0, 0.0) if self.engine is None else self.engine.use
        return self._use[0] + used, self._use[1] + slots

    def stream_ended(self) -> None:
        """Add the slots used by a stream that ended to `use`."""
        self._use, self.engine = self.use(), None

    def idled(self, share: float) -> None:
        """Count a pause between two streams in `use`: `share` of what was counted so far."""
        self._use = self._use[0], self._use[1] * (1 + share)

    def _some(self) -> bool:
        return bool(self._next) or any(state.left for state in self._plain)

    def _state(self, row_id: str, index: int) -> _State:
        found = self._of.get(row_id)
        return self._of[row_id, index] if found is None else found

    def _complete(self, units: list[Unit]) -> None:
        """Report those of the units that are finished, once."""
        over: list[Drawn] = []
        with self._lock:
            for unit in units:
                state = self._units.get(unit.number)
                if state is None or len(state.images) < state.begun or not (self.halted or self._exhausted(state)):
                    continue
                del self._units[unit.number]
                if unit.indexes is None:
                    self._forget(state)
                else:
                    for index in unit.indexes:
                        self._of.pop((unit.row_id, index), None)
                    state.left.clear()
                over.append(Drawn(unit.number, state.images))
        for drawn in over:
            self._finish(drawn)

    def _exhausted(self, state: _State) -> bool:
        if state.unit.indexes is not None:
            return not state.left
        row = self._rows.get(state.unit.row_id)
        return row is None or (row.in_flight == 0 and not row.wants_more and not row.open)

    def _forget(self, state: _State) -> None:
        """Drop a whole row."""
        row = self._rows.pop(state.unit.row_id, None)
        self._open.pop(state.unit.row_id, None)
        if row is not None and row in self._next:
            self._next.remove(row)
        self._of.pop(state.unit.row_id, None)
        for r in state.unit.earlier:
            self._done.pop((r.id, r.index), None)
