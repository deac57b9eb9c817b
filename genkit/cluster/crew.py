"""The crew of many workers: `run_job` tells it when to load, score again and draw."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from genkit.cluster.dispatch import LOADS, POLL, Dispatcher, Hand, Listener
from genkit.cluster.units import Event, Pool, Unit
from genkit.device.devices import usable_cores
from genkit.errors import HostError, InputError, nearest, shown
from genkit.job.drawing import passing
from genkit.job.load import run_config
from genkit.job.masks import write_masks
from genkit.job.plan import Job
from genkit.progress import Progress
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.rows.settings import cost
from genkit.runs.folding import ended
from genkit.runs.run import Run
from genkit.sampling.draws import Draws
from genkit.signals import Signals
from genkit.version import __version__

MOST = 10_000  # workers
FINISH = 60.0  # seconds to write what is finished
DEAD = 10.0  # seconds until the files of a worker that died are free


def parse_workers(asked: int | str | None) -> tuple[int, int] | None:
    """Return the least and the most workers of "4", 4 or "4:64"; None for None. Raises InputError."""
    if asked is None:
        return None
    match = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", str(asked))
    if match is None:
        raise InputError(f"--workers: {shown(asked)} is not a number, or two as 4:64")
    least = int(match[1])
    most = least if match[2] is None else int(match[2])
    if not 1 <= least <= most <= MOST:
        raise InputError(f"--workers: {shown(asked)} is not within 1 to {MOST}, the smaller number first")
    return least, most


def check_address(address: str | None) -> None:
    """Raise InputError for an address of another kind than RayPool takes."""
    if address is not None and address.startswith("ray://"):
        raise InputError("--ray: ray:// is Ray's client; run the command on a node of the cluster: `ray job submit`")
    if address is not None and address != "auto" and not re.fullmatch(r"[^\s:]+:[0-9]{1,5}", address):
        raise InputError(f"--ray: {shown(address)} is not auto or HOST:PORT{nearest(address, ['auto'])}")


class Workers:
    """Many workers; a `job.crew.Crew`.

    make_pool: called with whether workers have a GPU (None: if there are any); returns their Pool, and the least and
    most number of workers.
    """

    def __init__(self, job: Job, folder: Path, make_pool: Callable[[bool | None], tuple[Pool, int, int]]) -> None:
        self.job, self.folder, self.make_pool = job, folder, make_pool
        self.pool: Any = None
        self.slots_full: float | None = None
        self.facts: dict[str, dict[str, Any]] = {}  # by worker: what it reported of itself
        self.weights: Mapping[str, Any] | None = None
        self.names: Iterator[str] = (f"w{n:04d}" for n in itertools.count())
        self.notes: list[str] = []
        self.found: dict[str, Any] = {}  # masks in words, of rows

    def load(self, recorded: dict[str, Any] | None, rows: Sequence[Request]) -> None:
        """Start the least number of workers, and wait until all are ready and fit together."""
        if self.pool is not None:
            return
        before = (recorded or {}).get("binding", {}).get("device")
        asked = self.job.options.device if self.job.options.device != "auto" else before or "auto"
        self.pool, self.least, self.most = self.make_pool(None if asked == "auto" else asked != "cpu")
        self.pool.recorded = recorded
        masks = any(row.mask is not None for row in rows)
        waiting = [next(self.names) for _ in range(self.least)]
        finder = waiting[0]  # of masks
        for name in waiting:
            self.pool.start(name, masks=masks and name == finder)
        deaths = 0
        while waiting:
            for event in self.pool.poll(POLL):
                if event.kind == "ready":
                    self._check(event.worker, event.value)
                    waiting.remove(event.worker)
                elif event.kind == "error":
                    raise event.value
                elif event.kind == "died":
                    deaths += 1
                    if deaths >= LOADS:
                        raise HostError(f"workers die while they load their networks: {event.value}")
                    self.facts.pop(event.worker, None)
                    waiting = [*(name for name in waiting if name != event.worker), next(self.names)]
                    finder = waiting[-1] if event.worker == finder else finder
                    self.pool.start(waiting[-1], masks=masks and waiting[-1] == finder)

    def config(self, recorded: dict[str, Any] | None, weights: dict[str, dict[str, str]]) -> dict[str, Any]:
        self.weights = weights
        if recorded is not None:
            return run_config(self.job, None, recorded, weights)
        for name, facts in self.facts.items():
            self._compare(name, facts)
        return next(iter(self.facts.values()))["config"]

    def masks(self, folder: Path) -> list[str]:
        for row in self.job.rows:
            if str(row.id) in self.found:
                row._found, row._empty = self.found[str(row.id)]
        return write_masks(folder, self.job.rows)

    def rescore(self, run: Run) -> int:
        if self.job.clip is None or not run.done:
            return 0
        return self._look_back(run, detect=False)

    def look_again(self, run: Run, changed: list[Result], progress: Progress) -> int:
        with Signals() as signals:
            self._look_back(run, detect=True, stopped=lambda: signals.exit_code)
        return signals.exit_code

    def draw(self, run: Run, draws: Draws, progress: Progress) -> int:
        self.pool.recorded = run.config
        self.binding = run.config["binding"]
        o = self.job.options
        left = None if o.max_total_images is None else max(0, o.max_total_images - len(run.done))
        telling = _Telling(self, run, draws, progress)
        dispatcher = Dispatcher(
            self.job.rows, run.done, self.pool, telling.listener(), self.names, self.least, self.most, left, self._cost
        )
        for line in self.notes:
            progress.message(line)
        for name, facts in self.facts.items():
            dispatcher.adopt(Hand(name, ready=True, slots=facts["slots"]))
            self.pool.open(name)
        with Signals() as signals:
            try:
                dispatcher.run(draws.until, lambda: signals.exit_code, lambda: telling.tick(dispatcher))
                if signals.exit_code:
                    progress.message("stopping: writing what is finished")
            finally:
                self.slots_full = dispatcher.slots_full
                dispatcher.finish(FINISH)
        run.fold()
        draws.settle(run.results, dispatcher.short)
        if signals.exit_code:
            saved = f"{len(run.done)} of {progress.total} images saved"
            progress.message(f"stopped with {saved}; run the same command again to continue")
        return signals.exit_code

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()

    def _cost(self, row: Request) -> float:
        assert self.job.info.geometry is not None
        return cost(row, self.job.info.geometry)

    def _check(self, name: str, facts: dict[str, Any]) -> None:
        """Record what a worker reports of itself. Raises HostError where it differs from this process."""
        self.facts[name] = facts
        self.found |= facts["masks"]
        for line in facts["notes"]:
            if not any(_plain(line) == _plain(said) for said in self.notes):
                self.notes.append(line)
        here = {"genkit": __version__, "torch": version("torch")}
        for key, value in here.items():
            if facts[key] != value:
                raise HostError(f"node {facts['host']}: {key} is {shown(facts[key])}, and {shown(value)} here")
        if self.weights is not None:
            self._compare(name, facts)

    def _compare(self, name: str, facts: Mapping[str, Any]) -> None:
        """Raise HostError for a worker with other weights, or another device or dtype, than the rest."""
        for part, files in (self.weights or {}).items():
            for file, digest in files.items():
                there = facts["weights"].get(part, {}).get(file, "absent")
                if there != digest:
                    raise HostError(
                        f"node {facts['host']}: {part}: {file} has SHA-256 {there[:12]}…, and {digest[:12]}… here"
                    )
        wanted = getattr(self, "binding", None) or next(iter(self.facts.values()))["config"]["binding"]
        for key in ("device", "dtype"):
            found = facts["config"]["binding"][key]
            if found != wanted[key]:
                raise HostError(f"node {facts['host']}: {key} is {found}, and {wanted[key]} elsewhere")

    def _look_back(self, run: Run, *, detect: bool, stopped: Callable[[], int] = lambda: 0) -> int:
        name = next(iter(self.facts))
        self.pool.look_back(name, detect)
        while not stopped():
            for event in self.pool.poll(POLL):
                if event.kind == "looked":
                    run.rescore(event.value)
                    return len(event.value)
                _raise(event)
        return 0


def _plain(line: str) -> str:
    """Return a note without its decimal numbers: notes of workers that differ only in free memory are one note."""
    return re.sub(r"[0-9]+\.[0-9]+", "#", line)


def _raise(event: Event) -> None:
    if event.kind == "error":
        raise event.value
    if event.kind == "died":
        raise HostError(f"worker {event.worker} died while it looked at earlier images: {event.value}")


class _Telling:
    """Passes the dispatcher's news on to the run and to the progress."""

    def __init__(self, crew: Workers, run: Run, draws: Draws, progress: Progress) -> None:
        self.crew, self.run, self.draws, self.progress = crew, run, draws, progress
        self.passed = passing(crew.job.rows)

    def listener(self) -> Listener:
        return Listener(self.drawn, self.progress.message, self.recorded, self.poison, self.passed, self.crew._check)

    def drawn(self, unit: Unit, images: list[tuple[int, str, bool]]) -> None:
        failed, passed = sum(status == "failed" for _, status, _ in images), sum(passed for *_, passed in images)
        total = max(self.draws.total, self.progress.done + len(images))
        self.progress.advance(failed, passed, total, len(images))

    def recorded(self, worker: str) -> Mapping[Any, Result]:
        return ended(self.run.folder, worker, DEAD)

    def poison(self, unit: Unit, why: str) -> None:
        row = self.run.rows[unit.row_id]
        there = {r.index for r in unit.earlier}
        first = next((k for k in range(row.max_images or row.num_images) if k not in there), 0)
        for index in [first] if unit.indexes is None else unit.indexes:
            seed = row.seed_of(index, self.crew.job.options.seed)
            failed = Result(unit.row_id, index, seed, "failed", why, prompt=row.plain_prompt, meta=row.meta)
            self.run.fail(failed)
            self.progress.advance(True, False, max(self.draws.total, self.progress.done + 1))
        self.progress.message(f"row {unit.row_id}: set aside: {why}")

    def tick(self, dispatcher: Dispatcher) -> None:
        full = dispatcher.slots_full
        slots = "" if full is None else f", slots {100 * full:.0f} % full"
        self.progress.about = f"{dispatcher.alive} workers{slots}"
        self.progress.show()


