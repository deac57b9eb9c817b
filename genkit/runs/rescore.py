"""What a run folder already has of its pictures, for scoring them again without opening or embedding them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.components import weight_hashes
from genkit.errors import HostError
from genkit.rows.result import Result
from genkit.runs.embeddings import Store, read_embeddings
from genkit.runs.lease import Hold, Lease, hold
from genkit.runs.records import RESULTS, finished, read_config
from genkit.storage import StoragePath

if TYPE_CHECKING:
    from genkit.components import ModelInfo
    from genkit.runs.run import Run
    from genkit.scoring.panel import Panel

RELATIVE = ("clip_margin", "clip_z")  # to the other captions of the run
ROUNDING = 1e-3
MEASURED = ("sharpness", "brightness", "nan", "flat")  # scores that depend on nothing but the pixels


def rescore(run: Run, panel: Panel) -> int:
    """Recompute the CLIP scores of a run's finished images from their embeddings; return how many changed.

    They change when rows or labels were added or removed, because scores are relative to the run's other prompts and
    to the labels. Raises HostError.
    """
    place, vectors = read_embeddings(run.folder, run.done.values())
    changed = []
    for key, at in place.items() if panel.clip is not None else ():
        r = run.done[key]
        found = panel.of_embedding(np.array(vectors[at]), r.prompt, run.rows[r.id].labels)
        if not _alike({name: r.scores.get(name) for name in (*RELATIVE, *found)}, found):
            rest = {name: value for name, value in r.scores.items() if name not in RELATIVE}
            changed.append(dataclasses.replace(r, scores={**rest, **found}))
    run.rescore(changed)
    return len(changed)


def _alike(before: Any, after: Any) -> bool:
    """Return whether scores are equal up to the rounding of the text encoder, which depends on the batch."""
    if isinstance(before, dict) and isinstance(after, dict):
        return all(_alike(before.get(name), after.get(name)) for name in {*before, *after})
    if isinstance(before, int | float) and isinstance(after, int | float):
        return abs(before - after) < ROUNDING
    return before is after


class Stored:
    """The records of a run and, if it was scored with the CLIP model `clip`, its embeddings. A context manager.

    Empty for None or a folder that is not a run. New embeddings are added to the run unless it is locked by another
    process or read-only.
    """

    def __init__(
        self, folder: Path | None, clip: ModelInfo | None = None, records: Mapping[Path, Result] | None = None
    ) -> None:
        """records: those of `finished`, if read already."""
        self._lock: Hold | Lease | None = None
        self._store: Store | None = None
        self._rows: dict[tuple[str, int], int] = {}
        self._waits: tuple[Path, int] | None = None  # the store to open with the first new embedding
        self._sizes: dict[str, int] | None = None
        if folder is None or not (folder / RESULTS).is_file():
            self._records: Mapping[Path, Result] = {}
            return
        self._records = finished(folder) if records is None else records
        binding = (read_config(folder) or {}).get("binding", {}).get("clip")
        if clip is None or not isinstance(binding, dict) or binding.get("weights") != weight_hashes(clip):
            return
        self._rows, self._vectors = read_embeddings(folder, self._records.values())
        self._waits = folder, clip.embedding_width
        if isinstance(folder, StoragePath):  # taking the lock is a write and may take time: `add` does it
            self._sizes = folder.sizes()
        else:
            self._open()

    def _open(self) -> None:
        if self._waits is not None:
            (folder, width), self._waits = self._waits, None
            with contextlib.suppress(HostError, OSError):
                self._lock = hold(folder)
                self._store = Store(folder, width)

    def vector(self, file: Path) -> np.ndarray | None:
        """Return the stored embedding of a picture, (width,) float16, or None; the file must have its recorded size."""
        r = self._records.get(file)
        row = None if r is None else self._rows.get((r.id, r.index))
        if r is None or row is None or self._size(file, r) != r.bytes:
            return None
        return np.array(self._vectors[row])

    def _size(self, file: Path, r: Result) -> int | None:
        return os.stat(file).st_size if self._sizes is None else self._sizes.get(str(r.file))

    def measures(self, file: Path) -> dict[str, Any] | None:
        """Return the recorded scores that depend only on the pixels, or None if some are missing."""
        r = self._records.get(file)
        found = {} if r is None else {name: r.scores[name] for name in MEASURED if name in r.scores}
        return found if len(found) == len(MEASURED) else None

    def add(self, file: Path, vector: np.ndarray) -> None:
        """Store a new embedding with the run, if the file has the recorded SHA-256."""
        self._open()
        r = self._records.get(file)
        if self._store is None or r is None or not r.sha256:
            return
        if hashlib.sha256(file.read_bytes()).hexdigest() == r.sha256:
            self._store.add(r.id, r.index, r.sha256, vector)

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        if self._store is not None:
            self._store.close()
        if self._lock is not None:
            self._lock.close()
