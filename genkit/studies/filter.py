"""`genkit filter`: decide again on a run's recorded scores, without a model."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from genkit.datasets.export import Target, export
from genkit.errors import InputError, shown
from genkit.pages.outcome import write_outcome
from genkit.runs.records import read_config, read_results, warn_of_damaged
from genkit.runs.table import Kept
from genkit.selection.decide import image_name
from genkit.selection.picking import NONE, Picking
from genkit.selection.verdicts import Question, select
from genkit.selection.votes import read_labels


def refilter(
    folder: Path,
    where: str | None = None,
    rank_by: str | None = None,
    keep: int | None = None,
    out: Path | None = None,
    picking: Picking = NONE,
    target: Target | None = None,
    votes: Path | None = None,
) -> dict[str, Any]:
    """Decide again on a run's recorded scores: `genkit filter`. Rewrites selection.json and index.html; returns counts.

    where, rank_by, keep override every row's gate, rank_by and keep. votes: a votes.csv, or a list of names; only
    pictures that are good there may be kept, whatever the rows' gates and keep say. out, target: a folder for copies of
    the kept pictures, and their form, see `export`. Needs no model (except for a reference folder) and no lock. Raises
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
    gc.disable()  # there are no reference cycles to free, and collecting takes half of the time
    try:
        good = None if votes is None else _good(folder, votes)
        ballot = None if votes is None else str(votes)
        selection = select(folder, config, Question(where, rank_by, keep, picking, good, ballot))
        table = selection.table
        warn_of_damaged(folder, table.damaged())
        summary = {"run": str(folder), "rows": len(table.rows), "images": len(table), "kept": selection.count}
        if out is not None:
            kept = Kept(table, selection.kept_images())
            summary |= {"out": str(out), "copied": export(folder, kept, out, target)}
        write_outcome(folder, selection, config)
    finally:
        if collecting:
            gc.enable()
    return summary


def _good(folder: Path, votes: Path) -> dict[str, bool]:
    """Return which pictures of a run are good: by votes.csv, or by being in a list. Raises InputError."""
    pictures = {image_name(r): r for r in read_results(folder)}
    return read_labels(votes, None, votes.suffix.lower() != ".csv", pictures).good
