"""Choose what each row keeps of the images that pass: diverse ones, without duplicates or copies of references."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError, shown
from genkit.rows.result import Result
from genkit.runs.records import Key
from genkit.scoring.names import ALONE
from genkit.selection.picking import NONE, Picking

if TYPE_CHECKING:
    import numpy as np

    from genkit.selection.judged import Judged

Notes = dict[Key, dict[str, Any]]  # by image: out (why it is rejected), about (added to the reason), sim, reference


_NO_EMBEDDINGS = "this run has no embeddings to compare, as one made with --clip none: "


@dataclasses.dataclass(frozen=True)
class Known:
    """The embeddings of a run: vectors (n, width), the row of each image in them, and its nearest reference."""

    place: Mapping[Key, int]
    vectors: np.ndarray
    reference: Mapping[Key, tuple[str, float]]


def read_known(
    folder: Path,
    config: Mapping[str, Any],
    results: Sequence[Result],
    picking: Picking,
    expressions: Iterable[str | None] = (),
) -> Known | None:
    """Return the embeddings for `picking`, or None if it needs none. Raises InputError if the run has none.

    expressions: gates and rank_by of the rows; embeddings are also needed if one of them uses sim.
    """
    if picking == NONE and not any("sim" in text for text in set(expressions) if text):
        return None
    from genkit.runs.embeddings import read_embeddings

    place, vectors = read_embeddings(folder, results)
    if picking.needs_embeddings and not place:
        raise InputError(
            f"{picking.needs_embeddings}: {_NO_EMBEDDINGS}`genkit score {shown(str(folder))}` makes them; --dedupe 1 "
            "(identical files) needs none"
        )
    near: Mapping[Key, tuple[str, float]] = {}
    if picking.reference is not None:
        from genkit.selection.reference import nearest_references

        same = {(r.id, r.index): r.sha256 for r in results}
        near = nearest_references(picking.reference, config["binding"].get("clip"), place, vectors, same)
    return Known(place, vectors, near)


def choose(rows: Sequence[Judged], picking: Picking, known: Known | None) -> tuple[list[list[int]], Notes]:
    """Return the positions of what each row keeps, in order of choice, and notes on images.

    Candidates too similar to a reference are left out.
    """
    weighed = any(row.weigh is not None for row in rows)
    if weighed and (known is None or not known.place):
        raise InputError(f"sim: {_NO_EMBEDDINGS}`genkit score` of its folder makes them")
    if weighed and picking.diverse is not None:
        raise InputError("--diverse: chooses by likeness, and so does an expression that reads sim: give one of them")
    if known is None or (picking == NONE and not weighed):
        return [row.candidates()[: row.keep] for row in rows], {}
    from genkit.selection.diversity import Candidates, pick

    notes: Notes = _reference_notes(rows, picking, known)
    items = [(row, k) for row in rows for k in row.candidates()]
    lists: list[list[int]] = [[] for _ in rows]
    starts, at = [], 0
    for n, row in enumerate(rows):
        starts.append(at)
        at += len(row.candidates())
        near = picking.dedupe if picking.reference is not None else None
        for item in range(starts[n], at):
            found = known.reference.get(_key(items[item]))
            if near is None or found is None or found[1] < near:
                lists[n].append(item)
    keys = [_key(item) for item in items]
    found_rows = [
        Candidates(
            found,
            [_finite(row, items[i][1]) for i in found],
            len(found) if row.keep is None else row.keep,
            _weigh(row, [items[i][1] for i in found]),
            row.weigh is not None and row.weigh.moving,
        )
        for row, found in zip(rows, lists, strict=True)
    ]
    place = [known.place.get(key, -1) for key in keys]
    same = [row.found[k].sha256 for row, k in items]
    chosen, alike = pick(found_rows, known.vectors, place, same, picking.diverse or 0.0, picking.dedupe)
    for item, (other, cosine) in alike.items():
        name = "{}-{:02d}".format(*keys[other])
        notes.setdefault(keys[item], {})["out"] = f"near duplicate of {name} ({cosine:.3f})"
    places = [[items[item][1] for item in found] for found in chosen]
    _similar(rows, places, known, picking, notes)
    _failed(rows, places, known, notes)
    return places, notes


def _weigh(row: Judged, places: Sequence[int]) -> Callable[[int, float], float] | None:
    weigh = row.weigh
    return None if weigh is None else lambda k, sim: weigh(places[k], sim)


def _failed(rows: Sequence[Judged], chosen: Sequence[Sequence[int]], known: Known, notes: Notes) -> None:
    """Add notes to the pictures that were rejected because of their sim."""
    for row, places in zip(rows, chosen, strict=True):
        if row.weigh is None:
            continue
        for k in set(row.candidates()).difference(places):
            key = row.found[k].id, row.found[k].index
            sim = notes.get(key, {}).get("sim", None if key not in known.place else ALONE)
            refusal = row.weigh.refusal(k, sim)
            if refusal is not None:
                notes.setdefault(key, {}).setdefault("out", refusal)


def _key(item: tuple[Judged, int]) -> Key:
    r = item[0].found[item[1]]
    return r.id, r.index


def _finite(row: Judged, k: int) -> float:
    """Return a candidate's value; the lowest value of the row if it has none."""
    value = row.values[k]
    return value if value == value else min((row.values[j] for j in row.ranked), default=0.0)


def _reference_notes(rows: Sequence[Judged], picking: Picking, known: Known) -> Notes:
    notes: Notes = {}
    for key, (file, cosine) in known.reference.items():
        out = picking.dedupe is not None and cosine >= picking.dedupe
        text = f"{'too like' if out else 'nearest'} reference {file} ({cosine:.3f})"
        notes[key] = {"out" if out else "about": text, "reference": {"file": file, "sim": round(cosine, 6)}}
    return notes


def _similar(
    rows: Sequence[Judged], chosen: Sequence[Sequence[int]], known: Known, picking: Picking, notes: Notes
) -> None:
    """Add to each image's notes `sim`, the cosine with the nearest other image that its row keeps."""
    from genkit.selection.diversity import nearest

    for row, places in zip(rows, chosen, strict=True):
        asked = [r for r in row.found if (r.id, r.index) in known.place]
        kept = [known.place[r.id, r.index] for k in places if ((r := row.found[k]).id, r.index) in known.place]
        if not kept:
            continue
        taken = {(row.found[k].id, row.found[k].index) for k in places}
        numbers = [known.place[r.id, r.index] for r in asked]
        owner = {known.place[r.id, r.index]: r for r in asked}
        for r, found in zip(asked, nearest(known.vectors, numbers, known.vectors[kept], kept), strict=True):
            if found is None:
                continue
            other, cosine = owner[kept[found[0]]], found[1]
            note = notes.setdefault((r.id, r.index), {})
            note["sim"] = round(cosine, 6)
            if (picking.diverse or row.weigh) and (r.id, r.index) not in taken and "out" not in note:
                like = f"{cosine:.3f} like {other.id}-{other.index:02d}"
                note["about"] = f"{like}; {note['about']}" if "about" in note else like
