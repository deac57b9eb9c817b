"""Look again at finished pictures of a run whose rows now ask for other words or answers, without drawing them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError
from genkit.pictures.images import read_image
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.scoring.senses import Asked

if TYPE_CHECKING:
    from genkit.runs.run import Run
    from genkit.scoring.panel import Panel

TOGETHER = 8  # pictures in memory


def lacking(row: Request, scores: Mapping[str, Any], classify: bool) -> Asked:
    """Return what vision models still have to be asked about a picture.

    All words of the row if they differ from those that were looked for, and the questions without an answer. classify:
    whether the run has a classifier.
    """
    words = tuple(row.sought)
    if list(words) == (scores.get("detected") or {}).get("words"):
        words = ()
    answers = scores.get("answers") or {}
    return Asked(words, tuple(q for q in row.questions if q not in answers), classify and "classes" not in scores)


def unseen(run: Run) -> list[Result]:
    """Return the finished images about which their rows ask vision models something new."""
    classify = "classifier" in run.config["binding"]
    return [
        r for key, r in run.done.items() if r.status == "done" and lacking(run.rows[key[0]], r.scores, classify)
    ]  # fmt: skip


def look_again(run: Run, panel: Panel, stale: list[Result]) -> Iterator[int]:
    """Look at the files of `stale` images and record what is seen in them; yield how many so far.

    Each batch is on the disk before the next is read, so that a killed run goes on from there. Raises HostError.
    """
    from genkit.scoring.clip import as_tensor

    classify = "classifier" in run.config["binding"]
    for start in range(0, len(stale), TOGETHER):
        # `stale` may hold records from before a rescore
        part = [run.done[r.id, r.index] for r in stale[start : start + TOGETHER]]
        pictures = []
        for r in part:
            try:
                pictures.append(as_tensor(read_image(run.folder / str(r.file)))[0])
            except InputError as error:
                raise InputError(f"row {r.id}, image {r.index}: {error}") from None
        seen = panel.senses.look(pictures, [lacking(run.rows[r.id], r.scores, classify) for r in part])
        run.rescore([
            dataclasses.replace(r, scores=_with(r.scores, found)) for r, found in zip(part, seen, strict=True)
        ])  # fmt: skip
        yield start + len(part)


def _with(scores: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return scores with what was found; answers to other questions stay."""
    answers = {**(scores.get("answers") or {}), **found.get("answers", {})}
    return {**scores, **found, **({"answers": answers} if answers else {})}
