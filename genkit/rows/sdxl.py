"""What SDXL reads beside the prompt: sizes, a crop, aesthetic scores, and a prompt for its second text encoder.

Podell et al. 2023 (SDXL), section 2.2. Pairs are width first, as `size` is; diffusers' tuples are (height, width) and
(top, left).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, field_validator

from genkit.errors import InputError, shown

if TYPE_CHECKING:
    from genkit.components.geometry import Geometry

SIZES = ("original_size", "target_size", "negative_original_size", "negative_target_size")
CROPS = ("crop", "negative_crop")
PROMPTS = ("prompt_2", "negative_prompt_2")
SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}  # what the refiner assumes, as in diffusers
BASE = (*PROMPTS, "target_size", "negative_target_size")  # what the refiner does not read
FIELDS = (*PROMPTS, *SIZES, *CROPS, *SCORES)
MOST = 65_536  # pixels a side
# Names in other tools; those of diffusers' crops say that top comes first.
TOP_FIRST = {"crops_coords_top_left": "crop", "negative_crops_coords_top_left": "negative_crop"}
ALIASES = {**TOP_FIRST, "positive_style_prompt": "prompt_2", "negative_style_prompt": "negative_prompt_2"}

Score = Annotated[float, Field(ge=0, le=10)]


class Conditioning(BaseModel):
    """The fields of a row that only SDXL reads; see `time_ids` for what is assumed where they are None."""

    prompt_2: Annotated[str, Field(max_length=100_000)] | None = None
    negative_prompt_2: Annotated[str, Field(max_length=100_000)] | None = None
    original_size: Any = None
    crop: Any = None
    target_size: Any = None
    negative_original_size: Any = None
    negative_crop: Any = None
    negative_target_size: Any = None
    aesthetic_score: Score | None = None
    negative_aesthetic_score: Score | None = None

    @field_validator(*SIZES)
    @classmethod
    def _check_size(cls, value: Any) -> list[int] | None:
        return None if value is None else _pair(value, 1, 'width and height, as in [1024, 768] or "1024x768"')

    @field_validator(*CROPS)
    @classmethod
    def _check_crop(cls, value: Any) -> list[int] | None:
        return None if value is None else _pair(value, 0, "what is cut off at the left and at the top, as in [0, 128]")

    @field_validator(*PROMPTS)
    @classmethod
    def _check_prompt(cls, value: str | None) -> str | None:
        if value is not None and "\x00" in value:
            raise ValueError("holds a NUL character")
        return value or None


def _pair(value: Any, least: int, meaning: str) -> list[int]:
    """Return two whole numbers from `least`, of a list or of a text. Raises ValueError."""
    if isinstance(value, str):
        match = re.fullmatch(r"\[?\s*(\d{1,6})\s*[x×,; ]\s*(\d{1,6})\s*\]?", value.strip().lower())
        value = [int(part) for part in match.groups()] if match else None
    if isinstance(value, list | tuple):
        value = [int(v) if isinstance(v, float) and v.is_integer() else v for v in value]
        if [type(v) for v in value] == [int, int] and all(least <= v <= MOST for v in value):
            return value
    raise ValueError(f"must be two whole numbers from {least} to {MOST}: {meaning}")


def width_first(key: Any, value: Any) -> Any:
    """Return the value of a row's key; of diffusers' crops, (top, left), as [left, top]. Raises InputError."""
    if not isinstance(key, str) or re.sub(r"[\s_-]+", "_", key.strip().lower()) not in TOP_FIRST:
        return value
    try:
        return _pair(value, 0, "the top and the left, as in [128, 0]")[::-1]
    except ValueError as error:
        raise InputError(f"{key}: {shown(value)} {error}") from None


def check_conditioning(row: Conditioning, geometry: Geometry) -> None:
    """Raise InputError for a field that the model does not read."""
    for field in FIELDS:
        value = getattr(row, field)
        if value is None:
            continue
        if geometry.refines and field in BASE:
            raise InputError(f"{field}: {shown(value)}: SDXL's refiner does not read it, and this model is one")
        if field in SCORES and not geometry.scored:
            raise InputError(f"{field}: {shown(value)}: only SDXL's refiner reads it, and this model is none")
        if not geometry.sized:
            raise InputError(f"{field}: {shown(value)}: only SDXL reads it, and this model is none")


def stated_prompts(row: Any) -> list[tuple[str, str]]:
    """Return (field, text) of each prompt that a row states."""
    fields = ("prompt", "negative_prompt", *PROMPTS)
    return [(field, getattr(row, field)) for field in fields if getattr(row, field)]


def texts_of(row: Any) -> tuple[list[str], list[str]]:
    """Return [prompt, negative prompt] of the first text encoder, and of the second; one not stated is the other's."""
    firsts = [row.prompt, row.negative_prompt]
    return firsts, [row.prompt_2 or firsts[0], row.negative_prompt_2 or firsts[1]]


def time_ids(row: Any, width: int, height: int, refines: bool = False) -> tuple[list[float], list[float]]:
    """Return SDXL's time_ids of a row drawn at width x height, for the prompt and for the negative prompt, in pixels.

    Each is original height and width, crop top and left, target height and width; for the refiner the aesthetic score
    replaces the target. Sizes that are not stated are the picture's own, crops are 0. Negative values that are not
    stated equal the positive ones, except the crop: with the refiner, and beside negative sizes without an initial
    picture (as in diffusers' text-to-image pipeline), it is 0.
    """
    size = [width, height]
    original, crop, target = row.original_size or size, row.crop or [0, 0], row.target_size or size
    sizes = row.negative_original_size, row.negative_target_size
    uncropped = refines or (row.image is None and any(sizes))
    without = row.negative_crop or ([0, 0] if uncropped else crop)
    pairs = [original, crop, target], [sizes[0] or original, without, sizes[1] or target]
    found = [[float(v) for pair in side for v in reversed(pair)] for side in pairs]
    if refines:
        scores = [default if getattr(row, name) is None else getattr(row, name) for name, default in SCORES.items()]
        found = [[*ids[:4], float(score)] for ids, score in zip(found, scores, strict=True)]
    return found[0], found[1]
