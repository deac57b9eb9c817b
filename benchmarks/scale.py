"""How many workers a driver can feed, and what a second worker brings. Prints one table.

    python benchmarks/scale.py [--workers 1000] [--rate 20] [--seconds 20] [--pictures 600] [--no-ray]

First real workers on a Ray of this machine, whose network waits 20 ms a picture: pictures a second of one and of two.
Then the real driver code over simulated workers that only wait: `--workers` of them that could draw `--rate` pictures a
second each, for `--seconds`; the rate that the driver keeps up with, its CPU time a picture and its memory.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import resource
import time
from collections import deque
from pathlib import Path
from typing import Any

from genkit.cluster import raypool
from genkit.cluster.dispatch import Dispatcher, Hand, Listener
from genkit.cluster.units import Drawn, Event, Given, Unit
from genkit.rows.request import Request

PICTURE = 0.020  # seconds, of the null network
SLOTS = 16


class Waiting:
    """An actor whose network waits: units are drawn one picture after another, as an engine of one slot does."""

    def __init__(self, job: Any, name: str, threads: int) -> None:
        import threading

        self.lock = threading.Lock()  # the network

    def load(self, recorded: Any, masks: bool) -> Any:
        return {"slots": SLOTS}, [], (0.0, 0.0)

    def open(self) -> Any:
        return None, [], (0.0, 0.0)

    def draw(self, units: list[Unit]) -> Any:
        drawn = []
        for unit in units:
            for _ in unit.indexes or ():
                with self.lock:
                    time.sleep(PICTURE)
            drawn.append(Drawn(unit.number, [(k, "done", True) for k in unit.indexes or ()]))
        return drawn, [], (0.0, 0.0)

    def give_back(self) -> Any:
        return [], [], (0.0, 0.0)

    def halt(self) -> Any:
        return None, [], (0.0, 0.0)

    def finish(self) -> Any:
        return None, [], (0.0, 0.0)


class Simulated:
    """Workers that need no process: each draws its chunks one after another, at `rate` pictures a second."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.free: dict[str, float] = {}  # when a worker is done with what it has
        self.due: list[tuple[float, int, str, list[Unit]]] = []
        self.events: deque[Event] = deque()
        self.count = itertools.count()

    def start(self, worker: str, *, masks: bool = False) -> None:
        self.free[worker] = time.monotonic()

    def open(self, worker: str) -> None:
        pass

    def send(self, worker: str, units: list[Unit]) -> None:
        images = sum(unit.images for unit in units)
        self.free[worker] = max(self.free[worker], time.monotonic()) + images / self.rate
        heapq.heappush(self.due, (self.free[worker], next(self.count), worker, units))

    def recall(self, worker: str) -> None:
        given: list[Given] = []
        self.events.append(Event("given", worker, given))

    def halt(self, worker: str) -> None:
        pass

    def finish(self, worker: str) -> None:
        self.events.append(Event("ended", worker))

    def kill(self, worker: str) -> None:
        pass

    def close(self) -> None:
        pass

    def poll(self, seconds: float) -> list[Event]:
        if not self.events and self.due:
            time.sleep(min(seconds, max(0.0, self.due[0][0] - time.monotonic())))
        found = list(self.events)
        self.events.clear()
        now = time.monotonic()
        while self.due and self.due[0][0] <= now:
            _, _, worker, units = heapq.heappop(self.due)
            drawn = [Drawn(unit.number, [(k, "done", True) for k in unit.indexes or ()]) for unit in units]
            found.append(Event("drawn", worker, drawn))
        return found


def drive(pool: Any, rows: list[Request], workers: int, until: float | None = None) -> tuple[int, float]:
    """Run the driver; return how many pictures it was told of, and in how many seconds."""
    seen = 0

    def drawn(unit: Unit, images: list[Any]) -> None:
        nonlocal seen
        seen += len(images)

    listener = Listener(drawn, print, lambda name: {}, lambda unit, why: None, lambda result: True)
    names = (f"w{n:04d}" for n in itertools.count())
    dispatcher = Dispatcher(rows, {}, pool, listener, names, workers, workers)
    for _ in range(workers):
        dispatcher.adopt(Hand(next(names), ready=True, slots=SLOTS))
    began = time.monotonic()
    end = None if until is None else began + until
    dispatcher.run(None, lambda: int(end is not None and time.monotonic() > end), lambda: None)
    return seen, time.monotonic() - began


def of_ray(workers: int, pictures: int) -> float:
    """Return the pictures a second of actors that wait, loading left out."""
    raypool._actor = lambda: Waiting  # type: ignore[assignment, return-value]
    pool = raypool.RayPool(None, Path(), None, False, workers, 1)  # type: ignore[arg-type]
    try:
        for n in range(workers):
            pool.start(f"w{n:04d}")
        ready = 0
        while ready < workers:
            ready += sum(event.kind == "ready" for event in pool.poll(1.0))
        seen, seconds = drive(pool, [Request(id="r", prompt="a", num_images=pictures * workers)], workers)
        return seen / seconds
    finally:
        pool.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--no-ray", action="store_true")
    given = parser.parse_args()
    lines = []
    if not given.no_ray:
        one, two = of_ray(1, given.pictures), of_ray(2, given.pictures)
        lines.append(("Ray, 1 worker, 20 ms a picture", f"{one:.1f} pictures/s"))
        lines.append(("Ray, 2 workers", f"{two:.1f} pictures/s, {100 * two / (2 * one):.1f} % of twice"))
    asked = given.workers * given.rate
    count = int(asked * given.seconds * 1.5)
    rows = [Request(id=f"r{n}", prompt="a", num_images=100) for n in range(count // 100 + 1)]
    before = resource.getrusage(resource.RUSAGE_SELF)
    pool = Simulated(given.rate)
    for n in range(given.workers):
        pool.start(f"w{n:04d}")
    seen, seconds = drive(pool, rows, given.workers, given.seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines.append((f"driver, {given.workers} waiting workers, asked", f"{asked:.0f} pictures/s"))
    lines.append(("driver, reached", f"{seen / seconds:.0f} pictures/s"))
    lines.append(("driver, CPU a picture", f"{1e6 * cpu / max(1, seen):.1f} µs, {100 * cpu / seconds:.0f} % of a core"))
    lines.append(
        ("driver, peak memory", f"{after.ru_maxrss / 1024:.0f} MiB, of which before {before.ru_maxrss / 1024:.0f}")
    )
    for name, value in lines:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
