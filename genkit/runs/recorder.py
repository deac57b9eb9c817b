"""What writes into a run folder: pictures, whole, and then the line of each in a journal."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from genkit.durable import Journal, disk, sync_folder, write_whole
from genkit.errors import HostError
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.records import Key, part_of
from genkit.runs.segments import Segments
from genkit.storage import StoragePath

BLOCK = 1000  # rows in a subfolder of images/, in a run of more rows than that


class Recorder:
    """Saves pictures of `rows` in `folder` and appends their records to a journal; thread-safe.

    rows: by id; results: the newest record of each of their images; done: those that need no drawing.
    """

    _journal: Journal | Segments

    def __init__(self, folder: Path, rows: Sequence[Request]) -> None:
        self.folder = folder
        self.rows = {str(row.id): row for row in rows}
        self._place = {row_id: n for n, row_id in enumerate(self.rows)}
        self._fingerprints: dict[str, str] = {}
        self.results: dict[Key, Result] = {}
        self.done: dict[Key, Result] = {}

    def path_for(self, row_id: str, index: int, suffix: str = ".png") -> Path:
        """Return the path of image `index` of a row; it depends only on the rows."""
        block = f"{self._place[row_id] // BLOCK:03d}" if len(self.rows) > BLOCK else ""
        return self.folder / "images" / block / f"{row_id}-{index:02d}{suffix}"

    def blocks(self) -> list[str]:
        """Return the subfolders of images/ that `path_for` uses, images/ itself ("") first."""
        count = -(-len(self.rows) // BLOCK) if len(self.rows) > BLOCK else 0
        return ["", *(f"{n:03d}" for n in range(count))]

    def save(self, result: Result, data: bytes, suffix: str = ".png") -> None:
        """Save a finished image: `data` in its file, then its record with the file's name, size and SHA-256.

        Both are on disk on return. Raises HostError if the disk is full, read-only or gone; no file or line is torn.
        """
        key = result.id, result.index
        if key in self.done:
            raise ValueError(f"image {result.index} of row {result.id} is saved already")
        path = self.path_for(*key, suffix)
        result.file = path.relative_to(self.folder).as_posix()
        result.bytes, result.sha256 = len(data), hashlib.sha256(data).hexdigest()
        with disk(path):
            write_whole(path, data)
        self._record(result, path.parent)

    def fail(self, result: Result) -> None:
        """Record an image that failed (tried again on resume) or was pruned (not tried again). Raises HostError."""
        self._record(result)

    def first(self, work: Callable[[], None]) -> None:
        """Call `work` before records are put on storage; in a local folder the caller keeps the order."""
        if isinstance(self._journal, Segments):
            self._journal.before.append(work)

    def fingerprint(self, row_id: str) -> str:
        """Return `Request.fingerprint` of a row, which reads its input files, computed once."""
        found = self._fingerprints.get(row_id)
        if found is None:
            found = self._fingerprints[row_id] = self.rows[row_id].fingerprint()
        return found

    def _record(self, result: Result, *folders: Path) -> None:
        result.fingerprint = self.fingerprint(result.id)
        with disk(self._journal.path):
            self._journal.append([result.to_json()], folders)
        self._count(dataclasses.replace(result, pixels=None, embedding=None))

    def _count(self, result: Result) -> None:
        key = result.id, result.index
        self.results[key] = result
        if result.status in ("done", "pruned"):
            self.done[key] = result


class Part(Recorder):
    """One of many writers of a run that another process opened and holds; a context manager.

    Its records are in `part_of(folder, worker)`, which it locks: `fold` waits until the writer has ended. On storage
    they are in segments without a lock: a segment that is put after a fold is taken in by the next fold.
    """

    def __init__(self, folder: Path, rows: Sequence[Request], worker: str) -> None:
        """Begin the part of `worker`, a name that no part has. Raises HostError."""
        super().__init__(folder, rows)
        self.worker = worker
        self._lock: int | None = None
        if isinstance(folder, StoragePath):
            self._journal = Segments(folder, worker)
            return
        path = part_of(folder, worker)
        with disk(path):
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                if not lock_part(self._lock):  # a fold has locked it first
                    raise HostError(f"{path}: is taken")
                self._journal = Journal(path)
                sync_folder(folder)
            except BaseException:
                os.close(self._lock)
                raise

    def close(self) -> None:
        """Release the part. Everything saved is on disk already."""
        self._journal.close()
        if self._lock is not None:
            os.close(self._lock)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock_part(handle: int) -> bool:
    """Lock the open file of a part until it is closed; False if its writer still holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
