"""One row of work, checked field by field before anything heavy loads, and the record of one finished image."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from genkit.errors import InputError, nearest, shown

SEED_LIMIT = 2**32  # torch's CPU generator reads 32 bits only: a larger seed would silently repeat a smaller one

# The other names that the field's users type, and ours for them.
ALIASES = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "n": "num_images",
    "num_images_per_prompt": "num_images",
    "sampler_name": "scheduler",
    "sampler": "scheduler",
    "denoising_strength": "strength",
    "init_image": "image",
}

Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Side = Annotated[int, Field(ge=8, le=8192)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Text = Annotated[str, Field(max_length=100_000)]
Scores = dict[str, Any]

_RESERVED = {"con", "prn", "aux", "nul", *(f"{p}{d}" for p in ("com", "lpt") for d in range(1, 10))}  # Windows devices
# What decides on the pixels; the other fields decide on keeping and labelling them.
_PIXEL_FIELDS = (
    "prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale",
    "width", "height", "scheduler", "strength", "image", "mask_image",
)  # fmt: skip


class Request(BaseModel):
    """One row: what to draw, how often, and which of the drawings to keep.

    Fields left at None are filled from the command line or the model (`filled`). `image` and `mask_image` are a path,
    or in Python a PIL image. Raises InputError, in one line, for an unknown field or a value out of range.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )

    id: str | None = None
    prompt: Text = ""
    negative_prompt: Text = ""
    seed: Seed | Annotated[list[Seed], Field(min_length=1, max_length=100_000)] | None = None
    num_images: Count = 1
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    width: Side | None = None
    height: Side | None = None
    scheduler: str | dict[str, Any] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    image: Any = None
    mask_image: Any = None
    keep: Count | None = None
    gate: Annotated[str, Field(max_length=2000)] | None = None
    rank_by: Annotated[str, Field(max_length=2000)] | None = None
    max_images: Count | None = None
    labels: Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = None
    meta: dict[str, Any] | None = None

    def __init__(self, **fields: Any) -> None:
        if isinstance(fields.get("seed"), list) and "num_images" not in fields:
            fields["num_images"] = max(1, len(fields["seed"]))
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InputError(_describe(error)) from None

    @field_validator("id")
    @classmethod
    def _check_id(cls, value: str | None) -> str | None:
        allowed = value is None or (
            1 <= len(value) <= 100
            and all(c.isascii() and (c.isalnum() or c in "._-") for c in value)
            and value.strip(".")
            and value.split(".")[0].lower() not in _RESERVED
        )
        if not allowed:
            raise ValueError("must be 1 to 100 of A-Z a-z 0-9 . _ - and no reserved file name")
        return value

    @field_validator("prompt", "negative_prompt", "labels")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        for text in [value] if isinstance(value, str) else value or []:
            if "\x00" in text:
                raise ValueError("holds a NUL character")
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError("holds half a surrogate pair, which no file can store")
        return value

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (len(set(value)) < len(value) or not all(v.strip() for v in value)):
            raise ValueError("must be different, non-empty texts")
        return value

    @field_validator("image", "mask_image")
    @classmethod
    def _check_image(cls, value: Any) -> Any:
        if value is None or hasattr(value, "getbands") or (isinstance(value, str | Path) and str(value)):
            return value
        raise ValueError("must be a path or a PIL image")

    @field_validator("scheduler")
    @classmethod
    def _check_scheduler(cls, value: Any) -> Any:
        if value is not None:
            from genkit.schedulers import scheduler_options

            scheduler_options(value)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Request:
        from genkit.scoring.gates import Expression

        if isinstance(self.seed, list) and len(self.seed) != self.num_images:
            raise ValueError(f"seed: {len(self.seed)} seeds for num_images {self.num_images}")
        for name in ("gate", "rank_by"):
            if getattr(self, name) is not None:
                try:
                    Expression(getattr(self, name), labels=self.labels)
                except InputError as error:
                    raise ValueError(f"{name}: {error}") from None
        if self.max_images is not None and (self.keep is None or self.gate is None):
            raise ValueError("max_images: needs `keep` and `gate`: it says how long to draw until `keep` images pass")
        if self.max_images is not None and self.max_images < self.num_images:
            raise ValueError(f"max_images: {self.max_images} is less than num_images {self.num_images}")
        if self.keep is not None and self.keep > (self.max_images or self.num_images):
            raise ValueError(f"keep: {self.keep} of at most {self.max_images or self.num_images} images")
        if self.image is None and (self.mask_image is not None or self.strength is not None):
            field = "mask_image" if self.mask_image is not None else "strength"
            raise ValueError(f"{field}: needs `image`, the picture to start from")
        return self

    def filled(self, defaults: dict[str, Any]) -> Request:
        """Return this row with `defaults` for the fields that it does not state."""
        stated = {name: getattr(self, name) for name in self.model_fields_set}
        if "image" not in stated and "image" not in defaults:
            defaults = {k: v for k, v in defaults.items() if k != "strength"}  # it would say nothing about this row
        return Request(**{**defaults, **{k: v for k, v in stated.items() if v is not None or k not in defaults}})

    def seed_of(self, index: int, run_seed: int = 0) -> int:
        """Return the seed of image `index`: the row's seed + index, or one derived from (run seed, row id, index)."""
        if isinstance(self.seed, list):
            return self.seed[index] if index < len(self.seed) else (self.seed[-1] + index) % SEED_LIMIT
        if self.seed is not None:
            return (self.seed + index) % SEED_LIMIT
        digest = hashlib.sha256(f"{run_seed}/{self.id}/{index}".encode()).digest()
        return int.from_bytes(digest[:4], "little")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; a PIL image becomes the SHA-256 of its pixels."""
        return {name: _plain(value) for name, value in self if value is not None}

    def fingerprint(self) -> str:
        """Return 16 hex digits that change when anything that decides on the pixels changes, input images included."""
        fields = {name: _plain(getattr(self, name), read=name in ("image", "mask_image")) for name in _PIXEL_FIELDS}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any, read: bool = False) -> Any:
    if hasattr(value, "getbands"):
        return "sha256:" + hashlib.sha256(value.tobytes() + repr((value.size, value.mode)).encode()).hexdigest()
    if read and isinstance(value, str | Path) and Path(value).is_file():
        return "sha256:" + hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return str(value) if isinstance(value, Path) else value


def canonical(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `fields` under genkit's names: aliases resolved, `size: "WxH"` split, unknown keys refused.

    Raises InputError for an unknown key, or for a field given under two names.
    """
    out: dict[str, Any] = {}
    for key, value in fields.items():
        name = ALIASES.get(key, key)
        if name == "size":
            parts = value.lower().split("x") if isinstance(value, str) else []
            if len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) < 6 for p in parts):
                raise InputError(f'size: {shown(value)} is not like "512x512"')
            pairs = {"width": int(parts[0]), "height": int(parts[1])}
        elif name in Request.model_fields:
            pairs = {name: value}
        else:
            raise InputError(f"{shown(key)}: unknown field{nearest(key, [*Request.model_fields, *ALIASES, 'size'])}")
        for field, field_value in pairs.items():
            if field in out:
                raise InputError(f"{field}: given twice, once as {shown(key)}")
            out[field] = field_value
    return out


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"] if not str(part).startswith(("constrained-", "list[", "function-"))]
    place = [part for part in place if part not in ("int", "str", "dict[str,any]")]
    message = first["msg"].removeprefix("Value error, ")
    if not place:
        return message
    if first["type"] == "extra_forbidden":
        return f"{shown(place[0])}: unknown field{nearest(place[0], Request.model_fields)}"
    return f"{'.'.join(place)}: {shown(first['input'])}: {message[0].lower() + message[1:]}"


@dataclasses.dataclass
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
    fingerprint: str | None = None  # of the row that this was drawn for: a changed row is drawn again
    pixels: Any = dataclasses.field(default=None, repr=False, compare=False)  # (height, width, 3) uint8 array

    @property
    def image(self) -> Any:
        """The picture as a PIL image, or None when the image failed or only its record was read."""
        if self.pixels is None:
            return None
        from PIL import Image

        return Image.fromarray(self.pixels)

    def to_json(self) -> dict[str, Any]:
        """Return the line of results.jsonl as a dictionary."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "pixels"}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Result:
        """Return the record of a line of results.jsonl; keys of a newer genkit are passed over."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in line.items() if k in known})
