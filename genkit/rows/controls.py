"""The ControlNets of a row: [{"file": …, "image": …, "weight": 1.0, "start": 0.0, "end": 1.0}, …].

`file` and `image` may be left out where the command line gives them. A table names a single one in columns of its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.components.control import check_fit, read_control
from genkit.components.info import Part
from genkit.errors import InputError, nearest, shown
from genkit.files import user_path
from genkit.pictures.edges import PREPROCESS, PREPROCESSORS, check_preprocess
from genkit.pictures.images import as_pil
from genkit.pictures.metadata import UNIT
from genkit.rows.inputs import picture_path

CONTROL: dict[str, Any] = {
    "file": "canny", "image": "edges.png", "weight": 1.0, "start": 0.0, "end": 1.0, "preprocess": "canny",
}  # fmt: skip
MOST = 8  # of a row
# The only one of a row, in fields of its own, and the names that diffusers gives them
FLAT = {
    "control": "file",
    "control_image": "image",
    "control_weight": "weight",
    "control_start": "start",
    "control_end": "end",
    "control_preprocess": "preprocess",
    "controlnet_conditioning_scale": "weight",
    "control_guidance_start": "start",
    "control_guidance_end": "end",
}
USUAL: dict[str, Any] = {"weight": 1.0, "start": 0.0, "end": 1.0, "preprocess": "none"}
_EXAMPLE = json.dumps({name: CONTROL[name] for name in ("file", "image", "weight")})


def check_controls(value: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return the ControlNets, numbers as floats and pictures as PIL images; raises ValueError for a bad one."""
    return None if value is None else [_checked(control) for control in value]


def _checked(control: Mapping[str, Any]) -> dict[str, Any]:
    unknown = next((key for key in control if key not in CONTROL), None)
    if unknown is not None:
        raise ValueError(f"has no {shown(unknown)}{nearest(unknown, CONTROL)}; each is like {json.dumps(CONTROL)}")
    found = {name: value for name, value in control.items() if value is not None}
    for name, low, high in (("weight", -10, 10), ("start", 0, 1), ("end", 0, 1)):
        number = found.get(name, USUAL[name])
        if type(number) not in (int, float) or not low <= number <= high:
            raise ValueError(f"{name} must be a number from {low} to {high}, not {shown(number)}")
        found |= {name: float(number)} if name in found else {}
    whole = {**USUAL, **found}
    if whole["start"] >= whole["end"]:
        raise ValueError(f"start {whole['start']:g} must be less than end {whole['end']:g}: fractions of the steps")
    for name in ("file", "image"):
        value = _as_picture(found[name]) if name == "image" and name in found else found.get(name)
        if value is None or (name == "image" and hasattr(value, "getbands")):
            found |= {} if value is None else {name: value}
        elif isinstance(value, str | Path) and str(value):
            found[name] = str(value)
        else:
            raise ValueError(f"{name} must be a path, not {shown(value)}; each is like {_EXAMPLE}")
    kind = whole["preprocess"]
    if not isinstance(kind, str) or kind not in PREPROCESS:
        raise ValueError(f"preprocess: {shown(kind)} is none of {', '.join(PREPROCESS)}{nearest(kind, PREPROCESS)}")
    return {name: found[name] for name in CONTROL if name in found}


def _as_picture(value: Any) -> Any:
    """Return a picture that Python code gives, bytes or an array, as a PIL image; a path as it is."""
    return as_pil(value) if isinstance(value, bytes) or hasattr(value, "__array_interface__") else value


def put(control: dict[str, Any], name: str, value: Any) -> None:
    """Add a field of FLAT to a row's only ControlNet. Raises InputError for one that is given twice."""
    if FLAT[name] in control:
        raise InputError(f"{name}: is given twice, also under another name")
    control[FLAT[name]] = value


def completed(controls: Sequence[Mapping[str, Any]], defaults: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row's ControlNets with what they leave out taken from the only one of the defaults."""
    usual = defaults[0] if len(defaults) == 1 else {}
    return [{**usual, **control} for control in controls]


def check_whole(controls: Sequence[Mapping[str, Any]] | None) -> None:
    """Raise InputError for a ControlNet without network or picture, once all defaults are filled in."""
    for control in controls or ():
        if "file" not in control:
            raise InputError(f"controls: names no network: give --control, or `file`, as in {_EXAMPLE}")
        if "image" not in control:
            name = shown(os.path.basename(control["file"]))
            raise InputError(
                f"controls: {name} has no picture: give --control-image, or `control_image` in the row; "
                "`control: none` is a row without"
            )


def networks_of(
    controls: Sequence[Mapping[str, Any]] | None, unet: Mapping[str, Any], vae: Mapping[str, Any] | None,
    known: Collection[str] = (), variant: str | None = None,
) -> dict[str, Part]:  # fmt: skip
    """Return the networks of a row's ControlNets by their names, but for known ones.

    unet, vae: configs of the model. Raises InputError for what is missing, is no ControlNet, or does not fit the model.
    """
    found: dict[str, Part] = {}
    for control in controls or ():
        check_preprocess(control.get("preprocess", USUAL["preprocess"]))
        file = control.get("file")
        if file and file not in known and file not in found:
            found[file] = read_control(file, variant)
            check_fit(found[file], unet, vae)
    check_whole(controls)
    return found


def located(folder: Path, controls: Any) -> Any:
    """Return ControlNets as a table in `folder` has them, with absolute paths; a hub id stays. Raises InputError."""
    if not isinstance(controls, list):
        return controls
    return [_located(folder, control) for control in controls]


def _located(folder: Path, control: Any) -> Any:
    control = {"file": control} if isinstance(control, str) else control
    if not isinstance(control, dict):
        return control
    found = dict(control)
    if isinstance(found.get("file"), str) and found["file"]:
        path = Path(os.path.abspath(folder), user_path(found["file"]))
        found["file"] = str(path) if path.exists() or found["file"].endswith(".safetensors") else found["file"]
    if isinstance(found.get("image"), str) and found["image"]:
        found["image"] = picture_path(folder, "control_image", found["image"])
    return found


def read_unit(text: str) -> dict[str, Any]:
    """Return what AUTOMATIC1111's infotext says of a ControlNet that rows have fields for: no network, no picture."""
    told = dict(part.strip().partition(": ")[::2] for part in text.split(","))
    found: dict[str, Any] = {"preprocess": PREPROCESSORS.get(told.get("Module", "none"), "none")}
    for key, (name, _) in UNIT.items():
        if re.fullmatch(r"-?\d{1,3}(\.\d{1,20})?", told.get(key, "")):
            found[name] = float(told[key])
    return found
