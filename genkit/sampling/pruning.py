"""Pruning: part-way, a row's predicted pictures are scored, and only the best of its images are finished."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from genkit.errors import InputError
from genkit.rows.request import Request
from genkit.rows.result import Result, value_of
from genkit.sampling.engine import Trajectory
from genkit.sampling.guidance import rows_of
from genkit.scoring.gates import Expression

EARLY = "early"  # name of the predicted picture's score in the records of finished and of pruned images
Key = tuple[str, int]


def mark_of(calls: int, after: float) -> int:
    """Return after how many of `calls` network calls images are scored: at least 1, and before the last."""
    return min(max(1, round(calls * after)), calls - 1)


def survivors(early: Mapping[int, float], keep: int) -> set[int]:
    """Return the `keep` best images of {index: early score}; ties go to the lower index, NaN is worst."""
    order = sorted(early, key=lambda k: (math.isnan(early[k]), -early[k] if early[k] == early[k] else 0.0, k))
    return set(order[:keep])


@dataclasses.dataclass
class _Row:
    request: Request
    early: dict[int, float]  # of images that are recorded, or have reached the mark
    missing: int  # images that have not reached the mark
    parked: list[tuple[Trajectory, Result]] = dataclasses.field(default_factory=list)
    decided: bool = False


class Pruning:
    """The rows that prune; their paused images wait outside the slots until the last one reaches the mark.

    The decision depends only on the early scores of the row's images. They are recorded, so a resumed run decides the
    same. earlier: returns a row's results of earlier starts. judge: decodes and scores latents. Raises InputError for a
    row whose rank_by needs a scorer if there is none.
    """

    def __init__(
        self,
        earlier: Callable[[Request], list[Result]],
        judge: Callable[[list[Trajectory]], list[Result]],
        scored: bool,
    ) -> None:
        self.earlier, self.judge, self.scored = earlier, judge, scored
        self.resumed: deque[Trajectory] = deque()
        self.early: dict[Key, float] = {}  # early scores of the images that were resumed
        self._rows: dict[str, _Row] = {}

    @property
    def waiting(self) -> bool:
        """Whether images are paused or about to resume."""
        return bool(self.resumed) or any(row.parked for row in self._rows.values())

    def mark(self, trajectory: Trajectory) -> None:
        """Set a new trajectory to pause at the mark, if its row prunes and has not decided yet."""
        request = trajectory.tag[0]
        if request.prune is None or trajectory.plan.nfe < 2:
            return
        row = self._row(request)
        if not row.decided:
            trajectory.pause = mark_of(trajectory.plan.nfe, request.prune["after"])

    def lose(self, request: Request) -> None:
        """Count an image that failed before it could be ranked."""
        if request.prune is not None:
            self._row(request).missing -= 1

    def park(self, ended: list[Trajectory]) -> list[Trajectory]:
        """Keep the trajectories that paused, after scoring their predicted pictures; return the others."""
        paused = [t for t in ended if t.pause and not t.error]
        for t in ended:
            if t.pause and t.error:
                self.lose(t.tag[0])
        shapes: dict[tuple[int, ...], list[Trajectory]] = {}
        for t in paused:
            shapes.setdefault(tuple(t.latent.shape), []).append(t)
        for same in shapes.values():
            previews = [preview_of(t) for t in same]
            found = {(r.id, r.index): r for r in self.judge(previews)}
            for t in same:  # one that is not finite in half precision is redone, and comes back later
                request, index, _ = t.tag
                result = found.get((str(request.id), index))
                if result is not None:
                    row = self._row(request)
                    row.missing -= 1
                    row.early[index] = _early(request, result)
                    row.parked.append((t, result))
        return [t for t in ended if not t.pause or t.error]

    def decide(self, everything: bool = False) -> list[Result]:
        """Decide on rows whose images have all reached the mark; return the records of the pruned images.

        everything: decide also on rows of which some images will never reach it.
        """
        pruned: list[Result] = []
        for row in self._rows.values():
            if not row.parked or (row.missing > 0 and not everything):
                continue
            keep = row.request.whole
            stay = survivors(row.early, keep)
            for trajectory, result in row.parked:
                if result.index in stay:
                    self._resume(trajectory, row.early[result.index])
                else:
                    pruned.append(_pruned(trajectory, result, row.early[result.index], keep, len(row.early)))
            row.parked, row.decided = [], True
        return pruned

    def take(self, free: float, alone: bool) -> list[Trajectory]:
        """Return resumed trajectories of a total cost up to `free`."""
        taken: list[Trajectory] = []
        while self.resumed and (self.resumed[0].cost <= free or (alone and not taken)):
            taken.append(self.resumed.popleft())
            free -= taken[-1].cost
        return taken

    def _resume(self, trajectory: Trajectory, early: float) -> None:
        trajectory.pause, trajectory.x0 = 0, None
        request, index, _ = trajectory.tag
        self.early[str(request.id), index] = early
        self.resumed.append(trajectory)

    def _row(self, request: Request) -> _Row:
        if str(request.id) not in self._rows:
            if not self.scored and Expression(request.rank_by or "clip", request.labels, names=None).needs_scorer:
                raise InputError("prune: needs a scorer to say which images go on, and there is none")
            known = {r.index: _recorded(r) for r in self.earlier(request)}
            self._rows[str(request.id)] = _Row(request, known, request.num_images - len(known))
        return self._rows[str(request.id)]


def preview_of(trajectory: Trajectory) -> Trajectory:
    """Return a paused trajectory with its predicted x0 as its latent, to be decoded and scored."""
    assert trajectory.x0 is not None
    return dataclasses.replace(trajectory, latent=trajectory.x0)


def _early(request: Request, result: Result) -> float:
    if result.status != "done":
        return math.nan
    order = None if request.rank_by is None else Expression(request.rank_by, request.labels, names=None)
    return round(value_of(result, order), 6)


def _recorded(result: Result) -> float:
    """Return the early score of a record; a finished image without one is ranked first, so it stays."""
    found = result.scores.get(EARLY, math.inf)
    return math.nan if found is None else float(found)


def _pruned(trajectory: Trajectory, result: Result, early: float, keep: int, of: int) -> Result:
    calls, plan = trajectory.step, trajectory.plan
    scales = None if trajectory.scales is None else trajectory.scales[:calls]
    scores: dict[str, Any] = {**result.scores, EARLY: early}
    return dataclasses.replace(
        result, status="pruned", reason=f"not among the best {keep} of {of} after call {calls} of {plan.nfe}",
        scores=scores, nfe=rows_of(calls, scales, trajectory.weights), pixels=None,
    )  # fmt: skip
