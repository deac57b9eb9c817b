"""Functions of expressions over detected boxes: count, area, relative position, overlap, colour. No model is needed.

A record of a run holds the boxes of a detector: scores["boxes"], a list of [label, score, x0, y0, x1, y1, colour] in
pixels, and scores["detected"], {"words": those that were looked for, "size": [width, height], "threshold": the
detector's default, "floor": boxes with lower scores were not stored}.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from genkit.errors import InputError, nearest, shown

FIELDS = frozenset({"boxes", "detected"})  # keys of scores whose values are not numbers
SAME = 0.5  # IoU threshold of non-maximum suppression: boxes of one word that overlap more are counted once
MARGIN = 0.1  # share of both boxes' sizes by which their centres must differ (GenEval, Ghosh et al. 2023)
COLORS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
MOST_WORD = 200  # characters

Corners = tuple[float, float, float, float]
Stored = Sequence[Any]  # label, score, x0, y0, x1, y1, colour


@dataclasses.dataclass(frozen=True)
class Box:
    """A detected box: its word, a score from 0 to 1, its corners in pixels, and its main colour."""

    label: str
    score: float
    x0: float
    y0: float
    x1: float
    y1: float
    color: str | None = None

    def to_json(self) -> list[Any]:
        """Return the box as it is stored in a record."""
        place = [round(v, 2) for v in (self.x0, self.y0, self.x1, self.y1)]
        return [self.label, round(self.score, 6), *place, self.color]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A function of boxes: for how many words, whether it is true or false, and the upper bound of its number."""

    words: int
    value: Callable[..., Any]  # (boxes of each word, size) -> value
    truth: bool = False
    high: float = math.inf


def check_word(word: Any) -> str:
    """Return the word. Raises InputError for an empty or too long one, and for control characters."""
    if not isinstance(word, str) or not word.strip():
        raise InputError(f"{shown(word)} is nothing to look for: give a word such as 'cat'")
    if len(word) > MOST_WORD or any(ord(c) < 32 for c in word):
        raise InputError(f"{shown(word)} is longer than {MOST_WORD} characters, or holds control characters")
    return word


def check_color(color: Any) -> str:
    """Return the name of a basic colour ("gray" is "grey"). Raises InputError for another."""
    name = {"gray": "grey", "violet": "purple"}.get(str(color).lower(), str(color).lower())
    if name not in COLORS:
        raise InputError(f"{shown(color)} is no basic colour{nearest(color, COLORS)}; there are {', '.join(COLORS)}")
    return name


def check_threshold(value: Any) -> float:
    """Return a score threshold given in an expression. Raises InputError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InputError(f"{shown(value)} is no threshold: a number above 0 and below 1, as in count['cat', 0.3]")
    return float(value)


def lacking(scores: Mapping[str, Any], words: Collection[str], threshold: float | None = None) -> str | None:
    """Return why the boxes of these words are not known for a picture, or None if they are."""
    found = scores.get("detected")
    if not isinstance(found, Mapping) or not isinstance(scores.get("boxes"), list):
        return "this image was not searched with a detector"
    missing = next((word for word in words if word not in found["words"]), None)
    if missing is not None:
        return f"{shown(missing)} was not looked for in this image{nearest(missing, found['words'])}"
    if (found["threshold"] if threshold is None else threshold) < found["floor"]:
        return f"boxes that score less than {found['floor']:g} are not stored"
    return None


def boxes_of(scores: Mapping[str, Any], word: str, threshold: float | None) -> list[Stored]:
    """Return the stored boxes of a word with a score above the threshold, highest first. Raises InputError."""
    why = lacking(scores, [word], threshold)
    if why is not None:
        raise InputError(why)
    least = scores["detected"]["threshold"] if threshold is None else threshold
    found = [box for box in scores["boxes"] if box[0] == word and box[1] is not None and box[1] > least]
    return sorted(found, key=lambda box: -box[1])


def separate(boxes: Sequence[Stored], most: float = SAME) -> list[Stored]:
    """Return boxes, highest score first, after non-maximum suppression with the IoU threshold `most`."""
    kept: list[Stored] = []
    for box in boxes:
        if all(iou(box[2:6], other[2:6]) <= most for other in kept):
            kept.append(box)
    return kept


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes (x0, y0, x1, y1); 0 where both are empty."""
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, across) * max(0.0, down)
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / both if both > 0 else 0.0


