"""`genkit filter`: decide again on a run's recorded scores, without a model."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit.datasets.export import Target, export
from genkit.errors import InputError, nearest, shown
from genkit.files import names_in
from genkit.pages.gallery import write_gallery
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.records import read_config, read_results, read_rows
from genkit.scoring.gates import Expression, check_seen
from genkit.scoring.names import names_of
from genkit.selection.choose import read_known
from genkit.selection.decide import decide, image_name, write_selection
from genkit.selection.picking import NONE, Picking


def refilter(
    folder: Path,
    where: str | None = None,
    rank_by: str | None = None,
    keep: int | None = None,
    out: Path | None = None,
    picking: Picking = NONE,
    target: Target | None = None,
) -> dict[str, Any]:
    """Decide again on a run's recorded scores: `genkit filter`. Rewrites selection.json and index.html; returns counts.

    where, rank_by, keep override every row's gate, rank_by and keep. out, target: a folder for copies of the kept
    pictures, and their form, see `export`. Needs no model (except for a reference folder) and no lock. Raises
    InputError for a folder that is not a run and for an unknown score.
    """
    if keep is not None and not 1 <= keep <= 100_000:
        raise InputError(f"--keep: {keep} is not within 1 to 100000")
    picking.check()
    target = target or Target()
    target.check(out)
    config = read_config(folder)
    if config is None:
        raise InputError(f"{shown(str(folder))}: holds no run.json: not a run folder")
    collecting = gc.isenabled()
    gc.disable()  # nothing here becomes garbage, and collecting takes half of the time
    try:
        rows = read_rows(folder)
        asked = {str(row.id) for row in rows}
        results = _present(folder, [r for r in read_results(folder) if r.id in asked])
        _check(rows, results, where, rank_by)
        picking.check_rows(keep is not None or any(row.keep is not None for row in rows))
        known = read_known(folder, config, results, picking, [where, rank_by, *(row.rank_by for row in rows)])
        selection = decide(rows, results, where, rank_by, keep, picking, known)
        summary = {"run": str(folder), "rows": len(rows), "images": len(results), "kept": selection["kept"]}
        if out is not None:
            found = {image_name(r): r for r in results}  # in the order of the rows, whenever each was finished
            kept = [found[name] for name, image in selection["images"].items() if image["kept"]]
            summary |= {"out": str(out), "copied": export(folder, kept, out, target)}
        write_selection(folder, selection)
        write_gallery(folder, rows, results, selection, config)
    finally:
        if collecting:
            gc.enable()
    return summary


def _present(folder: Path, results: list[Result]) -> list[Result]:
    """Return the records; those whose picture was deleted since become failed ones."""
    names: dict[str, set[str]] = {}
    for k, r in enumerate(results):
        if r.status != "done":
            continue
        under, _, name = str(r.file).rpartition("/")
        if under not in names:  # listing folders is faster than checking every file
            try:
                names[under] = set(names_in(folder / under))
            except OSError:
                names[under] = set()
        if name not in names[under]:
            results[k] = dataclasses.replace(r, status="failed", reason="its file is missing", file=None)
    return results


def _check(rows: Sequence[Request], results: Sequence[Result], where: str | None, rank_by: str | None) -> None:
    """Raise InputError, naming the option, for an invalid expression or one that uses a score that no image has."""
    labels = {label for row in rows for label in row.labels or ()}
    known = names_of(r.scores for r in results) | {"sim"}
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
        check_seen(option, expression, [r.scores for r in results])
