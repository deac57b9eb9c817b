"""The LoRAs of a row: [{"file": …, "weight": 1.0, "text_weight": 1.0}, …], with both weights filled in."""

from __future__ import annotations

import functools
import glob
import json
import os
from pathlib import Path
from typing import Any

from genkit.components.weights import read_file
from genkit.errors import InputError, nearest, shown
from genkit.files import place, user_path

LORA = {"file": "style.safetensors", "weight": 0.8, "text_weight": 0.8}


def check_loras(value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return the LoRAs with both weights filled in; text_weight is as weight unless it is given. Raises ValueError."""
    found = []
    for lora in value or ():
        unknown = next((key for key in lora if key not in LORA), None)
        if unknown is not None:
            raise ValueError(f"has no {shown(unknown)}{nearest(unknown, LORA)}; each is like {json.dumps(LORA)}")
        file = lora.get("file")
        if not isinstance(file, str | Path) or not str(file):
            raise ValueError(f"must each have a file, as in {json.dumps(LORA)}")
        weight = 1.0 if lora.get("weight") is None else lora["weight"]
        on_text = weight if lora.get("text_weight") is None else lora["text_weight"]
        for number in (weight, on_text):
            if type(number) not in (int, float) or not -100 <= number <= 100:
                raise ValueError(f"weight must be a number from -100 to 100, not {shown(number)}")
        found.append({"file": str(file), "weight": float(weight), "text_weight": float(on_text)})
    return found or None


def beside(folder: Path, lora: Any) -> Any:
    """Return a LoRA, which may be a file's name alone, with its absolute path; relative ones start at `folder`."""
    lora = {"file": lora} if isinstance(lora, str) else lora
    if isinstance(lora, dict) and isinstance(lora.get("file"), str) and lora["file"]:
        return {**lora, "file": os.path.join(os.path.abspath(folder), user_path(lora["file"]))}
    return lora


def find_lora(folder: Path | None, name: str) -> Path:
    """Return the file of <lora:name:…> in a folder or below it, by its name, else by the name that its trainer gave it.

    Raises InputError if there is no such file, or more than one.
    """
    if folder is None:
        raise InputError(f"<lora:{name}>: is looked for in --lora-dir, and none is given")
    if not folder.is_dir():
        raise InputError(f"--lora-dir: {place(folder)} is not a folder")
    files = _files(str(folder.absolute()))
    found = [file for file in files if file.stem == name] or [file for file in files if _given_name(file) == name]
    if len(found) > 1:
        raise InputError(f"<lora:{name}>: is the name of {place(found[0])} and of {place(found[1])}")
    if not found:
        other = next((f for f in sorted(folder.rglob(f"{glob.escape(name)}.*")) if f.suffix in (".pt", ".ckpt")), None)
        if other is not None:
            raise InputError(f"<lora:{name}>: {place(other)} may hold code; convert it to .safetensors")
        near = nearest(name, [file.stem for file in files])
        raise InputError(f"<lora:{name}>: {place(folder)} holds no {shown(f'{name}.safetensors')}{near}")
    return found[0]


@functools.lru_cache(16)
def _files(folder: str) -> list[Path]:
    """Return the .safetensors files below a folder and in what it links to, listed once for all tags of a run."""
    found: list[Path] = []
    entered: set[str] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in entered:  # a link back to a folder that was listed: its files would be found again
            folders.clear()
            continue
        entered.add(real)
        found += [Path(at, name) for name in names if name.endswith(".safetensors")]
    return sorted(found)


@functools.lru_cache(10_000)
def _given_name(file: Path) -> str | None:
    try:
        return read_file(file)[1].get("ss_output_name")
    except InputError:
        return None  # it is refused if it is named itself
