"""Read prompt files into checked Requests, or raise an error that names file, line and field."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from genkit.errors import InputError, shown
from genkit.files import place
from genkit.pictures.images import check_image
from genkit.rows.request import Request, canonical, over
from genkit.rows.rowfiles import RowFile, open_rows
from genkit.rows.typed import typed

__all__ = ["read_prompts", "typed"]

MAX_ROWS = 1_000_000


def read_prompts(path: str | Path, defaults: dict[str, Any] | None = None) -> list[Request]:
    """Return the rows of a .txt, .jsonl, .csv or .yaml prompt file, in order, each with an id.

    A row without an id gets its number, zero padded to 6: the first row of the file is 000000. `image` and `mask_image`
    are relative to the file's folder and returned as absolute paths. defaults: fields (genkit's names) for rows that
    set them neither themselves nor in the file's `defaults:`. `Request.source` is file and line.

    Raises InputError, one line naming file, line and field. The whole file is checked, pictures included, before this
    returns.
    """
    path = Path(path)
    file, name = open_rows(path), place(path)
    own = _defaults(file, name, path.parent)
    shared = over(defaults or {}, own)
    rows: list[Request] = []
    taken: dict[str, int] = {}  # line of each id in lower case: some file systems ignore case
    for line, fields in file.rows:
        try:
            if len(rows) == MAX_ROWS:
                raise InputError(f"more than {MAX_ROWS} rows; split the file")
            row = Request(**{"id": f"{len(rows):06d}", **over(shared, _prepared(fields, path.parent))})
            key = str(row.id).lower()
            if key in taken:
                raise InputError(
                    f"id: {shown(row.id)} is the id of line {taken[key]} too (case does not tell ids apart)"
                )
        except InputError as error:
            field = str(error).split(":")[0]
            origin = f" (line {file.defaults_line}: defaults)" if field in own and field not in fields else ""
            raise InputError(f"{name}:{line}: {error}{origin}") from None
        row._source = f"{name}:{line}"
        taken[key] = line
        rows.append(row)
    if not rows:
        raise InputError(f"{name}: holds no rows")
    return rows


def _defaults(file: RowFile, name: str, folder: Path) -> dict[str, Any]:
    try:
        if "id" in file.defaults:
            raise InputError("id: one id for all rows; give each row its own")
        return _prepared(file.defaults, folder)
    except InputError as error:
        raise InputError(f"{name}:{file.defaults_line}: defaults: {error}") from None


def _prepared(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the fields under genkit's names, after checking what Request does not: the prompt and pictures."""
    found = canonical(fields)
    prompt = found.get("prompt", "-")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        raise InputError(f"prompt: {shown(prompt)} is empty; leave the field out for a model without prompts")
    for field in ("image", "mask_image"):
        if isinstance(found.get(field), str) and found[field]:
            found[field] = _picture(folder, field, found[field])
    return found


def _picture(folder: Path, field: str, text: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|(data|file):", text):
        raise InputError(f"{field}: {shown(text)} is a URL; pictures are read from local files only")
    if len(text) > 4096:
        raise InputError(f"{field}: {shown(text)} is too long for a path")
    path = Path(os.path.abspath(folder), text)
    try:
        check_image(path, contained=True)
    except InputError as error:
        raise InputError(f"{field}: {error}") from None
    return str(path)
