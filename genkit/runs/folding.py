"""Fold the parts that many writers left of a run into the files that one writer has."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from genkit.durable import Journal, disk, sync_folder
from genkit.errors import HostError
from genkit.rows.result import Result
from genkit.runs.embeddings import fold_embeddings
from genkit.runs.gather import gather
from genkit.runs.recorder import lock_part
from genkit.runs.records import Key, part_of, parts_of, read_parts
from genkit.runs.segments import Segments
from genkit.storage import StoragePath

WAIT = 30.0  # seconds for the workers of a driver that was killed, which end when they miss it
PIECE = 10_000  # records appended at a time


def fold(folder: Path, journal: Journal | Segments, records: dict[Key, Result], wait: float = WAIT) -> list[str]:
    """Append what the parts of a locked run hold to its journal, add it to `records`, and remove the parts.

    A crash in between leaves the parts: the next fold finds what is appended already, and removes them. Returns what
    to say of damaged lines. Raises HostError for a part whose writer has not ended after `wait` seconds.
    """
    if isinstance(folder, StoragePath):
        return gather(folder, journal, records)
    paths = parts_of(folder)
    if not paths and not any(folder.glob("embeddings-*.npy")):
        return []
    with disk(folder):
        handles = [_claimed(path, time.monotonic() + wait) for path in paths]
        try:
            found, bad = read_parts(paths)
            new = [result for key, result in found.items() if records.get(key) != result]
            for start in range(0, len(new), PIECE):
                journal.append(result.to_json() for result in new[start : start + PIECE])
            records.update(found)
            embedded = fold_embeddings(folder)
            for path in (*paths, *embedded):
                path.unlink(missing_ok=True)
            sync_folder(folder)  # a part that came back after a power cut would undo what replaced its records
        finally:
            for handle in handles:
                os.close(handle)
    return [f"{name}:{line}: damaged; its image is drawn again" for name, line in bad]


def ended(folder: Path, worker: str, wait: float) -> dict[Key, Result]:
    """Return what a worker that died recorded; {} if it never began. wait: seconds for its process to end."""
    if isinstance(folder, StoragePath):  # segments have no lock: one that comes late is taken in by the next fold
        return read_parts(p for p in parts_of(folder) if p.name.startswith(f"results-{worker}_"))[0]
    path = part_of(folder, worker)
    if not path.exists():
        return {}
    with disk(path):
        with contextlib.suppress(HostError):  # the lock of a node that cannot be reached may stay for long
            os.close(_claimed(path, time.monotonic() + wait))
        return read_parts([path])[0]


def _claimed(path: Path, until: float) -> int:
    """Return the open file of a part, locked."""
    handle = os.open(path, os.O_RDWR)
    while not lock_part(handle):
        if time.monotonic() > until:
            os.close(handle)
            raise HostError(f"{path}: a worker of an earlier start still writes to it; end it first")
        time.sleep(0.05)
    return handle
