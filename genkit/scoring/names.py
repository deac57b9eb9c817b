"""The scores that expressions may use: their names, ranges, and what is needed to compute each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from genkit.errors import InputError, shown
from genkit.scoring import boxes, said

ALONE = -1.0  # `sim` of the image that is selected first in a row
SHARPEST = 1020.0**2  # the Laplacian of levels 0 to 255 is within +-4 * 255, so its variance is at most this


@dataclasses.dataclass(frozen=True)
class Score:
    """The range of a score, whether it is true or false instead, and what it needs: "clip", "aesthetic", …"""

    low: float = -math.inf
    high: float = math.inf
    truth: bool = False
    needs: str = ""


SCORES = {
    "clip": Score(-1.0, 1.0, needs="clip"),
    "clip_margin": Score(-2.0, 2.0, needs="clip"),
    "clip_z": Score(needs="clip"),
    "aesthetic": Score(needs="aesthetic"),
    "sim": Score(-1.0, 1.0, needs="selection"),
    "sharpness": Score(0.0, SHARPEST),
    "brightness": Score(0.0, 1.0),
    "nan": Score(truth=True),
    "flat": Score(truth=True),
}
CLIP_SCORES = frozenset(name for name, score in SCORES.items() if score.needs == "clip")


def check_labels(labels: Collection[str]) -> None:
    """Raise InputError for a single label, for empty ones, and for two that are the same text to CLIP."""
    if len(labels) < 2:
        alone = shown(next(iter(labels))) if labels else "none"
        raise InputError(
            f"labels: {alone} is a single label, whose probability is 1 for any picture; give what else it could be"
        )
    seen: dict[str, str] = {}
    for label in labels:
        plain = " ".join(label.replace("_", " ").lower().split())
        if not plain:
            raise InputError("labels: must be different, non-empty texts")
        if plain in seen:
            raise InputError(f"labels: {shown(seen[plain])} and {shown(label)} are the same to CLIP: give one of them")
        seen[plain] = label


def known_scores(clip: bool, aesthetic: bool = False, others: Collection[str] = ()) -> frozenset[str]:
    """Return the names of the scores that a run computes with a CLIP model, an aesthetic head, and plugins."""
    given = {"": True, "clip": clip, "aesthetic": clip and aesthetic, "selection": False}
    return frozenset({name for name, score in SCORES.items() if given[score.needs]} | set(others))


def names_of(scores: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the names of the scores of images that are numbers or true or false: not p, boxes, classes, answers."""
    return {name for found in scores for name in found} - {"p", *boxes.FIELDS, *said.FIELDS}


def check_computed(
    field: str, text: str, names: Collection[str], labels: bool, computed: Collection[str],
    needed: Collection[str] = (), senses: Collection[str] = (),
) -> None:  # fmt: skip
    """Raise InputError for an expression (`text` of `field`) that uses one of `names` that is not `computed`.

    labels: whether it uses p. needed: the vision models that it needs. senses: those of the run.
    """
    for sense in needed:
        if sense not in senses:
            raise InputError(f"{field}: {shown(text)} {_MISSING[sense]}")
    if labels and "clip" not in computed:
        raise InputError(f"{field}: {shown(text)} {_MISSING['clip']}")
    if "sim" in names and "sim" in computed and "clip" not in computed:
        raise InputError(f"{field}: {shown(text)} {_MISSING['clip']}")
    for name in sorted(set(names) - set(computed)):
        raise InputError(f"{field}: {shown(text)} {_MISSING[SCORES[name].needs]}")


_MISSING = {
    "detector": "needs boxes of what pictures show, and there is no detector: give --detector",
    "classifier": "needs the labels of a classifier, and there is none: give --classifier",
    "captioner": "needs answers to questions, and there is no model that gives them: give --captioner",
    "clip": "needs a CLIP model, and there is none: give --clip",
    "aesthetic": "needs a head over CLIP embeddings, and there is none: give --aesthetic FILE and a CLIP model",
    "selection": (
        "reads sim, which is known only once pictures are chosen: not while drawing, but in genkit filter, and in "
        "rank_by without prune"
    ),
}
