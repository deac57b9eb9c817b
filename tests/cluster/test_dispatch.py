"""The driver's logic with simulated workers: chunks, budgets, the tail, deaths, poison."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import pytest

from genkit.cluster.dispatch import DEATHS, Dispatcher, Hand, Listener
from genkit.cluster.units import Drawn, Event, Given, Unit
from genkit.errors import HostError
from genkit.rows.request import Request
from genkit.rows.result import Result
from tests.null_run import rows_of


class SimPool:
    """Workers that draw an image of each of their units at each poll. dies: asked with (worker, unit) before each."""

    def __init__(self, dies: Callable[[str, Unit], bool] = lambda worker, unit: False, slots: int = 4) -> None:
        self.dies, self.slots = dies, slots
        self.events: deque[Event] = deque()
        self.work: dict[str, list[list[Unit]]] = {}
        self.records: dict[str, dict[tuple[str, int], Result]] = {}
        self.sent: dict[str, list[list[Unit]]] = {}
        self.halted: set[str] = set()
        self.slow: set[str] = set()
        self.images: dict[int, list[tuple[int, str, bool]]] = {}

    def start(self, worker: str, *, masks: bool = False) -> None:
        self.work[worker], self.records[worker], self.sent[worker] = [], {}, []
        self.events.append(Event("ready", worker, {"slots": self.slots}))

    def open(self, worker: str) -> None:
        pass

    def send(self, worker: str, units: list[Unit]) -> None:
        self.sent[worker].append(units)
        self.work[worker].append([dataclasses.replace(unit) for unit in units])

    def recall(self, worker: str) -> None:
        given = []
        for units in self.work[worker][1:]:
            given += [Given(unit.number, unit.indexes) for unit in units]
            units.clear()
        self.events.append(Event("given", worker, given))

    def halt(self, worker: str) -> None:
        self.halted.add(worker)

    def finish(self, worker: str) -> None:
        self.events.append(Event("ended", worker))

    def kill(self, worker: str) -> None:
        self.work.pop(worker, None)

    def close(self) -> None:
        pass

    def poll(self, seconds: float) -> list[Event]:
        for worker in list(self.work):
            if worker not in self.slow or not random.randrange(20):
                self._draw(worker)
        found = list(self.events)
        self.events.clear()
        return found

    def _draw(self, worker: str) -> None:
        for units in self.work[worker][:1]:
            for unit in units:
                if self.dies(worker, unit):
                    del self.work[worker]
                    self.events.append(Event("died", worker, "signal 9"))
                    return
                many = [] if worker in self.halted else unit.indexes if unit.indexes is not None else self._wanted(unit)
                for index in many:
                    self.records[worker][unit.row_id, index] = Result(unit.row_id, index, 0)
                self.images[unit.number] = [(index, "done", True) for index in many]
            self.work[worker].pop(0)
            drawn = [Drawn(unit.number, self.images.pop(unit.number)) for unit in units]
            self.events.append(Event("drawn", worker, drawn, (), (9.0, 10.0)))

    def _wanted(self, unit: Unit) -> list[int]:
        """A whole row of keep 2: two more images than there are, as far as it may."""
        there = {r.index for r in unit.earlier}
        new = [k for k in range(6) if k not in there][: max(0, 2 - len(there))]
        return new if unit.most is None else new[: unit.most]


def drive(rows: list[Request], pool: SimPool, workers: int = 2, **options: Any) -> tuple[Any, ...]:
    """Run a dispatcher to its end; return it, how often each image was reported, and the units set aside."""
    seen: Counter[tuple[str, int]] = Counter()
    poisoned: list[tuple[Unit, str]] = []

    def drawn(unit: Unit, images: list[tuple[int, str, bool]]) -> None:
        seen.update((unit.row_id, index) for index, *_ in images)

    listener = Listener(
        drawn, lambda line: None, lambda name: pool.records[name], lambda *found: poisoned.append(found), lambda r: True
    )
    names = (f"w{n:04d}" for n in itertools.count())
    dispatcher = Dispatcher(
        rows, {}, pool, listener, names, workers, options.pop("most", workers), options.pop("left", None)
    )
    polls = itertools.count()
    dispatcher.run(
        options.pop("until", None),
        lambda: 1 if next(polls) > 20_000 else 0,
        lambda: None,
    )
    assert next(polls) <= 20_000, "it hangs"
    dispatcher.finish(1.0)
    return dispatcher, seen, poisoned


def images_of(rows: list[Request]) -> Counter[tuple[str, int]]:
    return Counter((str(row.id), k) for row in rows for k in range(row.num_images))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_image_is_handed_out_once(workers: int) -> None:
    rows = [*rows_of(20, 3), Request(id="many", prompt="a fox", num_images=500)]
    pool = SimPool()
    _, seen, _ = drive(rows, pool, workers)
    assert seen == images_of(rows)
    assert all(
        len(u.indexes or []) <= pool.slots // 2 for sent in pool.sent.values() for units in sent for u in units[1:]
    )


def test_rows_that_draw_until_enough_pass_stay_in_one_worker() -> None:
    rows = [Request(id=f"g{n}", prompt="a", num_images=1, keep=2, gate="clip > 0.5", max_images=6) for n in range(9)]
    pool = SimPool()
    _, seen, _ = drive(rows, pool, 3)
    assert seen == Counter({(f"g{n}", k): 1 for n in range(9) for k in range(2)})
    assert all(u.indexes is None for s in pool.sent.values() for us in s for u in us)


@pytest.mark.parametrize("left", [1, 7, 30])
def test_the_budget_holds_for_all_together_and_what_is_not_used_comes_back(left: int) -> None:
    gated = [Request(id=f"g{n}", prompt="a", keep=2, gate="clip > 0.5", max_images=6) for n in range(5)]
    dispatcher, seen, _ = drive([*gated, *rows_of(20)], SimPool(), 2, left=left)
    assert sum(seen.values()) == min(left, 30)
    assert dispatcher.left == 0 and dispatcher.short == ("max_total_images" if left < 30 else None)


def test_after_the_time_is_up_nothing_is_begun() -> None:
    pool = SimPool()
    dispatcher, seen, _ = drive(rows_of(50), pool, 2, until=time.monotonic() - 1)
    assert not seen and dispatcher.short == "max_seconds" and not any(pool.sent.values())


def test_at_the_end_idle_workers_take_over_what_a_slow_one_has_not_begun() -> None:
    random.seed(1)
    pool = SimPool()
    pool.slow.add("w0000")
    _, seen, _ = drive(rows_of(60), pool, 2)
    assert seen == images_of(rows_of(60))
    assert len(pool.records["w0000"]) < 15 and len(pool.records["w0001"]) > 45


@pytest.mark.parametrize("seed", range(5))
def test_random_deaths_lose_nothing_and_draw_nothing_twice(seed: int) -> None:
    moment = random.Random(seed)
    deaths = iter(range(8))
    pool = SimPool(lambda worker, unit: moment.random() < 0.05 and next(deaths, None) is not None)
    rows = rows_of(40, 3)
    _, seen, poisoned = drive(rows, pool, 3)
    lost = {(u.row_id, k) for u, _ in poisoned for k in u.indexes or []}
    assert set(seen) | lost == set(images_of(rows)) and set(seen).isdisjoint(lost) and max(seen.values()) == 1


def test_a_row_that_kills_its_workers_is_set_aside_and_no_other() -> None:
    killed: list[str] = []

    def dies(worker: str, unit: Unit) -> bool:
        if unit.row_id == "r7":
            killed.append(worker)
        return unit.row_id == "r7"

    _, seen, poisoned = drive(rows_of(30, 2), SimPool(dies), 2)
    assert len(killed) == DEATHS and {unit.row_id for unit, _ in poisoned} == {"r7"}
    assert "3 workers died" in poisoned[0][1] and "signal 9" in poisoned[0][1]
    assert set(images_of(rows_of(30, 2))) - set(seen) == {("r7", 0), ("r7", 1)}


def test_workers_that_die_while_they_load_end_the_job() -> None:
    class Broken(SimPool):
        def start(self, worker: str, *, masks: bool = False) -> None:
            self.work[worker] = []
            self.events.append(Event("died", worker, "memory of its node ran out"))

    with pytest.raises(HostError, match="die while they load their networks: memory of its node ran out"):
        drive(rows_of(5), Broken(), 2)


def test_bounds_let_the_number_grow_with_the_work() -> None:
    few, many = SimPool(), SimPool()
    drive(rows_of(2), few, 1, most=8)
    drive(rows_of(400), many, 1, most=8)
    assert len(few.sent) == 1 and len(many.sent) == 8


def test_slots_full_is_of_all_workers() -> None:
    dispatcher, _, _ = drive(rows_of(40), SimPool(), 3)
    assert dispatcher.slots_full == 0.9
    assert Hand("a", slots=32).chunk == 16
