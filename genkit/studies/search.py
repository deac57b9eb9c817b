"""`genkit search`: find the pictures of a run or folder that are nearest to texts and pictures, by CLIP."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.components import inspect_model, weight_hashes
from genkit.device.devices import check_device
from genkit.errors import InputError, shown
from genkit.files import place, read_text, run_path, there
from genkit.pictures.images import check_image, list_images, natural, read_image
from genkit.rows.result import Result
from genkit.runs.embeddings import read_embeddings
from genkit.runs.records import finished, found_at, is_run, read_config
from genkit.runs.rescore import Stored
from genkit.selection.index import BATCH, Indexed, folder_index, top

if TYPE_CHECKING:
    from genkit.components import ModelInfo
    from genkit.scoring.clip import ClipScorer

MOST = 1000  # results of a search
LONG = 500  # characters of a caption
CAPTION_BYTES = 2**16
Pictures = tuple[list[Path], dict[Path, Result]]  # in order; their records, if they are of a run


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a search: results, nearest first, each with file, score (cosine similarity) and caption or "".

    pictures: the number searched; new: how many of them had to be embedded. notes: remarks for the user. problems: a
    message for each picture that could not be read.
    """

    query: dict[str, Any]
    results: list[dict[str, Any]]
    pictures: int
    new: int
    clip: str
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def search(
    images: str | Path, text: str | Sequence[str] = (), image: Any = (), without: str | Sequence[str] = (), k: int = 20,
    *, clip: str = "auto", device: str = "auto", dtype: str = "auto", quiet: bool = True,
) -> Found:  # fmt: skip
    """Return the k pictures of a run or folder whose CLIP embeddings are nearest to a query.

    The query is the mean of the unit embeddings of all texts and pictures, minus the mean of those of `without`. image:
    a path, a PIL image, or a list of these. clip: "auto" is the run's own model, or emoji-clip for other folders. New
    embeddings are stored with the run, or in an index in the cache folder. Raises InputError.
    """
    folder = run_path(images)
    texts, negative = ([t] if isinstance(t, str) else list(t) for t in (text, without))
    pictures = list(image) if isinstance(image, list | tuple) else [image]
    files, records = _check(folder, texts, pictures, negative, k)
    check_device(device, dtype)
    name = _clip_name(folder, clip)
    info = inspect_model(name)
    if info.kind != "clip":
        raise InputError(f"--clip: {name} is a model of kind {info.kind}, not a CLIP model")
    shows = [read_image(picture) for picture in pictures]  # before the model is loaded
    from genkit.scoring.clip import ClipScorer

    scorer = ClipScorer.from_pretrained(name, device=device, dtype=dtype)
    query = _query(scorer, texts, shows, negative)
    notes = [
        f"{shown(t, 60)}: is longer than the {scorer.texts.tokenizer.model_max_length} tokens that {name} reads: the "
        "rest of it has no effect"
        for t in (*texts, *negative)
        if t in scorer.texts.truncated
    ]
    indexed, captions = embedded(folder, files, records, info, scorer, notes, quiet)
    found = [
        {"file": str(indexed.files[at]), "score": round(score, 6), "caption": captions(indexed.files[at])}
        for at, score in top(indexed.vectors, indexed.rows, query, k)
    ]
    asked = {"text": texts, "image": [str(p) if isinstance(p, str | Path) else "(a picture)" for p in pictures]}
    asked |= {"not": negative}
    return Found(
        {key: value for key, value in asked.items() if value}, found, len(indexed.files), indexed.new, name,
        tuple(notes), tuple(indexed.problems.values()),
    )  # fmt: skip


def _check(folder: Path, texts: list[str], pictures: list[Any], negative: list[str], k: int) -> Pictures:
    """Return `pictures_of` the folder. Raises InputError for an empty query or folder."""
    if not texts and not pictures:
        raise InputError("--text, --image: nothing to search for; give one of them")
    for option, values in (("--text", texts), ("--not", negative)):
        for value in values:
            if not value.strip():
                raise InputError(f"{option}: {shown(value)} is empty")
    if not 1 <= k <= MOST:
        raise InputError(f"-k: {k} is not a number from 1 to {MOST}")
    for picture in pictures:
        if isinstance(picture, str | Path):
            try:
                check_image(picture)
            except InputError as error:
                raise InputError(f"--image: {error}") from None
    return pictures_of(folder)


def pictures_of(folder: Path) -> Pictures:
    """Return the pictures of a folder, or the finished images of a run with their records.

    Raises InputError if there are none.
    """
    if not folder.is_dir():
        raise InputError(f"{place(folder)}: is no folder; give a run, or a folder of pictures")
    records = finished(folder)
    files = sorted(there(folder, records), key=natural) if is_run(folder) else list_images(folder)
    if not files:
        raise InputError(f"{place(folder)}: holds no PNG, JPEG, WebP or JPEG XL picture")
    return files, records


