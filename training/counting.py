"""Metrics of a detector on composed scenes: the share of right counts, and AP at an IoU of 0.5."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from genkit.scoring.boxes import SAME, iou, separate

FLOOR = 0.05  # boxes with lower scores are ignored
THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 16))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result for one text in one scene.

    boxes: detections (label, score, corners), best first. truth: corners of the ground-truth boxes. together: number
    of objects of all texts in the scene.
    """

    boxes: list[Any]
    truth: list[tuple[float, ...]]
    together: int

    def counted(self, threshold: float) -> int:
        """Return the number of detections above the threshold, as `count['…']` of an expression does."""
        return sum(box[1] > threshold for box in self.boxes)


def verdicts(logits: torch.Tensor, boxes: torch.Tensor, scenes: Sequence[Any]) -> list[Verdict]:
    """Return the detections of every text of the scenes. logits: (B, T, Q); boxes: (B, T, 4), centre and size, 0 to 1.

    The texts of a scene's objects are queried together, as a gate that names them does: each box gets the best of
    them. Each absent text is queried alone. Non-maximum suppression does not depend on the threshold, so that one pass
    serves all thresholds.
    """
    found = []
    corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1).cpu()
    for n, scene in enumerate(scenes):
        chances = logits[n].sigmoid().cpu()
        present = max(scene.owners) + 1
        best = chances[:, :present].argmax(dim=1)
        truth = np.concatenate([scene.boxes[:, :2] - scene.boxes[:, 2:] / 2,
                                scene.boxes[:, :2] + scene.boxes[:, 2:] / 2], axis=1)  # fmt: skip
        for number in range(len(scene.words)):
            scores = chances[:, number]
            mine = (best == number) if number < present else torch.ones_like(best, dtype=torch.bool)
            places = (mine & (scores > FLOOR)).nonzero().flatten().tolist()
            places.sort(key=lambda place: -float(scores[place]))
            boxed = separate([(number, float(scores[p]), *corners[n, p].tolist()) for p in places])
            own = [tuple(map(float, box)) for box, owner in zip(truth, scene.owners, strict=True) if owner == number]
            found.append(Verdict(boxed, own, len(scene.owners)))
    return found


def threshold_of(found: Sequence[Verdict]) -> float:
    """Return the threshold with the highest sum of the shares of right counts for present and for absent texts."""
    there, absent = [v for v in found if v.truth], [v for v in found if not v.truth]

    def right(threshold: float) -> float:
        return _share(there, threshold) + _share(absent, threshold)

    return max(THRESHOLDS, key=lambda threshold: (right(threshold), -threshold))


def measures(found: Sequence[Verdict], threshold: float) -> dict[str, Any]:
    """Return the shares of right counts and AP50.

    count: the mean of count_1, count_2, …, the shares for one, two, … objects of a text; absent: the share of absent
    texts with a count of 0.
    """
    there = [v for v in found if v.truth]
    numbers = sorted({len(v.truth) for v in there})
    by_number = {n: _share([v for v in there if len(v.truth) == n], threshold) for n in numbers}
    return {
        "threshold": threshold, "count": float(np.mean(list(by_number.values()))),
        **{f"count_{n}": share for n, share in by_number.items()},
        "absent": _share([v for v in found if not v.truth], threshold), "ap50": average_precision(there),
    }  # fmt: skip


def _share(found: Sequence[Verdict], threshold: float) -> float:
    return float(np.mean([v.counted(threshold) == len(v.truth) for v in found])) if found else 1.0


def average_precision(found: Sequence[Verdict], overlap: float = SAME) -> float:
    """Return the area under the precision-recall curve of all boxes, with precision made monotonic as COCO does."""
    hits: list[tuple[float, bool]] = []
    for verdict in found:
        left = list(verdict.truth)
        for box in verdict.boxes:
            near = max(left, key=lambda own, box=box: iou(box[2:6], own), default=None)  # type: ignore[misc]
            hit = near is not None and iou(box[2:6], near) > overlap
            if hit and near is not None:
                left.remove(near)
            hits.append((box[1], hit))
    total = sum(len(v.truth) for v in found)
    hits.sort(key=lambda pair: -pair[0])
    right = np.cumsum([hit for _, hit in hits])
    if not total or not len(right):
        return 0.0
    precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
    return float(np.sum(precision * np.diff(right, prepend=0)) / total)
