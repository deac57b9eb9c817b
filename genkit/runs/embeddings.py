"""The CLIP image embeddings of a run: embeddings.npy, one record an image, appended as pictures are saved.

A structured .npy file: id, index and sha256 of the picture, and its unit vector in float16. It is a cache that
`genkit score` can rebuild, so records are written to the kernel when `add` returns (a killed process loses none) but
not synced to disk. Records beyond the count in the header are read, too; a torn one at the end is not.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from genkit.durable import disk, write_whole
from genkit.errors import HostError, InputError
from genkit.rows.result import Result
from genkit.runs.records import Key, read_results
from genkit.runs.segments import Growing, writer_name
from genkit.storage import StoragePath, file_of

EMBEDDINGS = "embeddings.npy"
PARTS = "embeddings-*.npy"  # of the workers of a run that many draw
RECENT = 1024  # newest records whose vectors are checked: a power cut may have left zeros
EVERY = 64  # records between two updates of the header's count


def read_embeddings(folder: Path, results: Iterable[Result] | None = None) -> tuple[dict[Key, int], np.ndarray]:
    """Return {(row id, image number): row}, and the memory-mapped array (n, width) float16 with these rows.

    Unit CLIP embeddings of the images whose newest record is done and has the picture's SHA-256. results: the run's
    records, if read already. Empty if a run has no embeddings. Raises InputError for a file of another kind.
    """
    records = _together(folder)
    if not len(records):
        return {}, np.empty((0, 0), np.float16)
    done = {
        (r.id, r.index): r.sha256
        for r in (read_results(folder) if results is None else results)
        if r.status == "done" and r.sha256
    }
    ids, numbers, hashes = (records[name].tolist() for name in ("id", "index", "sha256"))
    unsound = set(_unsound(records))
    found: dict[Key, int] = {}
    for row, (row_id, number, digest) in enumerate(zip(ids, numbers, hashes, strict=True)):
        key = row_id.decode("ascii", "replace"), number
        if row not in unsound and done.get(key) == digest.decode("ascii", "replace"):
            found[key] = row
    return found, records["vector"]


def fold_embeddings(folder: Path) -> list[Path]:
    """Append the embeddings of all workers to the run's; return the workers' files, which are needed no more.

    Raises InputError for a file of another kind.
    """
    paths = sorted(folder.glob(PARTS))
    if isinstance(folder, StoragePath):
        _put_together(folder, paths)
        return paths
    for path in paths:
        records, _ = _records(path)
        if len(records):
            with Store(folder, records.dtype["vector"].shape[0]) as store:
                store.extend(records)
    return paths


def by_content(folder: Path) -> tuple[dict[str, int], np.ndarray]:
    """Return {SHA-256 of a picture: row}, and the memory-mapped array (n, width) float16 with these rows.

    Empty if there are none. Raises InputError for a file of another kind.
    """
    records, _ = _records(folder / EMBEDDINGS)
    if not len(records):
        return {}, np.empty((0, 0), np.float16)
    unsound = set(_unsound(records))
    rows = {digest.decode("ascii", "replace"): row for row, digest in enumerate(records["sha256"].tolist())}
    return {digest: row for digest, row in rows.items() if row not in unsound}, records["vector"]


class Store:
    """The embeddings of a locked run, open for appending; thread-safe. A context manager."""

    def __new__(cls, folder: Path, width: int, worker: str | None = None) -> Store:
        """Return one for a local folder, or for one on storage."""
        return object.__new__(StorageStore if isinstance(folder, StoragePath) else cls)

    def __init__(self, folder: Path, width: int, worker: str | None = None) -> None:
        """Open or create the file and truncate a torn record. Raises InputError for another kind of file or width.

        worker: one of many, whose embeddings are in a file of its own.
        """
        self.path = folder / (EMBEDDINGS if worker is None else f"embeddings-{worker}.npy")
        self.dtype = _dtype(width)
        with disk(self.path):
            if not self.path.exists():
                write_whole(self.path, _header(self.dtype, 0))
            records, self._start = _records(self.path)
            self._check(records.dtype, width)
            self.count = len(records)
            self._handle = os.open(self.path, os.O_RDWR)
            os.ftruncate(self._handle, self._end)
        self._lock = threading.Lock()

    def _check(self, found: np.dtype[Any], width: int) -> None:
        if found != self.dtype:
            there = found["vector"].shape[0]
            raise InputError(f"{self.path}: holds embeddings {there} wide, not {width}; move it away")

    @property
    def _end(self) -> int:
        return self._start + self.count * self.dtype.itemsize

    def add(self, row_id: str, index: int, sha256: str, vector: np.ndarray) -> None:
        """Append the unit vector (width,) of a picture. Raises HostError when the disk is full."""
        data = np.array([(row_id.encode(), index, sha256.encode(), vector)], self.dtype).tobytes()
        with self._lock, disk(self.path):
            try:
                written = os.pwrite(self._handle, data, self._end)
                if written < len(data):
                    os.pwrite(self._handle, data[written:], self._end + written)
            except OSError:
                os.ftruncate(self._handle, self._end)
                raise
            self.count += 1
            if self.count % EVERY == 0:
                os.pwrite(self._handle, _header(self.dtype, self.count), 0)

    def extend(self, records: np.ndarray) -> None:
        """Append the records of another file. Raises HostError."""
        with self._lock, disk(self.path):
            for start in range(0, len(records), RECENT):
                piece, at = records[start : start + RECENT], self._end
                data = memoryview(piece.tobytes())
                while data:
                    written = os.pwrite(self._handle, data, at)
                    data, at = data[written:], at + written
                self.count += len(piece)

    def flush(self) -> None:
        """Put what was added, on storage; a local file has it already."""

    def close(self) -> None:
        """Write the count, sync, and close."""
        with self._lock, disk(self.path):
            os.pwrite(self._handle, _header(self.dtype, self.count), 0)
            os.fsync(self._handle)
            os.close(self._handle)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StorageStore(Store):
    """The embeddings of one writer of a run on storage: objects that are put again as they grow up to LINES records."""

    def __init__(self, folder: Path, width: int, worker: str | None = None) -> None:
        """Begin. Raises InputError where the run has embeddings of another width."""
        self.path, self.dtype, self.count = folder / EMBEDDINGS, _dtype(width), 0
        name = f"embeddings-{writer_name(worker or 'run')}"
        self._growing = Growing(folder, name, ".npy", lambda count: _header(self.dtype, count))
        if self.path.is_file():
            with self.path.open("rb") as file:
                self._check(_dtype_of(self.path, file), width)
        self._new: list[bytes] = []
        self._lock, self._adding = threading.Lock(), threading.Lock()

    def add(self, row_id: str, index: int, sha256: str, vector: np.ndarray) -> None:
        """Have the unit vector (width,) of a picture put by the next `flush`."""
        data = np.array([(row_id.encode(), index, sha256.encode(), vector)], self.dtype).tobytes()
        with self._adding:
            self._new.append(data)
            self.count += 1

    def extend(self, records: np.ndarray) -> None:
        """Have records put by the next `flush`."""
        with self._adding:
            self._new += [record.tobytes() for record in records]

    def flush(self) -> None:
        """Put what was added. Raises HostError."""
        with self._lock:
            with self._adding:
                new, self._new = self._new, []
            self._growing.add(new)

    def close(self) -> None:
        """Put what was added."""
        self.flush()


def _put_together(folder: Path, paths: list[Path]) -> None:
    """Put embeddings.npy with the records of `paths` after its own."""
    parts = [records for path in paths if len(records := _records(path)[0])]
    if not parts:
        return
    before, _ = _records(folder / EMBEDDINGS)
    every = [before, *parts] if len(before) else parts
    every = [records for records in every if records.dtype == every[0].dtype]
    pieces = (
        records[start : start + RECENT].tobytes() for records in every for start in range(0, len(records), RECENT)
    )
    write_whole(folder / EMBEDDINGS, itertools.chain([_header(every[0].dtype, sum(map(len, every)))], pieces))


def _dtype(width: int) -> np.dtype[Any]:
    return np.dtype([("id", "S100"), ("index", "<u4"), ("sha256", "S64"), ("vector", "<f2", (width,))])


def _header(dtype: np.dtype[Any], count: int) -> bytes:
    """Return the .npy header. numpy pads it for any count, so its length never changes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    )
    return file.getvalue()