def ray_crew(job: Job, folder: Path, workers: tuple[int, int] | None, address: str | None) -> Workers:
    """Return workers on Ray: here, or for an address on a cluster. Raises InputError for what cannot be."""
    from genkit.cluster.raypool import RayPool, import_ray

    import_ray()

    def make(gpu: bool | None) -> tuple[Pool, int, int]:
        if address is None:
            assert workers is not None
            s = share_here(workers, gpu)
            return RayPool(_on(job, s.gpu), folder, None, s.gpu, s.most, s.threads), s.least, s.most
        pool = RayPool(job, folder, address, gpu or False, 0, 1)
        try:
            s = share_there(pool.ray, workers, gpu, address)
            pool.gpu, pool.threads = s.gpu, s.threads
            pool.job = pool.ray.put((_on(job, s.gpu), pool.folder))
            return pool, s.least, s.most
        except BaseException:
            pool.close()
            raise

    return Workers(job, folder, make)


@dataclasses.dataclass(frozen=True)
class Share:
    """What workers have: each a GPU, or so many threads of the CPU; their least and most number."""

    gpu: bool
    threads: int
    least: int
    most: int


def check_device(device: str, workers: tuple[int, int] | None, address: str | None) -> None:
    """Raise InputError for a device that many workers cannot share, and for more workers than devices."""
    if ":" in device:
        raise InputError(f"--device: {device} is one device, and each worker has its own: give {device.split(':')[0]}")
    if device == "mps":
        raise InputError("--workers: mps is one device: leave --workers away")
    if address is None and device == "cpu" and workers is not None and workers[0] > usable_cores():
        raise InputError(f"--workers: {workers[0]} is more than the {usable_cores()} cores of this machine")


