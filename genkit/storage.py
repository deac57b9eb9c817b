"""Paths on object storage, s3:// and gs:// for two, with those methods of pathlib's that a run folder needs.

An object is put whole or not at all, and is durable when it is acknowledged; there is no append, no rename, no lock.
It uses fsspec, which is imported when a path is first used. Errors that may be temporary, such as a 503, are retried
for PATIENCE seconds.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import itertools
import mimetypes
import os
import random
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PosixPath
from typing import IO, Any, TypeVar

from genkit.errors import HostError, InputError, nearest, reason

PATIENCE = 90.0  # seconds for storage that does not answer, or answers 503
FIRST = 10.0  # seconds for its first answer
INVALID = 3.0  # seconds of retries where storage calls the request invalid, as it does one that was damaged in transit
WAIT, LONGEST_WAIT = 0.2, 5.0  # seconds between tries, doubled up to the second
BLOCK = 2**23  # bytes of a read; longer objects are put from a temporary file
TOGETHER = 16  # objects read at once
DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "memory": ""}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+):/+(.*)", re.DOTALL)  # of two letters and more; pathlib makes :// to :/
# Error numbers, and names of drivers' exceptions, that another try does not mend
_LASTING = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENAMETOOLONG, getattr(errno, "EREMCHG", errno.EPERM))
_UNSOUND = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError", "DefaultCredentialsError"}  # fmt: skip  # noqa: E501
_systems: dict[tuple[int, str], Any] = {}
_opening = threading.RLock()
T = TypeVar("T")


def parsed(text: str | Path) -> Path | None:
    """Return the path that a URL names: on storage, or, of file://, here; None for text that is no URL."""
    if isinstance(text, StoragePath):
        return text
    found = _URL.fullmatch(str(text))
    if found is None:
        return None
    if found[1].lower() == "file":
        return Path("/" + found[2])
    return StoragePath(f"{found[1].lower()}://{found[2]}")


