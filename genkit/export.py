"""Kept pictures as a folder of their own: copies and a metadata.jsonl, the layout that `datasets` calls imagefolder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit.durable import TEMP_PREFIX, TEMP_SUFFIX, disk, is_temporary, json_line, read_lines, write_whole
from genkit.errors import HostError, InputError, shown
from genkit.request import Result

METADATA = "metadata.jsonl"


def export(folder: Path, kept: Sequence[Result], out: Path) -> int:
    """Copy the pictures of `kept` from a run folder to `out`, with a line each in metadata.jsonl; return their number.

    A line has file_name, text (the prompt), id, index, seed, sha256, scores and meta. `out` is new, empty, or an
    earlier export, of which the pictures not in `kept` go. Raises InputError for another folder, HostError.
    """
    names = {Path(str(r.file)).name: r for r in kept}
    with disk(out):
        earlier = _exported(out)
        out.mkdir(parents=True, exist_ok=True)
        for name, r in names.items():
            _copy(folder / str(r.file), out / name, r.bytes)
        write_whole(out / METADATA, "".join(json_line(_line(name, r)) for name, r in names.items()).encode())
        for name in earlier - set(names):
            (out / name).unlink(missing_ok=True)
        found = sum(name in names for name in os.listdir(out))
    if found != len(kept):
        raise HostError(f"{out}: holds {found} of the {len(kept)} pictures that were copied")
    return found


def _exported(out: Path) -> set[str]:
    """Return the names of an earlier export's pictures in `out`.

    Raises InputError when anything else is there, an edited picture included: it may be somebody's work.
    """
    if not out.exists():
        return set()
    if not out.is_dir():
        raise InputError(f"--out: {out} is not a folder")
    lines = read_lines(out / METADATA)[0] if (out / METADATA).is_file() else []
    hashes = {line.get("file_name"): line.get("sha256") for line in lines if isinstance(line, dict)}
    there = sorted(p for p in out.iterdir() if p.name != METADATA and not is_temporary(p.name))
    for path in there:
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != hashes.get(path.name):
            raise InputError(
                f"--out: {out} holds {shown(path.name)}, which is no picture of an earlier export as it was"
            )
    return {path.name for path in there}


def _copy(source: Path, target: Path, size: int | None) -> None:
    temp = target.with_name(f"{TEMP_PREFIX}{target.name}{TEMP_SUFFIX}")
    shutil.copyfile(source, temp)
    if temp.stat().st_size != size:
        temp.unlink()
        raise HostError(f"{source}: is damaged; `genkit generate` with the same arguments draws it again")
    temp.replace(target)


def _line(name: str, r: Result) -> dict[str, Any]:
    line = {
        "file_name": name,
        "text": r.prompt,
        "id": r.id,
        "index": r.index,
        "seed": r.seed,
        "sha256": r.sha256,
        "scores": r.scores,
    }
    return line if r.meta is None else {**line, "meta": r.meta}
