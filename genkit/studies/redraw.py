"""Redraw rows of a run, and score the x0 prediction of every image at several marks during sampling."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genkit.errors import InputError
from genkit.job.load import reopen
from genkit.job.masks import recall_masks
from genkit.progress import Progress
from genkit.rows.request import Request
from genkit.rows.result import Result, value_of
from genkit.sampling.draws import Draws
from genkit.sampling.engine import Trajectory
from genkit.sampling.pruning import Pruning, mark_of, preview_of
from genkit.sampling.stream import Stream
from genkit.studies.early_scores import MARKS, Watched, order_of


class _Watch(Pruning):
    """Scores every image at every mark, and prunes none."""

    def __init__(self, judge: Any) -> None:
        super().__init__(lambda request: [], judge, scored=True)
        self.looks, self.looking = 0, 0.0  # number of scored predictions, and the seconds that this took
        self.seen: dict[tuple[str, int], list[float]] = defaultdict(list)

    def mark(self, trajectory: Trajectory) -> None:
        trajectory.pause = mark_of(trajectory.plan.nfe, MARKS[0])

    def lose(self, request: Request) -> None:
        raise InputError(f"row {request.id}: an image of it could not be redrawn")

    def park(self, ended: list[Trajectory]) -> list[Trajectory]:
        for trajectory in [t for t in ended if t.pause and not t.error]:
            request, index, _ = trajectory.tag
            seen = self.seen[str(request.id), index]
            here = [m for m in MARKS if mark_of(trajectory.plan.nfe, m) == trajectory.step]
            began = time.monotonic()
            judged = self.judge([preview_of(trajectory)])
            self.looks, self.looking = self.looks + 1, self.looking + time.monotonic() - began
            seen += [_value(request, judged)] * len(here)  # with few steps several marks fall on the same call
            left = MARKS[len(seen) :]
            trajectory.pause = mark_of(trajectory.plan.nfe, left[0]) if left else 0
            self.resumed.append(trajectory)
        return [t for t in ended if t not in self.resumed]


def redraw(run: Path, rows: Sequence[Request], device: str, quiet: bool) -> tuple[list[Watched], float]:
    """Draw rows of a run again. Returns the early and final scores of each row's images, and the time of decoding and
    scoring as a share of the time of an image.
    """
    recall_masks(run, rows)
    generator, scorer, slots, seed = reopen(run, device)
    draws = Draws(rows)
    stream = Stream(generator, draws, scorer, seed)
    watch = stream.pruning = _Watch(stream._finish)
    found: dict[str, list[Result]] = defaultdict(list)
    began = time.monotonic()
    with Progress(draws.total, quiet=quiet) as progress:
        for result in stream.run(slots):
            progress.advance(result.status == "failed", result.status == "done", draws.total)
            found[result.id].append(result)
    seconds = (time.monotonic() - began - watch.looking) / max(1, progress.done)  # of one image, scored once
    look = watch.looking / max(1, watch.looks) / seconds
    watched = []
    for row in rows:
        results = sorted(found[str(row.id)], key=lambda r: r.index)
        early = [watch.seen[r.id, r.index] for r in results]
        if all(r.status == "done" and len(seen) == len(MARKS) for r, seen in zip(results, early, strict=True)):
            final = np.array([value_of(r, order_of(row)) for r in results])
            watched.append(Watched(final, np.array(early)))
    if not watched:
        raise InputError("--prune: no row could be redrawn whole; are there enough steps, and scores to rank by?")
    return watched, min(1.0, look)


def _value(request: Request, judged: list[Result]) -> float:
    done = [r for r in judged if r.status == "done"]
    return value_of(done[0], order_of(request)) if done else float("nan")
