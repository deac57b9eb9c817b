"""Parse text as the value of a field: for CSV cells and command-line options."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from genkit.errors import InputError, shown
from genkit.files import parse_json

COUNTS = (
    "num_images", "num_inference_steps", "width", "height", "keep", "max_images", "clip_skip", "expansions",
    "mask_grow",
)  # whole numbers  # fmt: skip
_FLOATS = ("guidance_scale", "strength", "aesthetic_score", "negative_aesthetic_score", "mask_threshold")
NUMBERS = (*COUNTS, *_FLOATS, "seed")


def typed(field: str, text: str) -> Any:
    """Return the text of a CSV cell or command-line option as the value of `field` (genkit's name for it).

    Numbers must be written plainly (7, -1, 0.5, 1e-3). `labels`, `detect` and several seeds are separated by commas,
    `ask` by commas that follow a question mark; they may be JSON lists too. `meta`, `prune`, and a `scheduler` that
    starts with a brace, are JSON objects. Raises InputError.
    """
    convert = _TYPED.get(field)
    return text if convert is None else convert(field, text)


def whole(value: Any) -> Any:
    """Return 42 for 42.0, as tables write whole numbers of a column that has gaps; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def integer(field: str, text: str) -> int:
    """Return the whole number that a text writes, such as 42, -1 or 42.0, for `field`. Raises InputError."""
    if re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]{1,3}", text.strip(" ")):
        raise InputError(f"{field}: {shown(text)} was shortened by a spreadsheet; format its cells as text")
    if not re.fullmatch(r"[-+]?[0-9]{1,30}(\.0*)?", text.strip(" ")):
        raise InputError(f"{field}: {shown(text)} is not a whole number")
    return int(text.split(".")[0])


def _number(field: str, text: str) -> float:
    if not re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,4})?", text.strip(" ")) or len(text) > 100:
        raise InputError(f"{field}: {shown(text)} is not a number")
    return float(text)


def _flag(field: str, text: str) -> bool:
    if text.strip().lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise InputError(f"{field}: {shown(text)} is not true or false")
    return text.strip().lower() in ("true", "yes", "1")


def _seeds(field: str, text: str) -> int | list[int]:
    if "," not in text and "[" not in text:
        return integer(field, text)
    return [integer(field, part) for part in text.strip(" []").split(",")]


def _list(field: str, text: str) -> list[Any]:
    """Return the list that JSON text holds."""
    found = _json(field, f'{{"{field}": {text}}}')
    if len(found) == 1 and isinstance(found[field], list):
        return found[field]
    raise InputError(f"{field}: {shown(text)} is not a list")


def _labels(field: str, text: str) -> list[str]:
    return _list(field, text) if text.lstrip().startswith("[") else [part.strip() for part in text.split(",")]


def _questions(field: str, text: str) -> list[str]:
    """Return questions, separated by the commas that follow question marks: others belong to a question."""
    if text.lstrip().startswith("["):
        return _list(field, text)
    return [part.strip() for part in re.split(r"(?<=\?)\s*,", text)]


def _interval(field: str, text: str) -> list[float] | dict[str, Any]:
    if text.lstrip().startswith("{"):
        return _json(field, text)
    return [_number(field, part) for part in text.strip(" []").split(",")]


def _json(field: str, text: str) -> dict[str, Any]:
    return parse_json(text, field)


def _scheduler(field: str, text: str) -> str | dict[str, Any]:
    return _json(field, text) if text.lstrip().startswith("{") else text.strip()


def _loras(field: str, text: str) -> list[dict[str, Any]]:
    """Return LoRAs written as FILE or FILE:WEIGHT, separated by commas, or as a JSON list."""
    if text.lstrip().startswith("["):
        return _list(field, text)
    return [lora(field, part.strip()) for part in text.split(",")]


def _controls(field: str, text: str) -> list[dict[str, Any]]:
    """Return ControlNets written as NETWORK or NETWORK:WEIGHT, separated by commas, or as a JSON list."""
    return _list(field, text) if text.lstrip().startswith("[") else [lora(field, t.strip()) for t in text.split(",")]


def lora(field: str, text: str) -> dict[str, Any]:
    """Return {"file", "weight"} of FILE or FILE:WEIGHT."""
    file, colon, weight = text.rpartition(":")
    if not colon or "/" in weight or "\\" in weight or weight.endswith(".safetensors"):
        return {"file": text, "weight": 1.0}
    return {"file": file, "weight": _number(field, weight)}


_TYPED: dict[str, Callable[[str, str], Any]] = {
    **dict.fromkeys(COUNTS, integer),
    **dict.fromkeys(_FLOATS, _number),
    "guidance_interval": _interval,
    "mask_invert": _flag,
    "seed": _seeds,
    "labels": _labels,
    "detect": _labels,
    "ask": _questions,
    "loras": _loras,
    "controls": _controls,
    **dict.fromkeys(("control_weight", "control_start", "control_end"), _number),
    "meta": _json,
    "template": _json,
    "prune": _json,
    "scheduler": _scheduler,
}
