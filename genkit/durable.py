"""Durable files: atomic writes, an append-only journal, and a lock on a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import itertools
import json
import math
import os
import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from genkit.errors import HostError
from genkit.storage import StoragePath

TEMP_PREFIX, TEMP_SUFFIX = ".tmp-", ".part"  # both, since a row may have the id ".tmp-fox"
_PROCESS = f"-{secrets.token_hex(4)}"  # processes of two machines that share a folder may have the same id
PIECE = 2000  # items serialised at a time
# Line breaks to str.splitlines and to JavaScript, though not to JSON: written as escapes so that a line stays a line.
_BREAKS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a HostError that names the file at fault, or else `path`."""
    try:
        yield
    except OSError as error:
        at_fault = error.filename2 or error.filename or path  # the second is the target of a rename
        raise HostError(f"{at_fault}: {error.strerror or error}") from error


def json_line(value: Any) -> str:
    """Return `value` as one line of JSON with its newline; NaN and infinities become null.

    The text can always be encoded: lone surrogates, as in file names that are not UTF-8, are written as escapes.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False)
    for character, escape in _BREAKS.items():
        text = text.replace(character, escape)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def json_pieces(
    value: Mapping[str, Any],
    objects: Mapping[str, Iterable[tuple[str, Any]]],
    lists: Mapping[str, Iterable[Any]] | None = None,
) -> Iterator[str]:
    """Yield in pieces the JSON of a non-empty `value` with additional members that are too large for one string.

    objects: names and values of each such object; lists: items of each such list.
    """
    yield json_line(value).strip()[:-1]
    members = [(name, dict, many) for name, many in objects.items()]
    for name, kind, many in [*members, *((name, list, many) for name, many in (lists or {}).items())]:
        opening, closing = list(json.dumps(kind()))
        yield f", {json.dumps(name)}: {opening}"
        items = iter(many)
        block = kind(itertools.islice(items, PIECE))
        while block:
            yield json_line(block).strip()[1:-1]
            block = kind(itertools.islice(items, PIECE))
            yield ", " if block else ""
        yield closing
    yield "}\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write `data`, or its pieces, atomically: a reader, or a crash, finds the old or the complete new file.

    The new name survives a power cut only after `sync_folder(path.parent)`. Raises OSError, after removing the
    temporary file if possible. On object storage the whole object is put at once.
    """
    if isinstance(path, StoragePath):
        path.write_pieces([data] if isinstance(data, bytes) else data)
        return
    temp = path.with_name(f"{TEMP_PREFIX}{path.name}.{os.getpid()}{_PROCESS}{TEMP_SUFFIX}")
    try:
        with open(temp, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise


def is_temporary(name: str) -> bool:
    """Return whether this is the name of a temporary file of `write_whole`."""
    return name.startswith(TEMP_PREFIX) and name.endswith(TEMP_SUFFIX)


def sync_folder(folder: Path) -> None:
    """Sync the directory, so that names in `folder` survive a power cut."""
    if isinstance(folder, StoragePath):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by some network file systems
            raise
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Sync a file, or a folder with everything in it, before it gets its final name. Raises OSError."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync(os.path.join(folder, name))
        sync_folder(Path(folder))
    if not path.is_dir():
        _sync(path)


def _sync(path: str | Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def lock_folder(folder: Path) -> int:
    """Lock `folder` for this process; return the file descriptor, whose closing releases the lock, as does exit.

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
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)  # for the message above
    return handle


def read_lines(path: Path) -> tuple[list[Any], int]:
    """Return the JSON values of a JSONL file (None for a damaged line) and the length in bytes of its whole lines.

    Text after the last newline is an unfinished write, and is ignored.
    """
    values: list[Any] = []
    length = 0
    for block in line_blocks(path):
        length += sum(map(len, block))
        values += _parsed(block)
    return values, length


def each_line(path: Path) -> Iterator[Any]:
    """Yield the JSON values of a JSONL file (None for a damaged line), read in blocks."""
    for block in line_blocks(path):
        yield from _parsed(block)


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file with their newlines, without one at the end that was not finished."""
    for block in line_blocks(path):
        yield from block


def each_of(data: bytes) -> Iterator[Any]:
    """Yield the JSON values of the content of a JSONL file, as `each_line` does."""
    for block in _blocks_of(io.BytesIO(data)):
        yield from _parsed(block)


def line_blocks(path: Path) -> Iterator[list[bytes]]:
    """Yield the whole lines of a file, about a megabyte at a time."""
    with path.open("rb") as file:
        yield from _blocks_of(file)


def _blocks_of(file: IO[bytes]) -> Iterator[list[bytes]]:
    while block := file.readlines(2**20):
        if not block[-1].endswith(b"\n"):
            block.pop()
        yield block


def _parsed(block: Sequence[bytes]) -> list[Any]:
    """Return the value of each line; parsed all at once if no line is damaged, which is faster."""
    try:
        values = json.loads(b"[" + b",\n".join(line.strip() for line in block) + b"]")
    except (ValueError, RecursionError):
        values = []
    if len(values) == len(block):
        return values
    return [_value(line) for line in block]


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class Journal:
    """An append-only JSONL file whose lines are on disk when `append` returns.

    Thread-safe, with group commit: while one thread waits for the disk, lines of the others are collected for the next
    write.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file and truncate a torn last line; `lines` has its contents. Raises OSError."""
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.lines, self._length = read_lines(path)
        if os.fstat(self._handle).st_size != self._length:
            os.ftruncate(self._handle, self._length)
        self._waiting: deque[tuple[bytes, set[Path]]] = deque()
        self._lock = threading.Lock()
        self._broken: OSError | None = None

    def append(self, values: Iterable[Any], folders: Iterable[Path] = ()) -> None:
        """Append a line for each value after syncing `folders`. Raises OSError, and so does every later call."""
        lines = "".join(map(json_line, values)).encode()
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
        if os.fstat(self._handle).st_nlink == 0:  # deleted meanwhile: the lines would be lost
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle, rest) :]
        os.fsync(self._handle)
        self._length += len(data)

    def close(self) -> None:
        """Close the file; everything appended is on the disk already."""
        os.close(self._handle)
