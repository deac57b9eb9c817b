"""Read prompt files into checked Requests, or raise an error that names file, line and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genkit.errors import InputError, shown
from genkit.files import place, user_path
from genkit.rows.request import Request, field_name, over, prepared
from genkit.rows.rowfiles import AUTO, RowFile, open_rows
from genkit.rows.typed import typed

__all__ = ["read_prompts", "typed"]

MAX_ROWS = 1_000_000


class Rows(list[Request]):
    """Rows of a prompt file, and notes of what was assumed as it was read."""

    notes: tuple[str, ...] = ()


def read_prompts(path: str | Path, defaults: dict[str, Any] | None = None, format_in: str = AUTO) -> Rows:
    """Return the rows of a .txt, .jsonl, .csv or .yaml prompt file, or of another tool's, in order, each with an id.

    A row without an id gets its number, zero padded to 6: the first row of the file is 000000. `image` and `mask_image`
    are relative to the file's folder and returned as absolute paths. defaults: fields (genkit's names) for rows that
    set them neither themselves nor in the file's `defaults:`. format_in: of another tool, one of rowfiles.FORMS; "auto"
    recognises it in .txt and .json files, "genkit" never. `Request.source` is file and line.

    Raises InputError, one line naming file, line and field. The whole file is checked, pictures included, before this
    returns.
    """
    path = user_path(path)
    return checked_rows(open_rows(path, format_in), path, defaults)


def checked_rows(file: RowFile, path: Path, defaults: dict[str, Any] | None = None) -> Rows:
    """Return the rows of an opened prompt file, checked as `read_prompts` says; path: where it lies."""
    name = place(path)
    own = _defaults(file, name, path.parent)
    shared = over(defaults or {}, own)
    rows, any_seed = Rows(), 0
    taken: dict[str, int] = {}  # line of each id in lower case: some file systems ignore case
    for line, fields in file.rows:
        try:
            if len(rows) == MAX_ROWS:
                raise InputError(f"more than {MAX_ROWS} rows; split the file")
            row = Request(**{"id": f"{len(rows):06d}", **over(shared, prepared(fields, path.parent))})
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
        any_seed += any(field_name(name) == "seed" and value in (-1, -1.0) for name, value in fields.items())
        taken[key] = line
        rows.append(row)
    if not rows:
        raise InputError(f"{name}: holds no rows")
    drawn = [f"{name}: seed -1 in {any_seed} rows: drawn from --seed for each image, and recorded"] if any_seed else []
    rows.notes = (*file.notes, *drawn)
    return rows


def _defaults(file: RowFile, name: str, folder: Path) -> dict[str, Any]:
    try:
        if "id" in file.defaults:
            raise InputError("id: one id for all rows; give each row its own")
        return prepared(file.defaults, folder)
    except InputError as error:
        raise InputError(f"{name}:{file.defaults_line}: defaults: {error}") from None
