"""Records and embeddings on storage, where nothing can be appended to: a writer puts objects of its own, each whole.

`results-<writer>__<n>.jsonl` is put again as it grows, up to LINES lines, and then the next one begins; so are
`embeddings-<writer>__<n>.npy`. They are read like the parts of many workers, and folded like them.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from genkit.durable import json_line, read_lines
from genkit.errors import HostError
from genkit.storage import StoragePath

LINES = 256  # of a segment, about 200 kB
LINGER = 1.0  # seconds between two puts of records, unless so many wait:
WAITING = 8


def writer_name(worker: str) -> str:
    """Return a name that no writer before has had."""
    return f"{worker}_{secrets.token_hex(4)}"


class Growing:
    """An object of a writer that is put again as it grows, up to LINES pieces; then the next one begins.

    name: the beginning of the objects' names, of results or embeddings. head: what goes before so many pieces.
    """

    def __init__(self, folder: Path, name: str, suffix: str, head: Callable[[int], bytes] = lambda _: b"") -> None:
        self.folder, self.name, self.suffix, self.head = folder, name, suffix, head
        self._now: list[bytes] = []
        self._number = 0

    def add(self, pieces: Sequence[bytes]) -> None:
        """Put pieces. Raises HostError."""
        for start in range(0, len(pieces), LINES):
            some = pieces[start : start + LINES]
            if self._now and len(self._now) + len(some) > LINES:
                self.roll()
            self._now += some
            path = self.folder / f"{self.name}__{self._number:06d}{self.suffix}"
            path.write_bytes(self.head(len(self._now)) + b"".join(self._now))

    def roll(self) -> None:
        """Begin another object with the next piece."""
        self._now, self._number = [], self._number + 1


class Segments:
    """The records of one writer; thread-safe. What is appended has been put when `append` returns.

    As `durable.Journal`: while some threads wait for a put, lines of others are collected for the next.
    """

    def __init__(self, folder: StoragePath, worker: str, results: StoragePath | None = None) -> None:
        """results: the file of all records, which is made; `lines` has its contents."""
        self._growing = Growing(folder, f"results-{writer_name(worker)}", ".jsonl")
        self.path = results or folder
        self.before: list[Callable[[], None]] = []  # called before records are put; what they raise stops the writer
        self.lines: list[Any] = []
        if results is not None:
            try:
                self.lines, _ = read_lines(results)
            except FileNotFoundError:
                results.write_bytes(b"")
        self._waiting: list[bytes] = []
        self._asked = self._put = 0  # lines so far
        self._last = float("-inf")
        self._busy = False
        self._broken: Exception | None = None
        self._changed = threading.Condition()

    def append(self, values: Iterable[Any], folders: Iterable[Path] = ()) -> None:
        """Put a line for each value. Raises HostError, and so does every later call."""
        lines = [json_line(value).encode() for value in values]
        with self._changed:
            self._waiting += lines
            self._asked += len(lines)
            mine = self._asked
            while self._put < mine:
                if self._broken is not None:
                    raise HostError(str(self._broken))
                soon = self._last + LINGER - time.monotonic()
                if self._busy:
                    self._changed.wait()
                elif soon > 0 and len(self._waiting) < WAITING:
                    self._changed.wait(soon)
                else:
                    self._write()

    def _write(self) -> None:
        """Put what waits, while others may add to it."""
        batch, self._waiting, self._busy = self._waiting, [], True
        self._changed.release()
        error: Exception | None = HostError(f"{self.path}: interrupted while records were put")
        try:
            for work in self.before:
                work()
            self._growing.add(batch)
            error = None
        except (HostError, OSError) as problem:
            error = problem
        finally:
            self._changed.acquire()
            self._busy, self._last = False, time.monotonic()
            if error is None:
                self._put += len(batch)
            self._broken = self._broken or error
            self._changed.notify_all()

    def roll(self) -> None:
        """Begin another segment with the next record."""
        self._growing.roll()

    def close(self) -> None:
        """Nothing is left to do: everything appended is on storage."""