class StoragePath(PosixPath):
    """A path on storage. A `Path`, so that run folders have one type; what storage lacks raises InputError.

    Methods raise FileNotFoundError for what is absent, and HostError where storage does not answer or refuses.
    """

    def __str__(self) -> str:
        parts = self.parts
        return f"{parts[0]}//{'/'.join(parts[1:])}" if parts and parts[0].endswith(":") else "/".join(parts)

    def __fspath__(self) -> str:
        raise InputError(f"{self}: is on object storage, and only a run folder may be; give a local path")

    def __bytes__(self) -> bytes:
        return str(self).encode()

    @property
    def scheme(self) -> str:
        return self.parts[0].removesuffix(":")

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> StoragePath:
        return self

    def resolve(self, strict: bool = False) -> StoragePath:
        return self

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: on storage folders are only parts of names."""

    def is_symlink(self) -> bool:
        return False

    def entry(self) -> dict[str, Any] | None:
        """Return {"type": "file" or "directory", "size", …}, or None for what is absent."""
        try:
            return _call(self, lambda system: system.info(str(self)))
        except FileNotFoundError:
            return None

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.entry() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return (self.entry() or {}).get("type") == "file"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return (self.entry() or {}).get("type") == "directory"

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        found = self.entry()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        kind = stat.S_IFREG if found["type"] == "file" else stat.S_IFDIR
        return os.stat_result((kind | 0o644, 0, 0, 1, 0, 0, int(found["size"] or 0), 0, 0, 0))

    def lstat(self) -> os.stat_result:
        return self.stat()

    def read_bytes(self) -> bytes:
        """Return an object's content, by one request: several could find it replaced in between."""
        one = {"max_concurrency": 1} if DRIVERS.get(self.scheme) == "s3fs" else {}
        return _call(self, lambda system: system.cat_file(str(self), **one))

    def open(self, mode: str = "rb", *_: Any, **__: Any) -> Any:
        """Open for reading bytes, in blocks; a fold may meanwhile put an object that begins with the same content."""
        if mode != "rb":
            raise InputError(f"{self}: is on object storage, which writes whole objects only")
        return io.BufferedReader(_Reader(self), BLOCK)

    def write_bytes(self, data: Any) -> int:
        """Put an object, whole."""
        _call(self, lambda system: system.pipe_file(str(self), bytes(data), **self._kind()))
        return len(data)

    def put_new(self, data: bytes) -> bool:
        """Put an object unless there is one; return whether it is this one. `data` must be unique to the caller."""
        try:
            _call(self, lambda system: system.pipe_file(str(self), data, mode="create", **self._kind()))
        except (FileExistsError, HostError) as error:
            if not isinstance(error, FileExistsError) and not self.is_file():
                raise
        try:  # also where storage ignores the condition: then the last writer's object stays
            return self.read_bytes() == data
        except FileNotFoundError:
            return False

    def write_pieces(self, pieces: Iterable[bytes]) -> None:
        """Put a whole object from its pieces; one that is longer than BLOCK is put from a temporary file."""
        pieces = iter(pieces)
        start, size = [], 0
        for piece in pieces:
            start.append(piece)
            size += len(piece)
            if size > BLOCK:
                break
        else:
            self.write_bytes(b"".join(start))
            return
        with tempfile.NamedTemporaryFile(prefix="genkit-", suffix=self.suffix) as file:
            file.writelines(itertools.chain(start, pieces))
            file.flush()
            _call(self, lambda system: system.put_file(file.name, str(self)))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            _call(self, lambda system: system.rm_file(str(self)))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: Any) -> Any:
        """Copy, then delete: a crash in between leaves both."""
        _call(self, lambda system: system.cp_file(str(self), str(target)))
        self.unlink(missing_ok=True)
        return target

    def iterdir(self) -> Generator[StoragePath, None, None]:
        """Yield what lies in the folder; nothing for one that is absent."""
        for found in self.entries():
            if found["type"] == "file":
                yield self / found["name"].rpartition("/")[2]

    def glob(self, pattern: str, **_: Any) -> Generator[StoragePath, None, None]:
        """Yield the files in the folder whose names fit; a pattern of one level."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def sizes(self) -> dict[str, int]:
        """Return {name relative to this folder: bytes} of all files below it, by listing, 1,000 a request."""
        try:
            found = _call(self, lambda system: system.find(str(self), detail=True))
        except FileNotFoundError:
            return {}
        at = len("/".join(self.parts[1:])) + 1
        files = ((name.lstrip("/"), entry) for name, entry in found.items() if entry["type"] == "file")
        return {name[at:]: int(entry["size"] or 0) for name, entry in files}

    def entries(self) -> list[dict[str, Any]]:
        """Return {"name", "type", "size", …} of files and folders right in this one."""
        try:
            return _call(self, lambda system: system.ls(str(self), detail=True))
        except FileNotFoundError:
            return []

    def _kind(self) -> dict[str, str]:
        """Return the driver's argument for the object's content type, with which a bucket serves it."""
        kind = mimetypes.guess_type(self.name)[0] or "application/octet-stream"
        name = {"s3": "ContentType", "s3a": "ContentType", "gs": "content_type", "gcs": "content_type"}.get(self.scheme)
        return {} if name is None else {name: kind}


def check_storage(path: StoragePath) -> None:
    """Raise InputError or HostError if storage cannot be reached, has no such bucket, or refuses. Writes nothing."""
    if ".." in path.parts or len(path.parts) < 2 or (len(path.parts) < 3 and path.scheme != "memory"):
        raise InputError(f"{path}: is no place for a run; name a folder, as in s3://bucket/run")
    bucket = StoragePath(f"{path.parts[0]}//{path.parts[1]}")
    try:
        if path.scheme != "memory":
            _call(bucket, lambda system: system.info(str(bucket)), FIRST)
        _call(path, lambda system: system.ls(str(path), detail=False), FIRST)
    except FileNotFoundError:
        if path.scheme != "memory" and bucket.entry() is None:
            raise InputError(f"{bucket}: no such bucket") from None


def check_writable(path: StoragePath) -> None:
    """Raise HostError unless objects can be put in a folder and deleted again."""
    probe = path / f".tmp-{os.urandom(6).hex()}.part"
    try:
        _call(probe, lambda system: system.pipe_file(str(probe), b"genkit"), FIRST)
        probe.unlink(missing_ok=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such bucket") from None


def contents(paths: Sequence[StoragePath]) -> Iterator[bytes]:
    """Yield the contents of objects, some of which are read ahead."""
    with ThreadPoolExecutor(TOGETHER, "genkit-read") as pool:
        for start in range(0, len(paths), 4 * TOGETHER):
            yield from pool.map(StoragePath.read_bytes, paths[start : start + 4 * TOGETHER])


def remove(paths: Sequence[Path]) -> None:
    """Delete objects, those that are there."""
    with ThreadPoolExecutor(TOGETHER, "genkit-delete") as pool:
        list(pool.map(lambda path: path.unlink(missing_ok=True), paths))


def file_of(path: Path) -> IO[bytes]:
    """Return a local file, open for reading: a local path's own, or a nameless copy of an object."""
    if not isinstance(path, StoragePath):
        return open(path, "rb")
    file = tempfile.TemporaryFile(prefix="genkit-")  # noqa: SIM115
    with path.open("rb") as source:
        shutil.copyfileobj(source, file, BLOCK)
    file.flush()
    file.seek(0)
    return file


