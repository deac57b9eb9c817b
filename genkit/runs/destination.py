"""Checks of the output folder: new, empty, or a run with the same model and settings."""

from __future__ import annotations

import json
import os
import re
import secrets
import unicodedata
from pathlib import Path
from typing import Any

from genkit.durable import is_temporary
from genkit.errors import HostError, InputError, shown
from genkit.rows.request import SEED_LIMIT
from genkit.runs.records import CONFIG, read_config
from genkit.scoring.senses import NAMES as SENSES
from genkit.storage import StoragePath, check_storage, check_writable

LONGEST = 3800  # bytes of a path; leaves room for names of images within the usual limit of 4,096
LONGEST_KEY = 900  # bytes; a key of S3 has 1,024
SHOWN = 10  # differences named in a refusal
# Keys of a binding that say what a model is called and where it lies; they may change from start to start
PLACES = (
    "model.name",
    "model.folder",
    "clip.name",
    "clip.folder",
    "refiner.name",
    "refiner.folder",
    *(f"{sense}.{place}" for sense in SENSES for place in ("name", "folder")),
    ".file",
)


def check_folder(folder: Path, prompts: Path | None = None) -> None:
    """Raise InputError or HostError if `folder` neither is nor can become a run folder. Writes nothing.

    prompts: the prompt file, which must not lie in the folder.
    """
    text = shown(str(folder)).strip("'")
    if isinstance(folder, StoragePath):
        _check_stored(folder, text)
        return
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in str(folder)) or folder.name != folder.name.strip():
        raise InputError(f"--out: {shown(str(folder))} has a space at an end, or a character that no file name should")
    try:
        whole = folder.resolve()
        if max(len(os.fsencode(part)) for part in whole.parts) > 255 or len(os.fsencode(whole)) > LONGEST:
            raise InputError(f"--out: {text} is longer than a file name may be")
        if whole == whole.parent:
            raise InputError("--out: / is no place for a run; name a folder")
        if prompts is not None and prompts.resolve().parent == whole:
            raise InputError(f"--out: {text} is where the prompt file lies; give the run a folder of its own")
        there = next(p for p in [folder, *folder.absolute().parents] if os.path.lexists(p))
        if not there.is_dir():
            raise InputError(f"--out: {shown(str(there)).strip(chr(39))} is not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise HostError(f"{there}: cannot be written to")
        foreign = None if there != folder or read_config(folder) is not None else _foreign(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links, before Python 3.13
        if isinstance(error, HostError):
            raise
        raise HostError(f"{text}: {getattr(error, 'strerror', None) or error}") from None
    if foreign is not None:
        raise InputError(f"--out: {text} holds {shown(foreign)} and no {CONFIG}; name a new or empty folder")


def _check_stored(folder: StoragePath, text: str) -> None:
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in str(folder)) or len(str(folder)) > LONGEST_KEY:
        raise InputError(f"--out: {text} is longer than a key may be, or has a character that no key should")
    check_storage(folder)
    if read_config(folder) is None:
        names = sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in folder.entries())
        foreign = [name for name in names if not name.startswith(".")]
        if foreign:
            raise InputError(f"--out: {text} holds {shown(foreign[0])} and no {CONFIG}; name a new or empty folder")


def check_rights(folder: Path) -> None:
    """Raise InputError or HostError for a folder on storage that a run cannot be written to, before it has anything."""
    if isinstance(folder, StoragePath):
        check_storage(folder)
        check_writable(folder)


def free_name(folder: Path) -> Path:
    """Return `folder`, or the first of folder-2, folder-3, … that does not exist: for `--new-run`."""
    n, name = 1, folder
    while name.exists() if isinstance(name, StoragePath) else os.path.lexists(name):
        n += 1
        name = folder.with_name(f"{folder.name}-{n}")
    return name


def run_seed(seed: int, folder: Path) -> int:
    """Return the seed of a run; for -1, which is any in other tools, its own if there is one, else a random one.

    Raises InputError for a number that is no seed.
    """
    if seed == -1:
        recorded = read_config(folder)
        return secrets.randbits(32) if recorded is None else recorded["binding"]["seed"]
    if not 0 <= seed < SEED_LIMIT:
        raise InputError(f"--seed: {seed} is not within 0 to {SEED_LIMIT - 1}, nor -1 for any")
    return seed


def check_binding(folder: Path, recorded: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise InputError naming every key in which the request differs from the run's recorded binding.

    Models and textual inversions may have another name or folder as long as their hashes are the same. Textual
    inversions that the record lacks, and segmenters, are part of the fingerprints of the rows that use them.
    """
    # Older runs, without a format, are of PNGs
    before, after = {"format": "png", **_flat(recorded)}, {"format": "png", **_flat(json.loads(json.dumps(asked)))}
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    keys = [key for key in keys if key in before or not key.startswith("embeddings.")]
    keys = [key for key in keys if not key.startswith("segmenter.")]
    if any(not key.endswith(PLACES) for key in keys):
        parts = [f"{key}: {_brief(before.get(key))} -> {_brief(after.get(key))}" for key in keys[:SHOWN]]
        more = f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        raise InputError(f"{folder}: was begun otherwise: {'; '.join(parts)}{more}; use --new-run or another folder")


def _foreign(folder: Path) -> str | None:
    """Return the name of a file in `folder` that genkit does not leave there, or None."""
    return next((name for name in sorted(os.listdir(folder)) if name != ".lock" and not is_temporary(name)), None)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else str(key)).items()
    }


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else shown(text).strip("'")
