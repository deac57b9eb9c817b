"""Files that are whole or not there, lines that are never lost, and a folder that one process holds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from genkit.errors import HostError

TEMP_PREFIX, TEMP_SUFFIX = ".tmp-", ".part"  # both, since a row may be called ".tmp-fox": finished names end otherwise
# Line breaks to str.splitlines and to JavaScript, though not to JSON: written as escapes so that a line stays a line.
_BREAKS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a HostError that names the file at fault, or else `path`."""
    try:
        yield
    except OSError as error:
        raise HostError(f"{error.filename or path}: {error.strerror or error}") from error


def json_line(value: Any) -> str:
    """Return `value` as JSON on one line, its newline included; NaN and infinities, which JSON lacks, become null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False)
    for character, escape in _BREAKS.items():
        text = text.replace(character, escape)
    return text + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash at any moment, finds the old content or all of the new.

    The name itself is safe from a power cut only after `sync_folder(path.parent)`. Raises OSError; the temporary file
    is then removed where the disk allows it.
    """
    temp = path.with_name(f"{TEMP_PREFIX}{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        with open(temp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise


def is_temporary(name: str) -> bool:
    """Return whether a file of this name is what a killed `write_whole` leaves."""
    return name.startswith(TEMP_PREFIX) and name.endswith(TEMP_SUFFIX)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and say so
            raise
    finally:
        os.close(handle)


def lock_folder(folder: Path) -> int:
    """Take `folder` for this process; return the handle whose closing, or the process's death, gives it back.

    Raises HostError at once when another process holds it.
    """
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 20).decode("ascii", "replace").strip()
        os.close(handle)
        raise HostError(f"{folder}: in use by another genkit (process {holder or 'unknown'}); one at a time") from None
    except OSError:
        os.close(handle)
        raise
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)  # for the message above; the lock is flock's
    return handle


def read_lines(path: Path) -> tuple[list[Any], int]:
    """Return the JSON values of a JSONL file (None for a damaged line) and the length in bytes of its whole lines.

    What follows the last newline is a write that never finished, and is left out.
    """
    values: list[Any] = []
    length = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            length += len(line)
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError):
                values.append(None)
    return values, length


class Journal:
    """An append-only JSONL file whose lines are on the disk when `append` returns.

    Threads share it: while one waits for the disk, the lines of the others gather and go in one write (group commit).
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file and cut a torn last line off; `lines` holds what is there. Raises OSError."""
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.lines, self._length = read_lines(path)
        if os.fstat(self._handle).st_size != self._length:
            os.ftruncate(self._handle, self._length)
        self._waiting: deque[tuple[bytes, set[Path]]] = deque()
        self._lock = threading.Lock()
        self._broken: OSError | None = None

    def append(self, values: Iterable[Any], folders: Iterable[Path] = ()) -> None:
        """Add a line for each value once the names in `folders` are safe. Raises OSError, and ever after."""
        lines = "".join(map(json_line, values)).encode("utf-8", "backslashreplace")
        self._waiting.append((lines, set(folders)))
        with self._lock:
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if self._broken is None and batch:
                try:
                    self._write(b"".join(lines for lines, _ in batch), set().union(*(names for _, names in batch)))
                except OSError as error:
                    self._broken = error
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._handle, self._length)
            if self._broken is not None:
                raise self._broken

    def _write(self, data: bytes, folders: set[Path]) -> None:
        for folder in folders:
            sync_folder(folder)
        if os.fstat(self._handle).st_nlink == 0:  # deleted under us: the lines would go nowhere
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle, rest) :]
        os.fsync(self._handle)
        self._length += len(data)

    def close(self) -> None:
        """Close the file; everything appended is on the disk already."""
        os.close(self._handle)
