"""The messages between driver and workers: units of work, and what became of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.records import Key


@dataclasses.dataclass
class Unit:
    """Work that stays in one worker: images of a row or, if what is drawn next depends on results, the whole row.

    number: its name. indexes: the images; None for a whole row, of which at most `most` new images are drawn (None: as
    many as it wants) and `earlier` are there. deaths: of workers that it was handed to.
    """

    number: int
    row_id: str
    indexes: list[int] | None
    most: int | None = None
    earlier: list[Result] = dataclasses.field(default_factory=list)
    deaths: int = 0

    @property
    def images(self) -> int:
        """Images that it probably takes."""
        return 1 if self.indexes is None else len(self.indexes)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a worker did of a unit: (image number, status, whether it passes) of each image that it recorded."""

    number: int
    images: list[tuple[int, str, bool]]


@dataclasses.dataclass(frozen=True)
class Given:
    """What a worker gives back of a unit that it had not begun: images, or None for a whole row."""

    number: int
    indexes: list[int] | None


@dataclasses.dataclass(frozen=True)
class Event:
    """News of a worker.

    kind: "ready" (value: what it says of itself, a dict), "drawn" (a list of Drawn), "given" (a list of Given), "died"
    (the reason, a text), "error" (an exception that ends the job), or "ended", after `finish`.
    """

    kind: str
    worker: str
    value: Any = None
    notes: tuple[str, ...] = ()
    slots_full: tuple[float, float] = (0.0, 0.0)  # so far: slots in use and slots, as `Engine.use` has them


class Pool(Protocol):
    """Workers somewhere. Nothing waits but `poll`; a worker that died takes no more orders."""

    def start(self, worker: str, *, masks: bool = False) -> None:
        """Begin a worker, which is "ready" once its networks are loaded. masks: it finds those of all rows first."""

    def open(self, worker: str) -> None:
        """Let a worker that is ready begin its part of the run folder, which the driver has opened by now."""

    def send(self, worker: str, units: list[Unit]) -> None:
        """Hand units to a worker, which are "drawn" once all are finished or given back."""

    def recall(self, worker: str) -> None:
        """Ask a worker for half of what it has not begun."""

    def halt(self, worker: str) -> None:
        """Let a worker begin nothing more."""

    def finish(self, worker: str) -> None:
        """Let a worker write what is finished, and end."""

    def kill(self, worker: str) -> None:
        """End a worker at once."""

    def poll(self, seconds: float) -> list[Event]:
        """Return what happened; wait for it so long. Raises HostError when all workers are lost for good."""

    def close(self) -> None:
        """End all workers."""


def is_whole(row: Request) -> bool:
    """Whether what is drawn of a row depends on its own results: its images stay together."""
    return row.max_images is not None or row.prune is not None


def units_of(row: Request, done: Mapping[Key, Result], size: int, numbers: Iterator[int]) -> Iterator[Unit]:
    """Yield what is to be drawn of a row, in units of at most `size` images. done: what is there."""
    row_id = str(row.id)
    if is_whole(row):
        keys = ((row_id, k) for k in range(row.max_images or row.num_images))
        earlier = [done[key] for key in keys if key in done]
        yield Unit(next(numbers), row_id, None, earlier=earlier)
        return
    missing = [k for k in range(row.num_images) if (row_id, k) not in done]
    for start in range(0, len(missing), size):
        yield Unit(next(numbers), row_id, missing[start : start + size])
