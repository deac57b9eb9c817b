"""Hands the rows of a job out to workers, and out again where workers die. Knows neither Ray nor networks."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from genkit.cluster.units import Drawn, Event, Given, Pool, Unit, units_of
from genkit.errors import HostError
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.records import Key

OUTSTANDING = 4  # chunks that a worker has, each of half its slots: two in the slots, and two that wait
DEATHS = 3  # of workers that had a unit, after which it is set aside
LOADS = 3  # workers in a row that may die before they drew anything
POLL = 0.2  # seconds


@dataclasses.dataclass
class Hand:
    """A worker as the driver sees it."""

    name: str
    ready: bool = False
    slots: float = 1
    units: dict[int, Unit] = dataclasses.field(default_factory=dict)  # outstanding
    chunks: int = 0
    recalled: bool = False  # an answer is due, or nothing came back since it was last handed work
    use: tuple[float, float] = (0.0, 0.0)
    ended: bool = False
    alone: bool = False  # draws a single unit, during which another worker died

    @property
    def chunk(self) -> float:
        """Slots that the images of a chunk take: half of all."""
        return self.slots / 2


@dataclasses.dataclass
class Listener:
    """Callbacks of the dispatcher.

    drawn: takes a unit and its images, as in Drawn. say: takes a line for the user. recorded: returns what a worker
    that died recorded, by image. poison: takes a unit that is set aside, and why. passed: whether a result passes its
    row's gate. check: takes name and facts of a worker; raises HostError for one that does not fit the others.
    """

    drawn: Callable[[Unit, list[tuple[int, str, bool]]], None]
    say: Callable[[str], None]
    recorded: Callable[[str], Mapping[Key, Result]]
    poison: Callable[[Unit, str], None]
    passed: Callable[[Result], bool]
    check: Callable[[str, dict[str, Any]], None] = lambda name, facts: None


class Dispatcher:
    """The state of one run of many workers; see `run`.

    least, most: workers to have; most > least where a cluster grows. left: images that may still be begun, or None.
    cost: slots that an image of a row takes.
    """

    def __init__(
        self, rows: Sequence[Request], done: Mapping[Key, Result], pool: Pool, listener: Listener,
        names: Iterator[str], least: int, most: int, left: int | None = None,
        cost: Callable[[Request], float] = lambda row: 1.0,
    ) -> None:  # fmt: skip
        self.rows, self.pool, self.tell, self.names = {str(r.id): r for r in rows}, pool, listener, names
        self.least, self.most, self.left = least, most, left
        self.hands: dict[str, Hand] = {}
        self.gone_use = (0.0, 0.0)
        self.short: str | None = None
        self._numbers = itertools.count()
        self._cost, self._size = cost, 0.0
        self._fresh = (unit for row in rows for unit in units_of(row, done, self._images(row), self._numbers))
        self._returned: deque[Unit] = deque()
        self._suspects: deque[Unit] = deque()
        self._exhausted = False
        self._failed_loads = 0
        self._halted = False

    def adopt(self, hand: Hand) -> None:
        """Take over a worker that was started, or is ready already."""
        self.hands[hand.name] = hand

    def run(self, until: float | None, stopped: Callable[[], int], tick: Callable[[], None]) -> None:
        """Draw everything. until: a time.monotonic() after which nothing is begun. stopped: asked after each poll."""
        while not stopped():
            if until is not None and time.monotonic() >= until and not self._halted:
                self._halt("max_seconds")
            self._assign()
            if self._over():
                return
            for event in self.pool.poll(POLL):
                self._handle(event)
            tick()

    def finish(self, seconds: float) -> None:
        """Let all workers write what is finished, and end; those that take longer than `seconds` are killed."""
        deadline = time.monotonic() + seconds
        for hand in self.hands.values():
            (self.pool.finish if hand.ready else self.pool.kill)(hand.name)
            hand.ended = not hand.ready
        while not all(hand.ended for hand in self.hands.values()) and time.monotonic() < deadline:
            for event in self.pool.poll(POLL):
                if event.kind == "error":
                    raise event.value
                self._last(event)
        for hand in self.hands.values():
            if not hand.ended:
                self.pool.kill(hand.name)

    def _last(self, event: Event) -> None:
        """Count what a worker says in the end."""
        if event.worker in self.hands:
            hand = self.hands[event.worker]
            self._hear(hand, event)
            if event.kind == "drawn":
                self._drawn(hand, event.value)
            hand.ended |= event.kind in ("ended", "died")

    @property
    def alive(self) -> int:
        """Workers that are ready."""
        return sum(hand.ready for hand in self.hands.values())

    @property
    def slots_full(self) -> float | None:
        """The share of all workers' slots in use while there was more to draw."""
        uses = [self.gone_use, *(hand.use for hand in self.hands.values())]
        slots = sum(slots for _, slots in uses)
        return sum(used for used, _ in uses) / slots if slots else None

    def _over(self) -> bool:
        return not (any(hand.units for hand in self.hands.values()) or (not self._halted and self._waits))

    def _halt(self, limit: str) -> None:
        self._halted, self.short = True, limit
        for hand in self.hands.values():
            if hand.units:
                self.pool.halt(hand.name)

    # What comes in

    def _handle(self, event: Event) -> None:
        hand = self.hands.get(event.worker)
        if hand is None:
            return
        self._hear(hand, event)
        if event.kind == "ready":
            self.tell.check(hand.name, event.value)
            hand.ready, hand.slots = True, event.value["slots"]
            self._failed_loads = 0
            self.pool.open(hand.name)
        elif event.kind == "drawn":
            self._drawn(hand, event.value)
        elif event.kind == "given":
            self._given(hand, event.value)
        elif event.kind == "died":
            self._died(hand, event.value)
        elif event.kind == "error":
            raise event.value

    def _hear(self, hand: Hand, event: Event) -> None:
        """Pass on the notes of an event, and keep the newest count of slots in use."""
        for note in event.notes:
            self.tell.say(note)
        hand.use = max(hand.use, event.slots_full, key=lambda use: use[1])

    def _drawn(self, hand: Hand, drawn: list[Drawn]) -> None:
        hand.chunks -= 1
        hand.recalled = False
        for one in drawn:
            unit = hand.units.pop(one.number, None)
            if unit is None:  # the worker gave the whole unit back
                continue
            if self.left is not None:
                self.left += (unit.most or 0) - len(one.images)
            self.tell.drawn(unit, one.images)
            there = {index for index, *_ in one.images}
            if rest := [k for k in unit.indexes or () if k not in there]:  # given back: "given" has not arrived yet
                self._returned.append(dataclasses.replace(unit, number=next(self._numbers), indexes=rest))
        hand.alone = hand.alone and bool(hand.units)

    def _given(self, hand: Hand, given: list[Given]) -> None:
        for one in given:
            unit = hand.units.get(one.number)
            if unit is None:
                continue
            if one.indexes is None or unit.indexes is None:
                back = hand.units.pop(one.number)
            else:
                back = dataclasses.replace(unit, number=next(self._numbers), indexes=one.indexes, most=len(one.indexes))
                unit.indexes = [k for k in unit.indexes if k not in one.indexes]
                unit.most = len(unit.indexes)
                if not unit.indexes:
                    del hand.units[one.number]
            if self.left is not None:
                self.left += back.most or 0
            self._returned.append(back)
        hand.recalled = not given

    def _died(self, hand: Hand, why: str) -> None:
        del self.hands[hand.name]
        self.gone_use = self.gone_use[0] + hand.use[0], self.gone_use[1] + hand.use[1]
        if not hand.ready:
            self._failed_loads += 1
            if self._failed_loads >= LOADS:
                raise HostError(f"workers die while they load their networks: {why}")
        self.tell.say(f"worker {hand.name} died: {why}; what it had begun is drawn again")
        recorded = self.tell.recorded(hand.name) if hand.units else {}
        for unit in hand.units.values():
            self._outlive(unit, recorded, why)

    def _outlive(self, unit: Unit, recorded: Mapping[Key, Result], why: str) -> None:
        """Count what a dead worker recorded of a unit, and hand the rest out again, or set it aside."""
        found = [r for (row_id, _), r in recorded.items() if row_id == unit.row_id]
        if unit.indexes is not None:
            found = [r for r in found if r.index in unit.indexes]
            unit.indexes = [k for k in unit.indexes if k not in {r.index for r in found}]
        if self.left is not None:
            self.left += (unit.most or 0) - len(found)
        if found:
            self.tell.drawn(unit, [(r.index, r.status, self.tell.passed(r)) for r in found])
        unit.earlier = [*unit.earlier, *(r for r in found if r.status != "failed")]
        if unit.indexes == []:
            return
        unit.deaths += 1
        if unit.deaths >= DEATHS:
            self.tell.poison(unit, f"{DEATHS} workers died while it was drawn: {why}")
        else:
            self._suspects.append(unit)

    # What goes out

    def _assign(self) -> None:
        """Begin workers that are missing, and give those that are there enough to do."""
        if self._halted:
            return
        while len(self.hands) < self.least and self._waits:
            self._begin()
        least_busy_first = sorted(self.hands.values(), key=lambda hand: (len(hand.units), hand.chunks))
        for hand in least_busy_first:
            if not hand.ready or hand.alone:
                continue
            if self._suspects and not hand.units and self._afford(self._suspects[0]):
                self._send(hand, [self._suspects.popleft()])
                hand.alone = True
                continue
            while hand.chunks < OUTSTANDING and (units := self._chunk(hand.chunk)):
                self._send(hand, units)
        if not self._waits:
            self._share()
        elif len(self.hands) < self.most and all(hand.chunks >= OUTSTANDING for hand in self.hands.values()):
            self._begin()  # one after another, as each has to load its networks

    def _begin(self) -> None:
        hand = Hand(next(self.names))
        self.hands[hand.name] = hand
        self.pool.start(hand.name)

    def _send(self, hand: Hand, units: list[Unit]) -> None:
        hand.units |= {unit.number: unit for unit in units}
        hand.chunks += 1
        hand.recalled = False
        self.pool.send(hand.name, units)

    def _images(self, row: Request) -> int:
        """How many images of a row make a chunk."""
        return max(1, int(self._size / self._cost(row)))

    def _chunk(self, size: float) -> list[Unit]:
        """Return units that take about `size` slots, as far as the budget goes."""
        self._size = max(self._size, size)
        units: list[Unit] = []
        taken = 0.0
        while taken < size and (unit := self._next()) is not None:
            if not self._afford(unit):
                self._returned.appendleft(unit)
                break
            units.append(unit)
            taken += unit.images * self._cost(self.rows[unit.row_id])
        if not units and self.left == 0 and not any(hand.units for hand in self.hands.values()) and self._waits:
            self._halt("max_total_images")
        return units

    @property
    def _waits(self) -> bool:
        """Whether there is a unit to hand out."""
        return bool(self._returned or self._suspects or self._peek())

    def _afford(self, unit: Unit) -> bool:
        """Reserve the most images that a unit may take, and cut the unit to what is left; False if nothing is left."""
        if self.left is None:
            return True
        if self.left <= 0:
            return False
        if unit.indexes is None:
            row = self.rows[unit.row_id]
            unit.most = min(self.left, (row.max_images or row.num_images) - len(unit.earlier))
        else:
            if len(unit.indexes) > self.left:
                rest = unit.indexes[self.left :]
                self._returned.appendleft(dataclasses.replace(unit, number=next(self._numbers), indexes=rest))
                unit.indexes = unit.indexes[: self.left]
            unit.most = len(unit.indexes)
        self.left -= unit.most
        return True

    def _next(self) -> Unit | None:
        if self._returned:
            return self._returned.popleft()
        unit = next(self._fresh, None)
        self._exhausted |= unit is None
        return unit

    def _peek(self) -> bool:
        """Whether there is a unit that was never handed out; the next one is moved to `_returned`."""
        if not self._exhausted and (unit := next(self._fresh, None)) is not None:
            self._returned.append(unit)
            return True
        self._exhausted = True
        return False

    def _share(self) -> None:
        """Work stealing at the end: ask as many busy workers as are idle for half of what they have not begun."""
        idle = sum(hand.ready and not hand.units for hand in self.hands.values())
        busy = [hand for hand in self.hands.values() if hand.units and not hand.recalled and not hand.alone]
        for hand in sorted(busy, key=lambda hand: -len(hand.units))[:idle]:
            hand.recalled = True
            self.pool.recall(hand.name)
