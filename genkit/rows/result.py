"""The record of one image: a line of results.jsonl, and what the image is ranked by."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from genkit.scoring.gates import Expression, is_known

Scores = dict[str, Any]

_MEMORY = {"pixels", "embedding"}  # fields that are not recorded


@dataclasses.dataclass(slots=True)
class Result:
    """One finished, failed or pruned image: a line of results.jsonl, and in memory its pixels."""

    id: str
    index: int
    seed: int
    status: str = "done"  # done | failed | pruned
    reason: str | None = None
    file: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    scores: Scores = dataclasses.field(default_factory=dict)
    steps: int | None = None
    nfe: int | None = None
    seconds: float | None = None
    prompt: str = ""
    meta: dict[str, Any] | None = None
    fingerprint: str | None = None  # of the row; an image is drawn again when it changes
    pixels: Any = dataclasses.field(default=None, repr=False, compare=False)  # (height, width, 3) uint8 array
    embedding: Any = dataclasses.field(default=None, repr=False, compare=False)  # unit CLIP vector, float16 array

    @property
    def image(self) -> Any:
        """The picture as a PIL image; None if the image failed, or only its record was read."""
        if self.pixels is None:
            return None
        from PIL import Image

        return Image.fromarray(self.pixels)

    def to_json(self) -> dict[str, Any]:
        """Return the line of results.jsonl as a dictionary."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _MEMORY}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Result:
        """Return the record of a line of results.jsonl; unknown keys, of a newer genkit, are ignored."""
        try:
            return cls(**line)
        except TypeError:
            return cls(**{k: v for k, v in line.items() if k in cls.__slots__ and k not in _MEMORY})


def value_of(r: Result, order: Expression | None) -> float:
    """Return the value an image is ranked by; NaN if unknown."""
    if order is not None:
        return float(order(r.scores)) if is_known(order, r.scores) else math.nan
    if "clip" not in r.scores:
        return -float(r.index)
    return math.nan if r.scores["clip"] is None else float(r.scores["clip"])
