"""Compare the pictures of a run with a reference folder, e.g. training data, to find memorised ones."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genkit.components import inspect_model, weight_hashes
from genkit.device.devices import cache_folder
from genkit.durable import disk, write_whole
from genkit.errors import InputError
from genkit.pictures.images import list_images, read_image
from genkit.progress import Steps
from genkit.runs.records import Key, found_at
from genkit.selection.diversity import nearest

BATCH = 32


def nearest_references(
    folder: Path,
    clip: Mapping[str, Any] | None,
    place: Mapping[Key, int],
    vectors: np.ndarray,
    same: Mapping[Key, str | None],
) -> dict[Key, tuple[str, float]]:
    """Return for each image of a run its nearest picture in `folder`, relative to it, and the cosine of the two.

    clip: {"name", "weights"} as run.json has it; place, vectors: as from `read_embeddings`; same: SHA-256 of the images
    (an identical file has the cosine 1, which rounded vectors do not reach). Embeddings are cached by the hash of the
    picture's content, also when this is interrupted. Raises InputError where the run's CLIP model is gone or has
    changed, and for a picture that cannot be read.
    """
    files = list_images(folder)
    if clip is None:
        raise InputError("--reference: this run was made without a CLIP model; make it again with --clip NAME")
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    known = _embedded(folder, files, digests, clip)
    if known.shape[1] != vectors.shape[1]:
        raise InputError(
            f"--reference: {clip['name']} embeds in {known.shape[1]} numbers, this run in {vectors.shape[1]}"
        )
    keys = list(place)
    first = {digest: k for k, digest in reversed(list(enumerate(digests)))}
    found = {}
    for key, other in zip(keys, nearest(vectors, [place[key] for key in keys], known), strict=True):
        copy = first.get(same.get(key) or "")
        if copy is not None:
            other = copy, 1.0
        if other is not None:
            found[key] = files[other[0]].relative_to(folder).as_posix(), other[1]
    return found


def _embedded(folder: Path, files: Sequence[Path], digests: Sequence[str], clip: Mapping[str, Any]) -> np.ndarray:
    """Return embeddings (len(files), width) float16; only those not in the cache are computed."""
    cache = _cache_file(folder, clip)
    known = _read(cache)
    lacking = {d: file for d, file in zip(digests, files, strict=True) if d not in known}
    if lacking:
        try:
            for digest, vector in _embed(lacking, clip):
                known[digest] = vector
        finally:
            known = {digest: known[digest] for digest in digests if digest in known}  # drop deleted files
            if known:
                with disk(cache):
                    cache.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(cache, _packed(known))
    return np.stack([known[digest] for digest in digests])


def _embed(files: Mapping[str, Path], clip: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (SHA-256, vector) of each file."""
    info = inspect_model(found_at(clip))
    if weight_hashes(info) != clip["weights"]:
        raise InputError(f"--reference: {clip['name']} is no longer the CLIP model that scored this run")
    from genkit.scoring.clip import ClipScorer

    scorer = ClipScorer.from_pretrained(found_at(clip))
    digests = list(files)
    with Steps() as progress:
        for start in range(0, len(digests), BATCH):
            part = digests[start : start + BATCH]
            vectors = scorer.embed_images([read_image(files[digest]) for digest in part])
            progress(start + len(part), len(digests), "of the reference pictures embedded")
            yield from zip(part, vectors.cpu().numpy().astype(np.float16), strict=True)


def _cache_file(folder: Path, clip: Mapping[str, Any]) -> Path:
    """Return the cache file of this folder's embeddings by this model."""
    key = repr((str(folder.resolve()), sorted(clip["weights"].items())))
    return cache_folder() / "reference" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def _packed(known: Mapping[str, np.ndarray]) -> bytes:
    width = len(next(iter(known.values())))
    dtype = np.dtype([("sha256", "S64"), ("vector", "<f2", (width,))])
    file = io.BytesIO()
    np.save(file, np.array([(digest.encode(), vector) for digest, vector in known.items()], dtype))
    return file.getvalue()


def _read(cache: Path) -> dict[str, np.ndarray]:
    """Return {SHA-256 of a file: its vector}; empty if the cache is missing or damaged."""
    try:
        records = np.load(cache, allow_pickle=False)
        return dict(zip((d.decode() for d in records["sha256"].tolist()), records["vector"], strict=True))
    except (OSError, ValueError, IndexError, EOFError):
        return {}
