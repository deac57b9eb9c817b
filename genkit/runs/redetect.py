"""Look again at finished pictures of a run whose rows now ask for other words, without drawing them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from genkit.errors import InputError
from genkit.pictures.images import read_image
from genkit.rows.result import Result

if TYPE_CHECKING:
    from genkit.runs.run import Run
    from genkit.scoring.panel import Panel

TOGETHER = 8  # pictures in memory


def unseen(run: Run) -> list[Result]:
    """Return the finished images in which other words were looked for than their rows ask for."""
    return [
        r for key, r in run.done.items()
        if r.status == "done" and (words := run.rows[key[0]].sought)
        and (r.scores.get("detected") or {}).get("words") != words
    ]  # fmt: skip


def redetect(run: Run, panel: Panel, stale: list[Result]) -> Iterator[int]:
    """Look at the files of `stale` images and record their boxes; yield how many so far.

    Each batch is on the disk before the next is read, so that a killed run goes on from there. Raises HostError.
    """
    from genkit.scoring.clip import as_tensor

    for start in range(0, len(stale), TOGETHER):
        part = [run.done[r.id, r.index] for r in stale[start : start + TOGETHER]]  # scored again, perhaps
        pictures = []
        for r in part:
            try:
                pictures.append(as_tensor(read_image(run.folder / str(r.file)))[0])
            except InputError as error:
                raise InputError(f"row {r.id}, image {r.index}: {error}") from None
        seen = panel.seen(pictures, [run.rows[r.id].sought for r in part])
        run.rescore([dataclasses.replace(r, scores={**r.scores, **found}) for r, found in zip(part, seen, strict=True)])
        yield start + len(part)
