"""A CSV file of choices in a run folder, held by one process: a choice is on the disk when `add` returns."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from genkit.durable import disk, sync_folder, write_whole
from genkit.errors import HostError
from genkit.runs.lease import Lease
from genkit.selection.votes import header
from genkit.storage import StoragePath


class Ballots:
    """A file of choices on a local disk.

    columns: genkit's own, of which the last holds a picture's SHA-256. None holds text of the user's that a spreadsheet
    might take for a formula. Raises HostError when another process has the file.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        with disk(path):
            if not path.exists():
                write_whole(path, (",".join(columns) + "\n").encode())
                sync_folder(path.parent)
            self._handle = os.open(path, os.O_RDWR | os.O_APPEND)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._handle)
                raise HostError(f"{path}: another `genkit label` holds it; one at a time") from None
            self._mend(columns)

    def _mend(self, columns: Sequence[str]) -> None:
        """Cut off a last line of genkit's own that a power cut tore; end any other that has no line break.

        In a file with other columns an editor left the line so: it is the user's. Of lines that were added together,
        those before the torn one stay: who adds them orders them so that the first few alone mislead nobody.
        """
        data = self.path.read_bytes()
        if data.endswith(b"\n") or not data:
            return
        whole = re.compile(rb"[^,]*," * (len(columns) - 1) + rb"(?:[0-9a-f]{64})?\s*")
        first, last = data.split(b"\n", 1)[0].strip(), data.rfind(b"\n") + 1
        if first == ",".join(columns).encode() and last and not whole.fullmatch(data, last):
            os.ftruncate(self._handle, last)
        else:
            os.write(self._handle, b"\n")

    @functools.cached_property
    def _columns(self) -> list[str]:
        return header(self.path)

    def add(self, lines: Iterable[Mapping[str, str]]) -> None:
        """Add lines, given by column, in one write; columns of the user's own stay empty. Raises HostError."""
        text = "".join(",".join(cells.get(column, "") for column in self._columns) + "\n" for cells in lines)
        with disk(self.path):
            if text:
                self._append(text.encode())

    def _append(self, data: bytes) -> None:
        size = os.fstat(self._handle).st_size
        try:
            if os.write(self._handle, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._handle)
        except OSError:
            os.ftruncate(self._handle, size)
            raise

    def close(self) -> None:
        """Let another process have the file."""
        os.close(self._handle)


class StoredBallots(Ballots):
    """The same for a run on storage: the whole file is put again with each choice."""

    def __init__(self, path: StoragePath, columns: Sequence[str]) -> None:
        self.path, self._lease = path, Lease(path.parent / "label")
        try:
            if not path.exists():
                write_whole(path, (",".join(columns) + "\n").encode())
            self._text = path.read_bytes()
        except BaseException:
            self._lease.close()
            raise

    def _append(self, data: bytes) -> None:
        self._lease.check()
        self.path.write_bytes(self._text + (b"" if self._text.endswith(b"\n") else b"\n") + data)
        self._text = self.path.read_bytes()

    def close(self) -> None:
        self._lease.close()


@contextlib.contextmanager
def held(path: Path, columns: Sequence[str]) -> Iterator[Ballots]:
    """Hold a file of choices, made if there is none, for the time of the block. Raises HostError."""
    ballots = StoredBallots(path, columns) if isinstance(path, StoragePath) else Ballots(path, columns)
    try:
        yield ballots
    finally:
        ballots.close()