def _area(boxes: list[Stored], size: Sequence[float]) -> float:
    """Return the share of the picture that the union of the boxes covers."""
    if not boxes or size[0] * size[1] <= 0:
        return 0.0
    import numpy as np

    corners = np.array([box[2:6] for box in boxes], dtype=float)
    xs, ys = np.unique(corners[:, [0, 2]]), np.unique(corners[:, [1, 3]])
    covered = np.zeros((len(ys), len(xs)), dtype=bool)
    for x0, y0, x1, y1 in corners:
        covered[
            np.searchsorted(ys, y0) : np.searchsorted(ys, y1), np.searchsorted(xs, x0) : np.searchsorted(xs, x1)
        ] = 1
    total = np.diff(ys, append=ys[-1]) @ covered @ np.diff(xs, append=xs[-1])
    return min(1.0, float(total) / (size[0] * size[1]))


def _offset(one: list[Stored], other: list[Stored]) -> tuple[float, float]:
    """Return the direction (x to the right, y down) from the best box of `other` to that of `one`.

    GenEval's rule: along each axis the distance of the centres minus MARGIN times both boxes' sizes, at least 0,
    divided by the distance of the centres.
    """
    if not one or not other:
        return 0.0, 0.0
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = one[0][2:6], other[0][2:6]
    away = ((ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2)
    margins = (MARGIN * (ax1 - ax0 + bx1 - bx0), MARGIN * (ay1 - ay0 + by1 - by0))
    length = math.hypot(*away)
    clear = [math.copysign(max(0.0, abs(d) - m), d) for d, m in zip(away, margins, strict=True)]
    return (clear[0] / length, clear[1] / length) if length > 1e-9 else (0.0, 0.0)


def _overlap(size: Sequence[float], one: list[Stored], other: list[Stored]) -> float:
    return iou(one[0][2:6], other[0][2:6]) if one and other else 0.0


def _color(size: Sequence[float], boxes: list[Stored]) -> str | None:
    return boxes[0][6] if boxes and len(boxes[0]) > 6 else None


MEASURES: dict[str, Measure] = {
    "count": Measure(1, lambda size, boxes: len(separate(boxes))),
    "area": Measure(1, lambda size, boxes: _area(boxes, size), high=1.0),
    "color": Measure(1, _color),
    "left_of": Measure(2, lambda size, a, b: _offset(a, b)[0] < -0.5, truth=True),
    "right_of": Measure(2, lambda size, a, b: _offset(a, b)[0] > 0.5, truth=True),
    "above": Measure(2, lambda size, a, b: _offset(a, b)[1] < -0.5, truth=True),
    "below": Measure(2, lambda size, a, b: _offset(a, b)[1] > 0.5, truth=True),
    "overlap": Measure(2, _overlap, high=1.0),
}
BRACKETS = tuple(name for name, measure in MEASURES.items() if measure.words == 1)
RELATIONS = tuple(name for name, measure in MEASURES.items() if measure.words == 2)


def reader(name: str, words: Sequence[str], threshold: float | None) -> Callable[[Mapping[str, Any]], Any]:
    """Return the function scores -> value of a measure. It raises InputError for boxes that are not known."""
    measure = MEASURES[name]

    def value(scores: Mapping[str, Any]) -> Any:
        try:
            found = [boxes_of(scores, word, threshold) for word in words]
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        return measure.value(scores["detected"]["size"], *found)

    return value


def counts(scores: Mapping[str, Any]) -> dict[str, int]:
    """Return the count of each word at the detector's threshold; {} for a picture without a detector's record."""
    words = (scores.get("detected") or {}).get("words") or ()
    return {word: reader("count", [word], None)(scores) for word in words if lacking(scores, [word]) is None}
