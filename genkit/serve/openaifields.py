"""Parameters of OpenAI's images API: those that ask for something this server has, and those that are refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.files import parse_json
from genkit.pictures.encoders import Encoding, encoding
from genkit.rows.request import field_name
from genkit.rows.typed import integer, typed
from genkit.serve.rows import picture

# Names of models that clients have built in, answered by the model that is served; the last two answer with a URL
# where nothing else is asked for.
STOOD_FOR = ("gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "dall-e-3", "dall-e-2")
WITH_URL = ("dall-e-3", "dall-e-2")
MOST_PARTIAL = 3
# Parameters without an equivalent here, each with the values that are accepted as they change nothing.
TAKEN: dict[str, tuple[str, ...]] = {
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto", "low"),
    "style": (),
    "input_fidelity": ("low",),
}
INSTEAD = {
    "quality": "set `steps`",
    "background": "the model draws no transparency",
    "moderation": "nothing is moderated here",
    "style": "put it into the prompt",
    "input_fidelity": "set `strength`",
}
NO_SAY = ("user", "safety_identifier")  # whom the picture is for


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How a request is answered. fields: of the row; url: whether pictures are fetched from this server later."""

    fields: dict[str, Any]
    form: Encoding
    url: bool
    stream: bool
    partial: int


def wanted(given: Mapping[str, Any], served: Collection[str]) -> Wanted:
    """Return what a body asks for; parameters that are not OpenAI's are fields of a row. Raises InputError.

    served: the names of the models. Raises LookupError for a model of another name.
    """
    left = {key: value for key, value in given.items() if value is not None and key not in NO_SAY}
    model = left.pop("model", None)
    if model is not None and model not in STOOD_FOR and (not isinstance(model, str) or model not in served):
        raise LookupError(not_served("model", model, served))
    for name, known in TAKEN.items():
        value = left.pop(name, None)
        if value is not None and value not in known:
            also = f"; {' or '.join(known)} is taken" if known else ""
            raise InputError(f"{name}: {shown(value)} is not supported: {INSTEAD[name]}{also}")
    stream, partial = left.pop("stream", False), left.pop("partial_images", 0)
    if type(stream) is not bool:
        raise InputError(f"stream: {shown(stream)} is not true or false")
    if type(partial) is not int or not 0 <= partial <= MOST_PARTIAL:
        raise InputError(f"partial_images: {shown(partial)} is not a number from 0 to {MOST_PARTIAL}")
    if partial and not stream:
        raise InputError("partial_images: needs stream")
    answer = left.pop("response_format", "url" if model in WITH_URL and not stream else "b64_json")
    if answer not in ("url", "b64_json"):
        close = nearest(answer, ("url", "b64_json"))
        raise InputError(f"response_format: {shown(answer)} is not url or b64_json{close}")
    if stream and answer == "url":
        raise InputError("response_format: url does not go with stream")
    form = _form(left.pop("output_format", "png"), left.pop("output_compression", None))
    _check_size(left)
    prompt = left.get("prompt", "")
    if isinstance(prompt, str) and not prompt.strip():
        raise InputError("prompt: is missing")
    return Wanted(left, form, answer == "url", stream, partial)


def not_served(field: str, name: Any, served: Collection[str]) -> str:
    """Return the error message for the name of a model that is not served."""
    there = f"{', '.join(served)[:300]} {'are' if len(served) > 1 else 'is'}"
    return f"{field}: {shown(name)} is not served here{nearest(name, served)}; {there}"


def _form(name: Any, compression: Any) -> Encoding:
    if name not in ("png", "webp", "jpeg"):
        raise InputError(f"output_format: {shown(name)} is not png, webp or jpeg{nearest(name, ('webp', 'jpeg'))}")
    if compression is not None and (type(compression) is not int or not 0 <= compression <= 100):
        raise InputError(f"output_compression: {shown(compression)} is not a number from 0 to 100")
    if name == "png":
        if compression not in (None, 100):
            raise InputError(f"output_compression: {compression} is for webp and jpeg; png keeps every bit")
        return encoding("png")
    return encoding(name, max(1, 100 if compression is None else compression))


def _check_size(left: dict[str, Any]) -> None:
    size, n = left.get("size"), left.get("n")
    if size == "auto":
        del left["size"]
    elif size is not None and not (isinstance(size, str) and re.fullmatch(r"[0-9]{1,5}x[0-9]{1,5}", size)):
        raise InputError(f"size: {shown(size)} is not auto or like 1024x1024")
    if n is not None and (type(n) is not int or n < 1):
        raise InputError(f"n: {shown(n)} is not a number from 1")


NUMBERS = ("n", "partial_images", "output_compression")  # parameters of OpenAI's that are whole numbers


def of_form(parts: Mapping[str, str]) -> dict[str, Any]:
    """Return the text parts of a form with the types that the same parameters have in JSON. Raises InputError."""
    found: dict[str, Any] = {}
    for key, text in parts.items():
        if key in NUMBERS:
            found[key] = integer(key, text) if text.strip() else None
        elif key == "stream":
            found[key] = {"true": True, "false": False}.get(text.strip().lower(), text)
        elif text.lstrip()[:1] == "[" and field_name(key) == "loras":
            found[key] = parse_json(f'{{"loras": {text}}}', key).get("loras")
        else:
            found[key] = typed(field_name(key), text)
    return found


def pictures_of(image: bytes, mask: bytes | None) -> dict[str, Any]:
    """Return `image`, `mask_image` and `strength` of a row from an edit's files: what is transparent is drawn anew.

    Without a mask, what is transparent in the image is; without that, all of it is. Raises InputError.
    """
    start = picture("image", image)
    if mask is None:
        source = start if start.mode == "RGBA" and start.getchannel("A").getextrema()[0] < 255 else None
    else:
        source = picture("mask", mask)
        if source.mode != "RGBA":
            raise InputError("mask: has no transparency, which says what to draw anew")
        if source.size != start.size:
            both = " and ".join(f"{p.width}x{p.height}" for p in (source, start))
            raise InputError(f"mask: {both}: it must be as large as image")
    if source is None:
        return {"image": start}
    from PIL import ImageOps

    painted = ImageOps.invert(source.getchannel("A"))
    if not painted.getbbox():
        raise InputError("mask: is opaque: nothing would be drawn anew")
    return {"image": start.convert("RGB") if mask is not None else start, "mask_image": painted, "strength": 1.0}