def share_here(workers: tuple[int, int], gpu: bool | None) -> Share:
    """Return what each worker of this machine has; gpu: whether on GPUs, None if there are any. Raises InputError."""
    import torch

    found = torch.cuda.device_count() if gpu is not False else 0
    gpu, devices = (True, found) if found or gpu else (False, usable_cores())
    if workers[0] > devices:
        kind = "GPUs" if gpu else "cores"
        raise InputError(f"--workers: {workers[0]} is more than the {devices} {kind} of this machine")
    most = min(workers[1], devices)
    return Share(gpu, max(1, devices // most), workers[0], most)


def share_there(ray: Any, workers: tuple[int, int] | None, gpu: bool | None, address: str) -> Share:
    """Return what each worker of a cluster has, which Ray is connected to. Raises HostError for too few devices."""
    has = ray.cluster_resources()
    gpus, cores = int(has.get("GPU", 0)), int(has.get("CPU", 0))
    gpu = gpus > 0 if gpu is None else gpu
    nodes = [node for node in ray.nodes() if node["Alive"]]
    least, most = workers or ((gpus, gpus) if gpu else (len(nodes), len(nodes)))
    devices, kind = (gpus, "GPUs") if gpu else (cores, "cores")
    if least > devices or not least:
        raise HostError(f"--workers: {least} need as many {kind}; the cluster at {address} has {devices}")
    smallest = min(int(node["Resources"].get("CPU", 0)) or cores for node in nodes)
    return Share(gpu, max(1, min(smallest, cores // least)), least, most)


def _on(job: Job, gpu: bool) -> Job:
    """Return the job with its device stated."""
    options = dataclasses.replace(job.options, device="cuda" if gpu else "cpu")
    return dataclasses.replace(job, options=options)