def _run_clip(folder: Path) -> dict[str, Any]:
    """Return the CLIP model in a run's record; {} if there is none."""
    config = read_config(folder) if is_run(folder) else None
    bound = (config or {}).get("binding", {}).get("clip")
    return bound if isinstance(bound, dict) and isinstance(bound.get("name"), str) else {}


def _clip_name(folder: Path, clip: str) -> str:
    if clip != "auto":
        return clip
    bound = _run_clip(folder)
    return found_at(bound) if bound else "emoji-clip"


def _query(scorer: ClipScorer, texts: list[str], shows: list[Any], negative: list[str]) -> np.ndarray:
    """Return the unit embedding of the query, (width,) float64."""
    parts = [scorer.embed_texts(texts).cpu().numpy()] if texts else []
    parts += [scorer.embed_images(shows).cpu().numpy()] if shows else []
    query = np.concatenate(parts).astype(np.float64).mean(axis=0)
    if negative:
        query = query - scorer.embed_texts(negative).cpu().numpy().astype(np.float64).mean(axis=0)
    length = float(np.linalg.norm(query))
    if length < 1e-3:
        raise InputError("--not: takes away all that --text and --image ask for")
    return query / length


def embedded(
    folder: Path, files: list[Path], records: Mapping[Path, Result], info: ModelInfo, scorer: ClipScorer,
    notes: list[str], quiet: bool,
) -> tuple[Indexed, Any]:  # fmt: skip
    """Return the embeddings of the pictures of a folder or run, and a function from a picture to its caption.

    files, records: as `pictures_of` returns them. New embeddings are stored. notes: remarks for the user are appended
    to it.
    """
    weights = weight_hashes(info)
    if not is_run(folder):
        return folder_index(folder, files, weights, info.embedding_width, scorer, quiet), _beside
    bound = _run_clip(folder)
    if bound.get("weights") == weights:
        return _of_run(folder, files, records, info, scorer), lambda file: records[file].prompt[:LONG]
    told = f"was scored with {bound['name']}" if bound else "has no CLIP model"
    notes.append(f"{place(folder)}: {told}: its pictures are embedded by {info.name} into an index of their own")
    return folder_index(folder, files, weights, info.embedding_width, scorer, quiet), lambda file: records[file].prompt


def _of_run(
    folder: Path, files: list[Path], records: Mapping[Path, Result], info: ModelInfo, scorer: ClipScorer
) -> Indexed:
    """Return the embeddings of a run's pictures; missing ones are computed and stored with the run."""
    import torch

    from genkit.scoring.clip import as_tensor
    from genkit.scoring.panel import half

    found: dict[Path, np.ndarray] = {}
    problems: dict[Path, str] = {}
    with Stored(folder, info, records) as stored:
        lacking = [file for file in files if stored.vector(file) is None]
        for start in range(0, len(lacking), BATCH):
            pixels = {}
            for file in lacking[start : start + BATCH]:
                try:
                    pixels[file] = scorer.preprocess(as_tensor(read_image(file)))
                except InputError as error:
                    problems[file] = str(error)
            if pixels:
                vectors = half(scorer.embed_pixels(torch.cat(list(pixels.values()))))
                for file, vector in zip(pixels, vectors, strict=True):
                    stored.add(file, vector)
                    found[file] = vector
    place_of, vectors = read_embeddings(folder, records.values())
    rows = {file: place_of[r.id, r.index] for file, r in records.items() if (r.id, r.index) in place_of}
    changed = {f: v for f, v in found.items() if f not in rows or not np.array_equal(vectors[rows[f]], v)}
    kept = [file for file in files if file in rows or file in changed]
    if changed:  # could not be stored: the run is locked, or the picture is not the recorded one
        base = np.array(vectors) if len(vectors) else np.empty((0, info.embedding_width), np.float16)
        rows |= {file: len(base) + number for number, file in enumerate(changed)}
        vectors = np.concatenate([base, np.stack(list(changed.values()))])
    return Indexed(kept, np.array([rows[file] for file in kept], np.int64), vectors, len(found), problems)


def _beside(file: Path) -> str:
    """Return the caption in the .txt file beside a picture, or ""."""
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return ""
    try:
        return " ".join(read_text(beside, CAPTION_BYTES).split())[:LONG]
    except InputError:
        return ""


def report(found: Found) -> list[str]:
    """Return the results as text: score, file and caption of each picture."""
    return [f"{r['score']:.4f}  {r['file']}" + (f"  {r['caption']}" if r["caption"] else "") for r in found.results]


def say(found: Found) -> None:
    """Print notes, problems and a summary to standard error."""
    from genkit.progress import printable

    new = f", {found.new} of them embedded now" if found.new else ""
    last = f"{len(found.results)} of {found.pictures} pictures, by {found.clip}{new}"
    for line in (*found.notes, *found.problems, last):
        print(printable(line), file=sys.stderr)
