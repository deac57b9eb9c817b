"""The pictures that a row starts from: their paths, and masks that are given in words.

`mask` says what to draw anew; a segmenter finds it in `image` before anything is drawn (job/masks.py).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, PrivateAttr, field_validator, model_validator

from genkit.errors import InputError, shown
from genkit.files import user_path
from genkit.pictures.images import SUFFIXES, check_image

NUMBERS = {"mask_threshold": 0.5, "mask_grow": 0, "mask_invert": False}  # and what is assumed
FIELDS = ("mask", *NUMBERS)
MOST_GROWN = 512  # pixels
_FILES = (*SUFFIXES, ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")


class TextMask(BaseModel):
    """The fields of a row whose mask is given in words.

    mask_threshold: of the probability; mask_grow: pixels of the picture as it is drawn, to each side; mask_invert:
    after that. None is as in NUMBERS.
    """

    mask: Annotated[str, Field(max_length=1000)] | None = None
    mask_threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    mask_grow: Annotated[int, Field(ge=0, le=MOST_GROWN)] | None = None
    mask_invert: bool | None = None

    _segmenter: str = PrivateAttr("")  # SHA-256 of the weights that find the mask, by plan
    _found: bytes | None = PrivateAttr(None)  # the mask as a PNG, once it is found
    _empty: str = PrivateAttr("")  # what to say of one that is empty

    @field_validator("mask", mode="before")
    @classmethod
    def _check_mask(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, str):
            raise ValueError("must be text that says what to draw anew; a picture is `mask_image`")
        if value is not None and (not value.strip() or "\x00" in value):
            raise ValueError("must say what to draw anew")
        return value

    @model_validator(mode="after")
    def _check_masked(self) -> TextMask:
        stated = next((name for name in FIELDS if getattr(self, name) is not None), None)
        if stated is None:
            return self
        if self.mask is None:
            raise ValueError(f"{stated}: needs `mask`, which says in words what to draw anew")
        if getattr(self, "mask_image", None) is not None:
            raise ValueError(f"mask: {shown(self.mask)} does not go with mask_image: one of them is the mask")
        if getattr(self, "image", None) is None:
            raise ValueError("mask: needs `image`, the picture to start from")
        return self

    def keep_mask(self, other: TextMask) -> None:
        """Take over the mask that was found for another row, if it is of the same picture and words."""
        names = ("image", *FIELDS)
        if other._found is not None and all(getattr(self, name) is getattr(other, name) for name in names):
            self._found = other._found

    @property
    def mask_source(self) -> Any:
        """The mask as `read_mask` takes it: of `mask_image`, or what was found for `mask`; None without a mask.

        Raises InputError for a mask in words that nothing has looked for.
        """
        if self.mask is not None and self._found is None:
            raise InputError(f"mask: {shown(self.mask)} is to be found by a segmenter first: {NEEDED}")
        return getattr(self, "mask_image", None) if self.mask is None else self._found


NEEDED = "give --segmenter (in Python `generate(segmenter=…)`, or genkit.job.masks.find_masks)"


def is_picture(value: Any) -> bool:
    """Whether `mask` in a table names a picture, as in other tools, and is no text for a segmenter."""
    if not isinstance(value, str):
        return value is not None
    return value.strip().lower().endswith(_FILES) or bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|(data|file):", value))


def with_masks(filled: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """Return defaults for the fields of a row without those of masks that have no effect beside what the row states."""
    if stated.get("mask_image") is not None:
        return {name: value for name, value in filled.items() if name not in FIELDS}
    if stated.get("mask") is not None:
        return {name: value for name, value in filled.items() if name != "mask_image"}
    if filled.get("mask") is None:
        return {name: value for name, value in filled.items() if name not in NUMBERS}
    return filled


def picture_path(folder: Path, field: str, text: str) -> str:
    """Return the absolute path of a picture that a table in `folder` names. Raises InputError naming the field."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|(data|file):", text):
        raise InputError(f"{field}: {shown(text)} is a URL; pictures are read from local files only")
    if len(text) > 4096:
        raise InputError(f"{field}: {shown(text)} is too long for a path")
    path = Path(os.path.abspath(folder), user_path(text))
    if "\\" in text and not path.exists():  # written on Windows
        path = Path(os.path.abspath(folder), user_path(text.replace("\\", "/")))
    try:
        check_image(path, contained=True, mask=field == "mask_image")
    except InputError as error:
        raise InputError(f"{field}: {error}") from None
    return str(path)
