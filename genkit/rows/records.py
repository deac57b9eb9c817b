"""Settings of a picture as JSON: genkit's own record, and plain objects of fields."""

from __future__ import annotations

import re
from typing import Any

from genkit.errors import InputError, shown
from genkit.files import parse_json
from genkit.rows.found import Draft, Found, base_name
from genkit.rows.request import Request, field_name

_PICTURES = ("image", "mask_image")
_SHA256 = re.compile("[0-9a-f]{64}")
_DRAWN = ("config", "device", "dtype", "attention", "torch", "format")


def read_record(text: str) -> Found:
    """Return the row of genkit's record of a picture; `about` has the id, index and seed of the picture.

    `about` also has those fields of `Origin` that were recorded: weights, config, tuned, device, dtype, attention,
    torch, format; the hashes of `inputs`; and `cut` if fields were left out for size. Raises InputError for damaged
    JSON, for a record without a row, and for malformed hashes.
    """
    record = parse_json(text, "record")
    request = record.get("request")
    if not isinstance(request, dict):
        raise InputError(f"request: {shown(request)} is not a row")
    draft = Draft("genkit")
    draft.fields = dict(request)
    for name in ("model", "version", "id", "index", "seed", "steps", "width", "height", "fingerprint"):
        draft.tell(name, record.get(name))
    for name in _DRAWN:
        draft.tell(name, told if isinstance(told := record.get(name), str) else None)
    for name in ("weights", "inputs", "tuned"):
        draft.tell(name, _hashes(name, record.get(name)))
    for name in _PICTURES:
        value = request.get(name)
        if value is not None:
            _picture(draft, name, value)
    if record.get("refiner"):
        draft.tell("refiner", record["refiner"])
        draft.lack("refiner")
    draft.tell("segmenter", _hashes("segmenter", record.get("segmenter")))
    draft.tell("embeddings", _hashes("embeddings", record.get("embeddings")))
    if record.get("cut"):
        draft.about["cut"] = True
        draft.notes.append(
            "the record was cut to fit into the picture: fields of 1000 characters or more are not in it"
        )
    return draft.done()


def _hashes(name: str, value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(v, str) and _SHA256.fullmatch(v) for v in value.values()):
        raise InputError(f"{name}: {shown(value)} is not an object of names and SHA-256")
    return value


def read_fields(text: str) -> Found:
    """Return an object of fields, as scripts around diffusers write it.

    Raises InputError for damaged JSON and where no key is a field.
    """
    draft = Draft("json")
    for key, value in parse_json(text, "JSON").items():
        name = field_name(key)
        if value is None:
            continue
        if name == "scheduler" and isinstance(value, str):
            draft.scheduler(value)
        elif name in _PICTURES:
            _picture(draft, name, value)
        elif name == "seed" and not isinstance(value, list):
            draft.seed(value)
        elif name in Request.model_fields:
            draft.fields[name] = value
        elif name in ("model", "model_hash", "vae", "version"):
            draft.tell(name, value)
        else:
            draft.notes.append(f"not used: {shown(f'{key}: {value}')}")
    if not draft.fields:
        raise InputError(f"{shown(text)}: JSON without a field that genkit knows")
    return draft.done()


def _picture(draft: Draft, field: str, value: Any) -> None:
    """Set the file name of an input picture, and record that the settings do not hold the picture itself."""
    draft.fields.pop(field, None)
    if not str(value).startswith("sha256:"):  # given as pixels, not as a file
        draft.fields[field] = base_name(field, value)
    draft.lack(field, f"{field}: the settings have no more of it than {shown(value)}; give the picture")
