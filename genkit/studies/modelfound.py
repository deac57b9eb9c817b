"""Find the model that pictures name, and compare its weights with the hashes that the pictures record."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from genkit.components import ModelInfo, weight_hashes
from genkit.components.folder import DEFAULTS
from genkit.components.info import SINGLE
from genkit.components.weights import hash_once
from genkit.errors import InputError, shown
from genkit.files import place, user_path
from genkit.rows.pictures import Pictured, first_of, other_inputs
from genkit.runs.records import found_at, read_config

SAME, NOT_RECORDED = "same", "not recorded"
_SUFFIX = ".safetensors"


def model_of(shots: Sequence[Pictured]) -> str:
    """Return the model that pictures name: a built-in one, or one in their run's record, beside them, or in the cwd.

    A name in a picture is never downloaded. Raises InputError if none is named or found, and for two models.
    """
    found: dict[str, Pictured] = {}
    for shot in shots:
        if shot.model is None:
            raise InputError(f"--model: {place(shot.path)} names no model; give one")
        here = _found(shot.model, shot.path.absolute().parent)
        if here is None:
            name = shown(shot.found.about["model"])
            raise InputError(f"--model: {place(shot.path)} names {name}, which is not here; give its folder or file")
        found.setdefault(here, shot)
    if len(found) > 1:
        (one, first), (two, second) = list(found.items())[:2]
        names = f"{place(first.path)} names {shown(one)}, {place(second.path)} {shown(two)}"
        raise InputError(f"--model: {names}; a run has one model: give it, or draw them apart")
    return next(iter(found))


def _found(name: str, folder: Path) -> str | None:
    if name in DEFAULTS:
        return name
    if name in ("", ".", ".."):
        return None
    for parent in (
        folder.parent,
        folder.parent.parent,
    ):  # the run, if the picture is in its images/ or a subfolder of that
        try:
            config = read_config(parent)
        except InputError:
            continue
        model = (config or {}).get("binding", {}).get("model")
        if (
            isinstance(model, dict)
            and Path(str(model.get("folder", ""))).name == name
            and Path(found_at(model)).exists()
        ):
            return found_at(model)
    beside = [parent / file for parent in (folder, Path()) for file in (name, f"{name}.safetensors")]
    return next((str(path) for path in beside if path.exists()), None)


def check_weights(shots: Sequence[Pictured], info: ModelInfo, other_weights: bool) -> list[str]:
    """Return for each picture how its recorded weights compare with the model: "same", "not recorded", or a sentence.

    Raises InputError, naming the first picture and file, if weights, LoRAs or input pictures differ and
    `other_weights` is False.
    """
    now = weight_hashes(info)
    found, refused = [], []
    for shot in shots:
        other = _other_weights(shot, info, now)
        text = other or _status(shot, info)
        found.append(text)
        problems = [*([other] if other else []), *other_inputs(shot)]
        refused += [f"{place(shot.path)}: {problem}" for problem in problems]
    if refused and not other_weights:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise InputError(f"{refused[0]}{more}: another picture would be drawn; --other-weights draws and compares it")
    return found


def _other_weights(shot: Pictured, info: ModelInfo, now: Mapping[str, str]) -> str | None:
    recorded = shot.found.about.get("weights")
    if recorded:
        for name in dict.fromkeys([*recorded, *now]):
            if recorded.get(name) != now.get(name):
                return _difference(name, recorded.get(name), now.get(name), info)
        return None
    digits = _model_hash(shot)
    if digits is None or info.family is None:
        return None
    own = _old_hash(info.folder) if len(digits) == 8 else now[SINGLE]
    if own.startswith(digits):
        return None
    return f"{place(info.folder)} has the model hash {own[: len(digits)]}, and the picture says {digits}"


def _difference(name: str, recorded: str | None, now: str | None, info: ModelInfo) -> str:
    path = info.folder if name == SINGLE else info.folder / name
    file = place(path) if path.exists() else shown(name)
    if now is None:
        return f"{shown(name)} is among its weights, and is none of {shown(info.name)}"
    if recorded is None:
        return f"{file} is not among its weights"
    return f"{file} has SHA-256 {now[:12]}…, and the picture says {recorded[:12]}…"


def _status(shot: Pictured, info: ModelInfo) -> str:
    about = shot.found.about
    if about.get("weights"):
        return SAME
    if about.get("model_hash") is None:
        return NOT_RECORDED
    if _model_hash(shot) is None:
        return f"model hash {shown(about['model_hash'])} cannot be compared"
    if info.family is None:
        return f"model hash {about['model_hash']} is of a single file, and cannot be compared with a folder"
    return SAME


def _model_hash(shot: Pictured) -> str | None:
    """Return the model hash in a picture, in lower case, if it is one of AUTOMATIC1111 or a SHA-256."""
    text = str(shot.found.about.get("model_hash", "")).lower().removeprefix("sha256:")
    return text if re.fullmatch("[0-9a-f]{8}|[0-9a-f]{10,64}", text) else None


def _old_hash(file: Path) -> str:
    """Return the hash of AUTOMATIC1111 before November 2022: 8 digits of the SHA-256 of 64 KiB from 1 MiB on."""
    with open(file, "rb") as opened:
        opened.seek(0x100000)
        return hashlib.sha256(opened.read(0x10000)).hexdigest()[:8]


def vae_note(shot: Pictured, vae: str | None) -> str | None:
    """Return a note about the VAE that a picture of another tool names; None if it is the given one."""
    name, digits = shot.found.about.get("vae"), str(shot.found.about.get("vae_hash", "")).lower()
    if name is None or shot.found.about.get("weights") or str(name).lower() in ("none", "automatic"):
        return None
    if vae is None:
        return f"VAE {shown(name)}: not given; --vae FILE does"
    own = hash_once(user_path(vae))
    return f"VAE {shown(name)}: --vae is another file" if own and digits and not own.startswith(digits) else None


def other_models(shots: Sequence[Pictured], info: ModelInfo, vae: str | None) -> list[str]:
    """Return notes on pictures that cannot be reproduced: their weights differ, or genkit lacks a feature."""
    now = weight_hashes(info) if any(shot.found.about.keys() & {"weights", "model_hash"} for shot in shots) else {}
    said: dict[str, list[Path]] = {}
    for shot in shots:
        other = _other_weights(shot, info, now)
        lines = [*shot.lacking, *other_inputs(shot), *filter(None, (vae_note(shot, vae), other))]
        if not other and shot.model is not None and _status(shot, info) != SAME and not _is_called(shot.model, info):
            lines.append(f"drawn with the model {shown(shot.model)}")
        for line in lines:
            said.setdefault(line, []).append(shot.path)
    return [f"{first_of(paths)}: not the same picture: {line}" for line, paths in said.items()]


def _is_called(name: str, info: ModelInfo) -> bool:
    return name.removesuffix(_SUFFIX) == Path(info.name).name.removesuffix(_SUFFIX)