class _Reader(io.RawIOBase):
    """An object as a file that is read in ranges; each read is retried like any other call."""

    def __init__(self, path: StoragePath) -> None:
        self.path, self.at, self.size = path, 0, path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        data = _call(self.path, lambda system: system.cat_file(str(self.path), start=self.at, end=end))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def _call(path: StoragePath, work: Callable[[Any], T], patience: float | None = None) -> T:
    """Return work(file system), with temporary errors retried for `patience` seconds, PATIENCE by default.

    Raises FileNotFoundError and FileExistsError; InputError for a driver that is missing; HostError for the rest.
    """
    began, wait = time.monotonic(), WAIT
    while True:
        try:
            return work(_system(path))
        except (FileNotFoundError, FileExistsError, InputError):
            raise
        except Exception as error:  # a driver's own kinds, too
            number = getattr(error, "errno", None)
            if isinstance(error, PermissionError | NotImplementedError) or number in _LASTING:
                raise HostError(f"{path}: not allowed: {reason(error)}") from None
            if type(error).__name__ in _UNSOUND or isinstance(error, TypeError):
                raise HostError(f"{path}: {reason(error)}") from None
            limit = INVALID if number == errno.EINVAL else PATIENCE if patience is None else patience
            if time.monotonic() + wait - began > limit:
                spent = "" if number == errno.EINVAL else f"no answer for {time.monotonic() - began:.0f} s; last: "
                raise HostError(f"{path}: {spent}{reason(error)}; run the same command again to continue") from None
        time.sleep(wait * (0.5 + random.random() / 2))
        wait = min(2 * wait, LONGEST_WAIT)


def _system(path: StoragePath) -> Any:
    """Return fsspec's file system for a path, one for each process: connections do not survive a fork."""
    key = os.getpid(), path.scheme
    with _opening:
        if key not in _systems:
            _systems[key] = _opened(path)
        return _systems[key]


def _opened(path: StoragePath) -> Any:
    scheme = path.scheme
    try:
        import fsspec
        from fsspec.config import conf
    except ImportError:
        raise InputError(f"{path}: needs fsspec: pip install 'genkit-diffusion[storage]'") from None
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if DRIVERS.get(scheme) == "s3fs":  # one try a call, since calls are tried again here
        asked = conf.get("s3", {}).get("config_kwargs", {})
        once = {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = {**once, "max_pool_connections": 64, **asked}
    try:
        if scheme not in DRIVERS and scheme not in fsspec.available_protocols():
            raise ValueError
        if scheme in ("http", "https", "local"):
            raise ValueError
        system = fsspec.filesystem(scheme, **options)
        if DRIVERS.get(scheme) == "s3fs":
            system.retries = 1
        return system
    except ImportError:
        package = DRIVERS.get(scheme) or "its driver for fsspec"
        extra = "'genkit-diffusion[storage]'" if package == "s3fs" else package
        raise InputError(f"{path}: needs {package}: pip install {extra}") from None
    except ValueError:
        known = ", ".join(f"{name}://" for name in DRIVERS)
        close = nearest(scheme, DRIVERS)
        raise InputError(f"{path}: no runs on {scheme}://{close}; known: {known}; ./{scheme}:/ is a folder") from None
