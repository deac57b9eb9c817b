"""Read untrusted files: regular files only, limited in size, strict JSON."""

from __future__ import annotations

import errno
import json
import os
import shlex
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from genkit.errors import InputError, shown
from genkit.storage import StoragePath, parsed

DIGITS = 40  # of an integer; transformers writes 10**30 for "no limit"
JSON_LIMIT = 2**20  # bytes of a config; real ones have a few thousand


def place(path: Path | str) -> str:
    """Return a path for a one-line message, with control characters and surrogates escaped."""
    return repr(str(path))[1:-1].encode("utf-8", "backslashreplace").decode()


def user_path(text: str | Path) -> Path:
    """Return a path as a user gives it, with ~ and $HOME resolved."""
    return Path(os.path.expanduser(os.path.expandvars(text)))


def run_path(text: str | Path) -> Path:
    """Return `user_path`, or what a URL names: a run folder may lie on storage, as at s3://bucket/run."""
    return parsed(text) or user_path(text)


def names_in(folder: Path) -> list[str]:
    """Return the names of the files in a folder. Raises OSError."""
    return [path.name for path in folder.iterdir()] if isinstance(folder, StoragePath) else os.listdir(folder)


def there(folder: Path, paths: Iterable[Path]) -> Iterator[Path]:
    """Yield those of `paths`, which are below `folder`, that are files; storage is listed once."""
    if isinstance(folder, StoragePath):
        names = folder.sizes().keys()
        yield from (path for path in paths if path.relative_to(folder).as_posix() in names)
    else:
        yield from (path for path in paths if path.is_file())


def local(path: Path | None, option: str = "--out") -> None:
    """Raise InputError for a path on storage where only a local one can be written."""
    if isinstance(path, StoragePath):
        raise InputError(f"{option}: {path} is on object storage; this is written to a local path")


def refuse_pointer(start: bytes, path: Path | str) -> None:
    """Raise InputError if a file that begins with `start` is a Git LFS pointer, the placeholder of a large file."""
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        folder = shlex.quote(os.path.dirname(path) or ".")
        raise InputError(f"{place(path)}: is a Git LFS pointer, not the file: `git -C {folder} lfs pull` fetches it")


def file_size(path: Path) -> int:
    """Return the bytes of a regular, readable file; links are followed. Raises InputError for anything else."""
    if isinstance(path, StoragePath):
        if not path.is_file():
            raise InputError(f"{place(path)}: is absent")
        return path.stat().st_size
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{place(path)}: is absent") from None
    except OSError as error:
        reason = (
            "is a link that leads back to itself" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        )
        raise InputError(f"{place(path)}: {reason}") from None
    except ValueError:
        raise InputError(f"{shown(str(path))}: is no path") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise InputError(f"{place(path)}: is {kind}, not a file")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise InputError(f"{place(path)}: cannot be read: permission denied")
    return status.st_size


def read_text(path: Path, limit: int = JSON_LIMIT) -> str:
    """Return the UTF-8 text of a file of 1 to `limit` bytes. Raises InputError naming the file."""
    size = file_size(path)
    if size == 0:
        raise InputError(f"{place(path)}: is empty")
    if size > limit:
        raise InputError(f"{place(path)}: has {size} bytes, more than the {limit} that such a file may have")
    with path.open("rb") as file:
        data = file.read(limit + 1)  # the file may have grown
    refuse_pointer(data[:64], path)
    try:
        return data[:limit].removeprefix(b"\xef\xbb\xbf").decode("utf-8")  # a mark of Windows editors
    except UnicodeDecodeError as error:
        raise InputError(f"{place(path)}: byte {error.start} is not UTF-8") from None


def read_json(path: Path, limit: int = JSON_LIMIT, infinite: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file. Raises InputError for what `parse_json` refuses."""
    return parse_json(read_text(path, limit), place(path), infinite)


def parse_json(text: str, where: str, infinite: bool = False, gaps: bool = False) -> dict[str, Any]:
    """Return the object that strict JSON `text` holds.

    Raises InputError, naming `where`, for comments, repeated keys, NaN and infinities, too deep nesting, and
    anything but an object at the top. infinite: allow Infinity and -Infinity, as Python's json writes them. gaps: allow
    NaN, as Python's json writes missing values of a table.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for i, name in enumerate(names) if name in names[:i])
            raise InputError(f"{where}: {shown(repeated)}: key is given twice")
        return found

    def number(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise InputError(f"{where}: {shown(digits)}: number is too large")
        return value

    def integer(digits: str) -> int:
        if len(digits) > DIGITS:
            raise InputError(f"{where}: a number has {len(digits)} digits")
        return int(digits)

    def constant(word: str) -> float:
        if gaps if word == "NaN" else infinite:
            return float(word)
        raise InputError(f"{where}: {word} is not JSON")

    try:
        found = json.loads(text, object_pairs_hook=once, parse_int=integer, parse_float=number, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: line {error.lineno} column {error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{where}: is nested too deeply") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: holds {shown(found)}, not a JSON object")
    return found


def read_utf8(path: Path, limit: int) -> str:
    """Return the text of a file, read once, with lines that end in \\n.

    Raises InputError, naming file and line, for a file larger than `limit` bytes, changed while it is read, not UTF-8,
    empty, or with NUL bytes or lone carriage returns.
    """
    name = place(path)
    data = _bytes(path, name, limit)
    refuse_pointer(data[:64], path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{name}: is UTF-16; save it as UTF-8")
    data = data.removeprefix(b"\xef\xbb\xbf")  # byte order mark of Windows editors
    if b"\0" in data:
        raise InputError(f"{name}:{_line_of(data, data.index(0))}: holds a NUL byte; UTF-16? save it as UTF-8")
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}:{_line_of(data, error.start)}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    if "\r" in text:
        line = text.count("\n", 0, text.index("\r")) + 1
        raise InputError(f"{name}:{line}: holds a carriage return without a newline; end lines with \\n or \\r\\n")
    if not text.strip(" \t\n"):
        raise InputError(f"{name}: is empty")
    return text


def _bytes(path: Path, name: str, limit: int) -> bytes:
    if file_size(path) > limit:
        raise InputError(f"{name}: has more than {limit >> 20} MiB; split it")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # O_NONBLOCK: do not wait if it has become a pipe
        with open(handle, "rb") as file:
            size = os.fstat(handle).st_size
            data = file.read(limit + 1)
            if not len(data) == size == os.fstat(handle).st_size:
                raise InputError(f"{name}: changed while it was read; try again when it is whole")
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    return data


def _line_of(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1
