"""One row of a prompt file, checked field by field before anything heavy is imported."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from genkit.components.control import network_hash
from genkit.components.weights import hash_once
from genkit.errors import InputError, nearest, shown
from genkit.pictures.images import as_pil
from genkit.rows import controls as steering
from genkit.rows import detecting, inputs, prompting, sdxl
from genkit.rows.complaints import complaint
from genkit.rows.loras import beside, check_loras
from genkit.rows.typed import COUNTS, whole
from genkit.rows.yamltext import Cut

MAX_TEXT = 100_000  # characters, of a prompt as of `meta` written as JSON
META_DEPTH = 20
SEED_LIMIT = 2**32  # torch's CPU generator uses 32 bits: a larger seed would silently equal a smaller one

PRUNE = {"after": 0.5, "keep": 0.5}  # defaults: share of the steps, share of the images
# Names of fields in other tools.
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
    "negative": "negative_prompt",
    **sdxl.ALIASES,
}

SCHEDULES = ("schedule_type", "schedule")  # of noise, beside a sampler: fields of AUTOMATIC1111
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Side = Annotated[int, Field(ge=8, le=8192)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]

_ID = re.compile(r"(?!\.+\Z)[A-Za-z0-9._-]{1,100}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{p}{d}" for p in ("com", "lpt") for d in range(1, 10))}  # Windows devices
# Fields that determine the pixels; the others only affect scoring and selection.
_PIXEL_FIELDS = (
    "prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale",
    "width", "height", "scheduler", "strength", "image", "mask_image", "guidance_interval", "loras",
    *sdxl.FIELDS, *prompting.FIELDS, *inputs.FIELDS, "controls",
)  # fmt: skip


class Request(sdxl.Conditioning, prompting.Prompting, detecting.Detecting, inputs.TextMask):
    """One row: what to draw, how many images, and which of them to keep.

    Fields left at None are filled from the command line or the model (`filled`). `image` and `mask_image` are a path,
    or in Python a PIL image, a numpy array, or the bytes of a file. Raises InputError, in one line, for an unknown
    field or a value out of range.
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
    guidance_interval: Any = None
    width: Side | None = None
    height: Side | None = None
    scheduler: str | dict[str, Any] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    image: Any = None
    mask_image: Any = None
    loras: Annotated[list[dict[str, Any]], Field(max_length=64)] | None = None
    controls: Annotated[list[dict[str, Any]], Field(max_length=steering.MOST)] | None = None
    keep: Count | None = None
    gate: Annotated[str, Field(max_length=2000)] | None = None
    rank_by: Annotated[str, Field(max_length=2000)] | None = None
    max_images: Count | None = None
    labels: Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = None
    prune: dict[str, Any] | None = None
    meta: dict[str, Any] | None = None

    _source: str = PrivateAttr("")
    _words: dict[str, str] = PrivateAttr(default_factory=dict)  # SHA-256 of the textual inversion of each word, by plan

    def __init__(self, **fields: Any) -> None:
        if isinstance(fields.get("seed"), list) and "num_images" not in fields:
            fields["num_images"] = max(1, len(fields["seed"]))
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InputError(complaint(error, Request.model_fields, ALIASES)) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Request) and dict(self) == dict(other)  # ignores the source

    @property
    def source(self) -> str:
        """Where the row was read, e.g. "file.jsonl:12"; "" for one made in Python."""
        return self._source

    @property
    def plain_prompt(self) -> str:
        """The prompt without weights, brackets and tags of a syntax: what scores compare a picture with."""
        return prompting.plain(self.prompt) if self.syntax == "a1111" else self.prompt

    @property
    def whole(self) -> int:
        """How many of num_images are finished: all, or those that `prune` keeps."""
        return math.ceil(self.num_images * (1 if self.prune is None else self.prune["keep"]) - 1e-9)

    @field_validator("id")
    @classmethod
    def _check_id(cls, value: str | None) -> str | None:
        allowed = value is None or (_ID.fullmatch(value) and value.split(".")[0].lower() not in _RESERVED)
        if not allowed:
            raise ValueError("must be 1 to 100 of A-Z a-z 0-9 . _ - and no reserved file name")
        return value

    @field_validator("prompt", "negative_prompt", "labels")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        if any("\x00" in text for text in ([value] if isinstance(value, str) else value or [])):
            raise ValueError("holds a NUL character")
        return value

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (len(set(value)) < len(value) or not all(v.strip() for v in value)):
            raise ValueError("must be different, non-empty texts")
        return value

    @field_validator("meta", mode="before")
    @classmethod
    def _check_meta(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        try:
            if _deeper(value, META_DEPTH):
                raise ValueError
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            if len(text.encode()) > MAX_TEXT or json.loads(text) != value:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"must be plain JSON: text keys, no NaN, at most {META_DEPTH} levels and {MAX_TEXT} bytes"
            ) from None
        return dict(value)

    @field_validator("image", "mask_image")
    @classmethod
    def _check_image(cls, value: Any) -> Any:
        if value is None or hasattr(value, "getbands") or (isinstance(value, str | Path) and str(value)):
            return value
        if isinstance(value, bytes) or hasattr(value, "__array_interface__"):
            return as_pil(value)
        raise ValueError("must be a path, a PIL image, an array, or the bytes of a file")

    @field_validator("guidance_interval")
    @classmethod
    def _check_interval(cls, value: Any) -> Any:
        sigma = isinstance(value, dict) and list(value) == ["sigma"]
        pair = value["sigma"] if sigma else value
        numbers = isinstance(pair, list | tuple) and [type(v) in (int, float) for v in pair] == [True, True]
        if value is None or (numbers and 0 <= pair[0] < pair[1] <= (1e6 if sigma else 1)):
            return value
        raise ValueError(
            'must be two fractions of the steps, as in [0.1, 0.8], or noise levels, as in {"sigma": [0.3, 5]}'
        )

    @field_validator("prune")
    @classmethod
    def _check_prune(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for key, share in (value or {}).items():
            if key not in PRUNE:
                raise ValueError(f"has no {shown(key)}{nearest(key, PRUNE)}; it is like {json.dumps(PRUNE)}")
            if type(share) is not float or not 0 < share < 1:
                raise ValueError(f"{key} must be a fraction, more than 0 and less than 1")
        return None if value is None else {**PRUNE, **value}

    @field_validator("loras")
    @classmethod
    def _check_loras(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        return check_loras(value)

    @field_validator("controls")
    @classmethod
    def _check_controls(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        return steering.check_controls(value)

    @field_validator("scheduler")
    @classmethod
    def _check_scheduler(cls, value: Any) -> Any:
        if value is not None:
            from genkit.rows.plans import check_scheduler

            check_scheduler(value)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Request:
        if isinstance(self.seed, list) and len(self.seed) != self.num_images:
            raise ValueError(f"seed: {len(self.seed)} seeds for num_images {self.num_images}")
        self._check_expressions()
        if self.max_images is not None and (self.keep is None or self.gate is None):
            raise ValueError("max_images: needs `keep` and `gate`: it says how long to draw until `keep` images pass")
        if self.max_images is not None and self.max_images < self.num_images:
            raise ValueError(f"max_images: {self.max_images} is less than num_images {self.num_images}")
        if self.keep is not None and self.keep > (self.max_images or self.num_images):
            more = "max_images" if self.max_images else "num_images"
            raise ValueError(f"keep: {self.keep} of at most {self.max_images or self.num_images} images; raise {more}")
        if self.prune is not None:
            self._check_pruned()
        if self.image is None and (self.mask_image is not None or self.strength is not None):
            field = "mask_image" if self.mask_image is not None else "strength"
            raise ValueError(f"{field}: needs `image`, the picture to start from")
        return self

    def _check_pruned(self) -> None:
        if self.max_images is not None:
            raise ValueError("prune: does not go with max_images: either some images are given up, or more are drawn")
        if self.whole == self.num_images:
            raise ValueError(f"prune: keeps {self.whole} of num_images {self.num_images}: nothing to give up")
        if self.keep is not None and self.keep > self.whole:
            raise ValueError(f"keep: {self.keep} of the {self.whole} images that prune leaves")

    def _check_expressions(self) -> None:
        from genkit.scoring.gates import Expression
        from genkit.scoring.names import check_computed

        for name, text in (("gate", self.gate), ("rank_by", self.rank_by)):
            if text is not None:
                try:
                    expression = Expression(text, self.labels, names=None)
                    if name == "gate" or self.prune is not None:  # it decides while drawing
                        check_computed(name, text, expression.names & {"sim"}, False, ())
                except InputError as error:
                    raise ValueError(str(error) if str(error).startswith(f"{name}: ") else f"{name}: {error}") from None
                if name == "gate" and not expression.decides:
                    raise ValueError(f"gate: {shown(text)} is a number; compare it, as in clip > 0.3")

    def filled(self, defaults: dict[str, Any]) -> Request:
        """Return this row with `defaults` for the fields that it does not state."""
        row = Request(**over(defaults, {name: getattr(self, name) for name in self.model_fields_set}))
        row._source = self._source
        row.keep_mask(self)
        return row

    def seed_of(self, index: int, run_seed: int = 0) -> int:
        """Return the seed of image `index`: the row's seed + index, or one derived from (run seed, row id, index).

        A list gives one for each image, and past its end goes on counting from its last.
        """
        if isinstance(self.seed, list):
            beyond = max(0, index - len(self.seed) + 1)
            return (self.seed[index - beyond] + beyond) % SEED_LIMIT
        if self.seed is not None:
            return (self.seed + index) % SEED_LIMIT
        digest = hashlib.sha256(f"{run_seed}/{self.id}/{index}".encode()).digest()
        return int.from_bytes(digest[:4], "little")

    def drawing(self) -> str:
        """Return a key that is equal for rows with the same pixel-determining fields except the seed.

        Input images are equal only if they are the same path or object.
        """
        return repr([getattr(self, name) for name in _PIXEL_FIELDS if name != "seed"])

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; a PIL image becomes the SHA-256 of its pixels."""
        found = {name: _plain(value) for name, value in self if value is not None}
        if self.controls is not None:
            found["controls"] = [{k: _plain(v) for k, v in control.items()} for control in self.controls]
        return found

    def fingerprint(self) -> str:
        """Return 16 hex digits of a hash over all fields that determine the pixels, input images included."""
        fields = {name: _plain(getattr(self, name), read=name in ("image", "mask_image")) for name in _PIXEL_FIELDS}
        # Fields that were added later are hashed only where they are set: fingerprints of older rows stay valid
        for later in ("guidance_interval", "loras", "controls", *sdxl.FIELDS, *prompting.FIELDS, *inputs.FIELDS):
            if fields[later] in (None, "none", []):
                del fields[later]
        if self.controls:
            fields["controls"] = [
                {
                    **{**steering.USUAL, **control},
                    "file": network_hash(control.get("file", "")),
                    "image": _plain(control.get("image"), read=True),
                }
                for control in self.controls
            ]
        if self.loras:
            fields["loras"] = [{**lora, "file": hash_once(lora["file"]) or lora["file"]} for lora in self.loras]
        if self._words:
            fields["embeddings"] = self._words
        if self._segmenter:
            fields["segmenter"] = self._segmenter
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any, read: bool = False) -> Any:
    if hasattr(value, "getbands"):
        return "sha256:" + hashlib.sha256(value.tobytes() + repr((value.size, value.mode)).encode()).hexdigest()
    if read and isinstance(value, str | Path) and Path(value).is_file():
        return f"sha256:{hash_once(value)}"
    return str(value) if isinstance(value, Path) else value


def over(defaults: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """Return the stated fields of a row, completed with defaults for those that are missing or None."""
    filled = dict(defaults)
    if "image" not in stated and "image" not in defaults:
        filled.pop("strength", None)  # only used with an image
    if isinstance(stated.get("seed"), list):
        filled.pop("num_images", None)  # given by the number of seeds
    filled = inputs.with_masks(filled, stated)
    if stated.get("controls") is not None:
        stated = {**stated, "controls": steering.completed(stated["controls"], defaults.get("controls") or ())}
    return {**filled, **{name: value for name, value in stated.items() if value is not None or name not in filled}}


def canonical(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `fields` under genkit's names and without nulls, which state nothing.

    Aliases, and names in capitals or with spaces, are resolved, `size: "WxH"` is split, 42.0 is 42 where a whole number
    is meant, and a schedule of noise beside a sampler, as ComfyUI and AUTOMATIC1111 have it, becomes its spacing.
    Raises InputError for an unknown key, or for a field given under two names.
    """
    out: dict[str, Any] = {}
    control: dict[str, Any] = {}
    schedule = None
    for key, value in fields.items():
        name = field_name(key)
        name = "mask_image" if name == "mask" and inputs.is_picture(value) else name
        empty = value is None or (value == "" and name not in ("prompt", "negative_prompt"))
        if empty and (name in Request.model_fields or name in (*SCHEDULES, *steering.FLAT, "size")):
            continue
        if name in steering.FLAT:
            steering.put(control, name, value)
            continue
        if name in SCHEDULES or (name == "scheduler" and _is_schedule(value)):
            if schedule is not None:
                raise InputError(f"{shown(key)}: the schedule of noise is given twice, also as {shown(schedule)}")
            schedule = value
            continue
        if name == "size":
            parts = value.lower().split("x") if isinstance(value, str) else []
            if len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) < 6 for p in parts):
                raise InputError(f'size: {shown(value)} is not like "512x512"')
            pairs = {"width": int(parts[0]), "height": int(parts[1])}
        elif name in Request.model_fields:
            pairs = {name: _plainly(name, sdxl.width_first(key, value))}
        else:
            known = [*Request.model_fields, *ALIASES, *steering.FLAT, "size"]
            raise InputError(f"{shown(key)}: unknown field{nearest(key, known)}")
        for field, field_value in pairs.items():
            if field in out:
                raise InputError(f"{field}: given twice, once as {shown(key)}")
            if field_value is not None:
                out[field] = field_value
    if control:
        if "controls" in out:
            raise InputError("controls: is given, and also one in fields of its own; give one of them")
        out["controls"] = [] if control == {"file": "none"} else [control]
    if schedule is not None:
        from genkit.rows.plans import with_schedule

        out |= with_schedule(out.get("scheduler"), schedule)
    return out


def _is_schedule(value: Any) -> bool:
    from genkit.rows.plans import is_schedule

    return is_schedule(value)


def field_name(key: Any) -> Any:
    """Return genkit's name for a field: aliases resolved, "Negative Prompt" and "negative-prompt" alike."""
    if not isinstance(key, str) or key in Request.model_fields or key in ALIASES:
        return ALIASES.get(key, key)
    plain = re.sub(r"[\s_-]+", "_", key.strip().lower())
    return ALIASES.get(plain, plain)


def _plainly(name: str, value: Any) -> Any:
    """Return the value with whole numbers as such; a seed of -1, which is any in other tools, is None."""
    if name == "seed":
        value = [whole(v) for v in value] if isinstance(value, list) else whole(value)
        return None if type(value) is int and value == -1 else value
    return whole(value) if name in COUNTS else value


def prepared(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the fields under genkit's names, after checking what Request does not: the prompt and pictures."""
    found = canonical(fields)
    prompt = found.get("prompt", "-")
    if isinstance(prompt, str) and not prompt.strip():
        raise InputError(f"prompt: {shown(prompt)} is empty; leave the field out for a model without prompts")
    for field in ("prompt", "negative_prompt", *sdxl.PROMPTS, "labels", "ask"):
        value = found.get(field)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, Cut):
                raise InputError(
                    f"{field}: {shown(text)} is cut at ' #', where YAML begins a comment; put it in quotes"
                )
    for field in ("image", "mask_image"):
        if isinstance(found.get(field), str) and found[field]:
            found[field] = inputs.picture_path(folder, field, found[field])
    found |= {"controls": steering.located(folder, found["controls"])} if "controls" in found else {}
    if isinstance(found.get("loras"), list):
        found["loras"] = [beside(folder, lora) for lora in found["loras"]]
    return found


def _deeper(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return levels < 0 or any(_deeper(part, levels - 1) for part in inside)
