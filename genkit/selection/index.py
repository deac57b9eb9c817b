"""The CLIP embeddings of any folder's pictures, kept in the cache folder, and exact search among embeddings.

An index has two files that only grow: `embeddings.npy`, as in a run folder, with vectors by the pictures' SHA-256; and
`files.jsonl`, with the hash of each file when it was last read. A file that was moved is read again but not embedded
again; one that has changed is embedded again. An interrupted update keeps what was embedded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.device.devices import cache_folder
from genkit.durable import Journal, disk, lock_folder
from genkit.errors import InputError
from genkit.files import place
from genkit.pictures.images import picture_bytes, read_image
from genkit.progress import Steps
from genkit.runs.embeddings import Store, by_content

if TYPE_CHECKING:
    from genkit.scoring.clip import ClipScorer

FILES = "files.jsonl"
BATCH = 32  # pictures embedded together
CHUNK = 65536  # vectors multiplied at a time
ROUNDING = 2e-3  # bound on the error of a cosine in half precision; candidates within it are computed again in float64


@dataclasses.dataclass(frozen=True)
class Indexed:
    """The embeddings of pictures: files[i] has the unit vector vectors[rows[i]], (n, width) float16.

    new: how many were embedded now. problems: why a picture could not be read; it is in neither list.
    """

    files: list[Path]
    rows: np.ndarray
    vectors: np.ndarray
    new: int = 0
    problems: Mapping[Path, str] = dataclasses.field(default_factory=dict)


def folder_index(
    folder: Path, files: Sequence[Path], weights: Mapping[str, str], width: int, scorer: ClipScorer, quiet: bool = False
) -> Indexed:  # fmt: skip
    """Return the embeddings of `files`, all in `folder`; those that its index lacks are computed and kept.

    weights: SHA-256 of the CLIP model's weight files, which, with the folder's path, name the index; width: of its
    embeddings. Raises HostError where the index cannot be written, or is being written by another process.
    """
    home = index_folder(folder, weights)
    with disk(home):
        home.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(home)
        try:
            journal = Journal(home / FILES)
            try:
                with Store(home, width) as store:
                    return _updated(folder, files, journal, store, scorer, quiet)
            finally:
                journal.close()
        finally:
            os.close(lock)


def index_folder(folder: Path, weights: Mapping[str, str]) -> Path:
    """Return where the index of a folder by a CLIP model lies."""
    key = repr((str(folder.resolve()), sorted(weights.items())))
    return cache_folder() / "search" / hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()[:32]


def _updated(
    folder: Path, files: Sequence[Path], journal: Journal, store: Store, scorer: ClipScorer, quiet: bool
) -> Indexed:
    import torch

    from genkit.scoring.panel import half

    known = {
        line["file"]: line for line in journal.lines if isinstance(line, dict) and isinstance(line.get("file"), str)
    }
    have, _ = by_content(store.path.parent)
    digests: dict[Path, str] = {}
    unread: list[tuple[Path, dict[str, Any]]] = []
    problems: dict[Path, str] = {}
    for file in files:
        try:
            state = _state(folder, file)
        except OSError as error:
            problems[file] = f"{place(file)}: {error.strerror}"
            continue
        line = known.get(state["file"], {})
        if {**line, "sha256": ""} == {**state, "sha256": ""} and line.get("sha256") in have:
            digests[file] = line["sha256"]
        else:
            unread.append((file, state))
    embedded = 0
    with Steps(quiet=quiet) as progress:
        for start in range(0, len(unread), BATCH):
            part = unread[start : start + BATCH]
            new = _read(part, have, digests, problems, scorer)
            if new:
                vectors = half(scorer.embed_pixels(torch.cat(list(new.values()))))
                for digest, vector in zip(new, vectors, strict=True):
                    have[digest] = store.count
                    store.add("", 0, digest, vector)
                embedded += len(new)
            journal.append({**state, "sha256": digests[file]} for file, state in part if file in digests)
            progress(start + len(part), len(unread), "of the pictures that the index lacked read")
    rows, vectors = by_content(store.path.parent)
    kept = [file for file in files if digests.get(file) in rows]
    problems |= {f: f"{place(f)}: its embedding is not finite" for f, digest in digests.items() if digest not in rows}
    return Indexed(kept, np.array([rows[digests[f]] for f in kept], np.int64), vectors, embedded, problems)


def _state(folder: Path, file: Path) -> dict[str, Any]:
    """Return the size and times of a file, by which one that has not changed is recognised without reading it."""
    found = file.stat()
    name = os.fsencode(file.relative_to(folder)).decode("utf-8", "backslashreplace")
    return {"file": name, "bytes": found.st_size, "mtime": found.st_mtime_ns, "ctime": found.st_ctime_ns}


def _read(
    part: Sequence[tuple[Path, Any]], have: Mapping[str, int], digests: dict[Path, str], problems: dict[Path, str],
    scorer: ClipScorer,
) -> dict[str, Any]:  # fmt: skip
    """Fill in the SHA-256 of files; return {SHA-256: picture prepared for CLIP} of contents without an embedding."""
    from genkit.scoring.clip import as_tensor

    new: dict[str, Any] = {}
    for file, _ in part:
        try:
            data = picture_bytes(file)
            digest = hashlib.sha256(data).hexdigest()
            if digest not in have and digest not in new:
                new[digest] = scorer.preprocess(as_tensor(read_image(data)))
            digests[file] = digest
        except InputError as error:
            message = str(error).removeprefix("the picture: ")
            problems[file] = message if place(file) in message else f"{place(file)}: {message}"
    return new


def top(vectors: np.ndarray, rows: np.ndarray, query: np.ndarray, count: int) -> list[tuple[int, float]]:
    """Return (position in rows, cosine) of the `count` vectors nearest to a query, nearest first; exact.

    vectors: (n, width) float16 of unit length, which may be memory-mapped; rows: which of them to search; query:
    (width,) of unit length. All are multiplied in half precision, which torch does at the speed of memory, and those
    that may be among the nearest again in float64. Of equal ones the first comes first.
    """
    import torch

    if not len(rows):
        return []
    query = query.astype(np.float64)
    rough = np.empty(len(vectors), np.float32)
    narrow = torch.from_numpy(query).half()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the file is mapped to be read only
        for start in range(0, len(vectors), CHUNK):
            product = torch.from_numpy(vectors[start : start + CHUNK]) @ narrow
            rough[start : start + CHUNK] = product.float().numpy()
    scores = rough[rows]
    count = min(count, len(rows))
    least = np.partition(scores, len(rows) - count)[len(rows) - count] - 2 * ROUNDING
    near = np.flatnonzero(scores >= least)
    exact = np.empty(len(near))
    for start in range(0, len(near), CHUNK):
        part = vectors[rows[near[start : start + CHUNK]]].astype(np.float64)
        exact[start : start + CHUNK] = part @ query / np.linalg.norm(part, axis=1)
    order = np.argsort(-exact, kind="stable")[:count]
    return [(int(near[i]), float(exact[i])) for i in order]
