"""Which images are kept, at what rank, and why not the others: a pure decision on recorded scores."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.durable import disk, json_line, write_whole
from genkit.errors import InputError, nearest, shown
from genkit.export import export
from genkit.gallery import write_gallery
from genkit.records import SELECTION, read_config, read_results, read_rows
from genkit.request import Request, Result
from genkit.scoring.gates import Expression


def decide(
    rows: Sequence[Request],
    results: Iterable[Result],
    where: str | None = None,
    rank_by: str | None = None,
    keep: int | None = None,
) -> dict[str, Any]:
    """Return {"kept", "of", "where", "rank_by", "keep", "images": {"<id>-<k>": {…, "kept", "rank", "reason"}}}.

    An image is kept when it is done, passes its row's gate, and is among the best `keep` of the row by `rank_by`
    (default: the clip score where there is one, else the order of drawing). `where`, `rank_by` and `keep` stand in for
    those of every row. NaN passes no gate and has no rank. Rank 1 is the best; an image that fails its gate has none.
    Raises InputError for an expression that does not hold together.
    """
    of_row: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        of_row[result.id].append(result)
    labels = {label for row in rows for label in row.labels or ()}
    names = {name for found in of_row.values() for r in found for name in r.scores} - {"p"}
    asked_gate, asked_order = (None if text is None else Expression(text, labels, names) for text in (where, rank_by))
    compiled = functools.cache(Expression)
    images: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = None if row.labels is None else tuple(row.labels)
        gate = asked_gate or (None if row.gate is None else compiled(row.gate, own))
        order = asked_order or (None if row.rank_by is None else compiled(row.rank_by, own))
        found = sorted(of_row.get(str(row.id), ()), key=lambda r: r.index)
        decisions = _decide_row(row, found, gate, order, keep or row.keep)
        for r, (rank, reason) in zip(found, decisions, strict=True):
            verdict = {"kept": reason == "kept", "rank": rank, "reason": reason}
            images[f"{r.id}-{r.index:02d}"] = {"id": r.id, "index": r.index, "file": r.file, **verdict}
    kept = sum(image["kept"] for image in images.values())
    return {"kept": kept, "of": len(images), "where": where, "rank_by": rank_by, "keep": keep, "images": images}


def passes(gate: Expression | None, scores: Mapping[str, Any]) -> bool:
    """Return whether an image with these scores passes: never where a score that the gate reads is NaN or absent."""
    return gate is None or (not _unknown(gate, scores) and bool(gate(scores)))


def _unknown(expression: Expression, scores: Mapping[str, Any]) -> list[str]:
    """Return the scores that an expression reads and that are NaN (null in a record) or absent."""
    odds = scores.get("p") or {}
    used = [(name, scores.get(name)) for name in sorted(expression.names)]
    used += [(f"p[{label!r}]", odds.get(label)) for label in sorted(expression.labels)]
    return [name for name, value in used if value is None or value != value]


def _decide_row(
    row: Request, found: Sequence[Result], gate: Expression | None, order: Expression | None, keep: int | None
) -> list[tuple[int | None, str]]:
    """Return (rank, reason) for each image of a row."""
    reasons = [_refusal(r, gate, row.max_images or row.num_images) for r in found]
    values = [math.nan if reason else value_of(r, order) for r, reason in zip(found, reasons, strict=True)]
    ranked = sorted((k for k, value in enumerate(values) if value == value), key=lambda k: (-values[k], k))
    ranks = {k: place for place, k in enumerate(ranked, 1)}
    decided: list[tuple[int | None, str]] = []
    for k, refused in enumerate(reasons):
        rank, reason = ranks.get(k), refused or "kept"
        if refused is None and keep is not None and (rank is None or rank > keep):
            reason = "nan: no score to rank by" if rank is None else f"rank {rank} of {len(ranked)}, keep {keep}"
        decided.append((rank, reason))
    return decided


def _refusal(r: Result, gate: Expression | None, most: int) -> str | None:
    """Return why an image is out whatever the others of its row are."""
    if r.status != "done":
        return f"{r.status}: {r.reason}" if r.reason else r.status
    if r.index >= most:
        return f"not among the {most} that the row asks for now"
    if gate is None or passes(gate, r.scores):
        return None
    return f"gate: {gate.text}" + "".join(f" (no {name})" for name in _unknown(gate, r.scores)[:1])


def value_of(r: Result, order: Expression | None) -> float:
    """Return what an image is ranked by; NaN where that is unknown."""
    if order is not None:
        return math.nan if _unknown(order, r.scores) else float(order(r.scores))
    if "clip" not in r.scores:
        return -float(r.index)
    return math.nan if r.scores["clip"] is None else float(r.scores["clip"])


def write_selection(folder: Path, selection: Mapping[str, Any]) -> None:
    """Write selection.json of a run folder, whole or not at all. Raises HostError."""
    with disk(folder / SELECTION):
        write_whole(folder / SELECTION, json_line(selection).encode())


def refilter(
    folder: Path,
    where: str | None = None,
    rank_by: str | None = None,
    keep: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Decide again on a run's recorded scores: `genkit filter`. Rewrites selection.json and index.html; returns counts.

    where, rank_by, keep stand in for every row's gate, rank_by and keep. out: a folder for copies of what is kept, see
    `export`. Reads no model, needs no lock. Raises InputError for a folder that is no run and for an unknown score.
    """
    if keep is not None and not 1 <= keep <= 100_000:
        raise InputError(f"--keep: {keep} is not within 1 to 100000")
    config = read_config(folder)
    if config is None:
        raise InputError(f"{shown(str(folder))}: holds no run.json: not a run folder")
    rows = read_rows(folder)
    asked = {str(row.id) for row in rows}
    results = [_present(folder, r) for r in read_results(folder) if r.id in asked]
    _check(rows, results, where, rank_by)
    selection = decide(rows, results, where, rank_by, keep)
    summary = {"run": str(folder), "rows": len(rows), "images": len(results), "kept": selection["kept"]}
    if out is not None:
        kept = [r for r in results if selection["images"][f"{r.id}-{r.index:02d}"]["kept"]]
        summary |= {"out": str(out), "copied": export(folder, kept, out)}
    write_selection(folder, selection)
    write_gallery(folder, rows, results, selection, config)
    return summary


def _present(folder: Path, r: Result) -> Result:
    """Return the record, or a failed one where its picture was taken away since."""
    if r.status != "done" or os.path.exists(os.path.join(folder, str(r.file))):
        return r
    return dataclasses.replace(r, status="failed", reason="its file is missing", file=None)


def _check(rows: Sequence[Request], results: Sequence[Result], where: str | None, rank_by: str | None) -> None:
    """Raise InputError, naming the option, for an expression that is none, or is about a score that no image has."""
    labels = {label for row in rows for label in row.labels or ()}
    known = {name for r in results for name in r.scores} - {"p"}
    for option, text in (("--where", where), ("--rank-by", rank_by)):
        if text is None:
            continue
        try:
            expression = Expression(text, labels, known)
        except InputError as error:
            raise InputError(f"{option}: {error}") from None
        if option == "--where" and not expression.decides:
            raise InputError(f"{option}: {shown(text)} is a number, not true or false; compare it with one")
        for name in sorted(expression.names - known if results else ()):
            raise InputError(f"{option}: {shown(name)}: no image of this run has that score{nearest(name, known)}")