def _records(path: Path) -> tuple[np.ndarray, int]:
    """Return the complete records of the file, memory-mapped, and the offset of the first."""
    if not path.is_file():
        return np.empty(0, _dtype(0)), 0
    with disk(path), file_of(path) as file:
        dtype = _dtype_of(path, file)
        start = file.tell()
        count = (os.fstat(file.fileno()).st_size - start) // dtype.itemsize
        return (np.memmap(file, dtype, "r", start, (count,)) if count else np.empty(0, dtype)), start


def _dtype_of(path: Path, file: IO[bytes]) -> np.dtype[Any]:
    """Return the type of the records, of which the first follows in the file."""
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError
        dtype: np.dtype[Any] = np.lib.format.read_array_header_1_0(file)[2]
        if dtype.names != _dtype(0).names or dtype != _dtype(dtype["vector"].shape[0]):
            raise ValueError
    except (ValueError, IndexError, KeyError, TypeError):
        raise InputError(f"{path}: holds no embeddings of a run; move it away") from None
    return dtype


def _together(folder: Path) -> np.ndarray:
    """Return the records of a run: memory-mapped, or, while workers' files are not folded yet, in memory."""
    found = [_records(folder / EMBEDDINGS)[0]]
    for path in sorted(folder.glob(PARTS)):
        with contextlib.suppress(HostError):  # folded meanwhile
            found.append(_records(path)[0])
    found = [records for records in found if len(records)] or found[:1]
    if len(found) == 1:
        return found[0]
    return np.concatenate([records for records in found if records.dtype == found[0].dtype])


def _unsound(records: np.ndarray) -> list[int]:
    """Return the numbers of the newest records that do not hold a unit vector."""
    first = max(0, len(records) - RECENT)
    lengths = np.linalg.norm(records["vector"][first:].astype(np.float32), axis=1)
    return (first + np.flatnonzero(~(abs(lengths - 1) < 0.01))).tolist()
