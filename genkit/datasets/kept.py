"""What every export contains of an image: its bytes, checked by their hash, and its metadata."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from genkit.errors import HostError
from genkit.rows.result import Result


def picture(folder: Path, r: Result) -> bytes:
    """Return the bytes of a record's picture. Raises HostError if their hash is not the recorded one."""
    path = folder / str(r.file)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != r.sha256:
        raise HostError(f"{path}: is damaged; `genkit generate` with the same arguments draws it again")
    return data


def caption(r: Result) -> dict[str, Any]:
    """Return the metadata of a picture for an export."""
    line = {
        "text": r.prompt,
        "id": r.id,
        "index": r.index,
        "seed": r.seed,
        "sha256": r.sha256,
        "scores": r.scores,
    }
    return line if r.meta is None else {**line, "meta": r.meta}
