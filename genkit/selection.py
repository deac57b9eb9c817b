"""Which images are kept, at what rank, and why not the others: a pure decision on recorded scores."""

from __future__ import annotations

import dataclasses
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
    (default: the clip score where there is one, else the order of drawing); `where`, `rank_by` and `keep` stand in for those of
    every row. NaN passes no gate and has no rank. Rank 1 is the best; an image that fails its gate has none.
    """
    of_row: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        of_row[result.id].append(result)
    expressions: dict[tuple[str, tuple[str, ...] | None], Expression] = {}

    def compiled(text: str | None, row: Request) -> Expression | None:
        if text is None:
            return None
        key = text, None if row.labels is None else tuple(row.labels)
        if key not in expressions:
            expressions[key] = Expression(text, labels=row.labels)
        return expressions[key]

    images: dict[str, dict[str, Any]] = {}
    for row in rows:
        gate = compiled(row.gate if where is None else where, row)
        order = compiled(row.rank_by if rank_by is None else rank_by, row)
        found = sorted(of_row.get(str(row.id), ()), key=lambda r: r.index)
        decisions = _row(row, found, gate, order, keep or row.keep)
        for r, (rank, reason) in zip(found, decisions, strict=True):
            images[f"{r.id}-{r.index:02d}"] = {
                "id": r.id, "index": r.index, "file": r.file, "kept": reason == "kept", "rank": rank, "reason": reason,
            }  # fmt: skip
    kept = sum(image["kept"] for image in images.values())
    return {"kept": kept, "of": len(images), "where": where, "rank_by": rank_by, "keep": keep, "images": images}


def _row(
    row: Request, found: Sequence[Result], gate: Expression | None, order: Expression | None, keep: int | None
) -> list[tuple[int | None, str]]:
    """Return (rank, reason) for each image of a row."""
    most = row.max_images or row.num_images
    reasons = [_refusal(r, gate, most) for r in found]
    values = [_value(r, order) if reason is None else math.nan for r, reason in zip(found, reasons, strict=True)]
    ranked = sorted((k for k, v in enumerate(values) if not math.isnan(v)), key=lambda k: (-values[k], k))
    ranks = {k: place for place, k in enumerate(ranked, 1)}
    decided: list[tuple[int | None, str]] = []
    for k, reason in enumerate(reasons):
        rank = ranks.get(k)
        if reason is None and rank is None and keep is not None:
            reason = "rank: nan"
        elif reason is None and rank is not None and keep is not None and rank > keep:
            reason = f"rank {rank} of {len(ranked)}, keep {keep}"
        decided.append((rank, reason or "kept"))
    return decided


def _refusal(r: Result, gate: Expression | None, most: int) -> str | None:
    if r.status != "done":
        return f"{r.status}: {r.reason}" if r.reason else r.status
    if r.index >= most:
        return f"one of more than the {most} asked for now"
    if gate is None or gate(r.scores):
        return None
    nan = [name for name in sorted(gate.names) if r.scores.get(name, 0) in (None, math.nan)]
    return f"gate: {gate.text}" + "".join(f" ({name} is nan)" for name in nan)


def _value(r: Result, order: Expression | None) -> float:
    if order is not None:
        return float(order(r.scores))
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
    _check_names({"--where": where, "--rank-by": rank_by}, results)
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


def _check_names(expressions: Mapping[str, str | None], results: Sequence[Result]) -> None:
    """Raise InputError for an expression about a score that no image of the run has."""
    known = {name for r in results for name in r.scores}
    for option, text in expressions.items():
        for name in sorted(Expression(text).names - known if text is not None and results else ()):
            raise InputError(f"{option}: {shown(name)}: no image of this run has that score{nearest(name, known)}")
