"""Fold the segments of a run on storage into results.jsonl and embeddings.npy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from genkit.durable import Journal, disk, json_line, write_whole
from genkit.rows.result import Result
from genkit.runs.embeddings import fold_embeddings
from genkit.runs.records import RESULTS, Key, parts_of, read_parts
from genkit.runs.segments import Segments
from genkit.storage import BLOCK, StoragePath, remove


def gather(folder: StoragePath, journal: Journal | Segments, records: dict[Key, Result]) -> list[str]:
    """Put results.jsonl with what all segments hold added to it, then delete the segments; otherwise as `fold`.

    Segments have no lock: one that its writer puts later is taken in by the next fold.
    """
    assert isinstance(journal, Segments)
    journal.roll()
    with disk(folder):
        parts, embedded = parts_of(folder), sorted(folder.glob("embeddings-*.npy"))
        if not parts and not embedded:
            return []
        found, bad = read_parts(parts)
        new = [result for key, result in found.items() if records.get(key) != result]
        if new:
            write_whole(folder / RESULTS, _added(folder / RESULTS, new))
        records.update(found)
        remove([*parts, *fold_embeddings(folder)])
    return [f"{name}:{line}: damaged; its image is drawn again" for name, line in bad]


def _added(path: Path, new: list[Result]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block
    for result in new:
        yield json_line(result.to_json()).encode()
