"""The four formats of prompt files, read into rows of fields as written, each with its line number."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.files import file_size, parse_json, place, read_utf8
from genkit.rows.request import ALIASES, Request, canonical
from genkit.rows.typed import typed

MAX_BYTES = 2**27  # of a prompt file

Rows = Iterable[tuple[int, dict[str, Any]]]  # line number from 1, fields as written


@dataclasses.dataclass(frozen=True)
class RowFile:
    """The contents of a prompt file: rows, parsed lazily, and YAML's `defaults:` with their line."""

    rows: Rows
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    defaults_line: int = 1


def open_rows(path: Path) -> RowFile:
    """Open a .txt, .jsonl, .csv or .yaml file. Raises InputError, now or while iterating, naming file and line."""
    name = place(path)
    reader = _FORMATS.get(path.suffix.lower())
    if reader is None:
        file_size(path)  # raises for a folder or a missing file
        raise InputError(f"{name}: unknown kind of file {shown(path.suffix)}; give .txt, .jsonl, .csv or .yaml")
    return reader(read_utf8(path, MAX_BYTES), name)


def _read_txt(text: str, name: str) -> RowFile:
    return RowFile(_txt_rows(text, name))


def _txt_rows(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip(" \t")
        if not line.strip() or line.startswith("#"):
            continue
        option = re.search(r"(?:^|\s)--([A-Za-z][A-Za-z_-]*)", line)
        if option:
            raise InputError(f"{name}:{number}: {shown('--' + option[1])}: {_option_hint(option[1])}")
        yield number, {"prompt": line}


def _option_hint(option: str) -> str:
    """Return the hint for an option inside a prompt line, as other tools' prompt files have: it is not executed."""
    known = {**_OPTIONS, **ALIASES, **{field: field for field in Request.model_fields}}
    field = known.get(option.replace("-", "_"))
    meant = f"`{field}` is a field" if field else "a .txt line is a prompt and nothing else; fields are"
    return f"{meant} of .jsonl, .csv and .yaml files, options in a line are not read"


def _read_jsonl(text: str, name: str) -> RowFile:
    return RowFile(_jsonl_rows(text, name))


def _jsonl_rows(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t")
        if not line:
            continue
        if line.startswith("["):
            raise InputError(f"{name}:{number}: a JSON array; .jsonl has one object {{…}} a line, no [ ] around them")
        if line == "{":
            raise InputError(f"{name}:{number}: an object over several lines; .jsonl has one whole object {{…}} a line")
        yield number, parse_json(line, f"{name}:{number}")


def _read_csv(text: str, name: str) -> RowFile:
    rows = _csv_lines(text, name)
    line, header = next(rows, (1, []))
    header = [column.strip() for column in header]
    try:
        if len(set(header)) < len(header) or "" in header:
            twice = next((c for i, c in enumerate(header) if c in header[:i]), "")
            raise InputError(f"header: column {shown(twice)} {'is there twice' if twice else 'has no name'}")
        if len(header) == 1 and re.search("[;\t|]", header[0]):
            raise InputError(f"header: {shown(header[0])}: columns are separated by commas here")
        canonical(dict.fromkeys(header, "8x8"))  # for unknown names and aliases of the same field
    except InputError as error:
        raise InputError(f"{name}:{line}: {error}") from None
    return RowFile(_csv_rows(rows, header, name))


def _csv_rows(
    rows: Iterator[tuple[int, list[str]]], header: list[str], name: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue  # empty rows that spreadsheets write below the table
        if len(cells) != len(header):
            raise InputError(f"{name}:{line}: has {len(cells)} cells under {len(header)} columns; quote commas in text")
        try:
            stated = {column: cell for column, cell in zip(header, cells, strict=True) if cell.strip()}
            yield line, {column: typed(ALIASES.get(column, column), cell) for column, cell in stated.items()}
        except InputError as error:
            raise InputError(f"{name}:{line}: {error}") from None


def _csv_lines(text: str, name: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = _CSV_ERRORS.get(str(error).split(" (")[0], str(error))
            raise InputError(f"{name}:{line}: {reason}") from None
        if cells is None:
            return
        if cells:
            yield line, cells


def _read_yaml(text: str, name: str) -> RowFile:
    from genkit.rows.yamltext import Block, parse_yaml

    document = parse_yaml(text, name)
    if isinstance(document, list):
        document = {"requests": document}
    if not isinstance(document, dict):
        raise InputError(f"{name}:1: holds {shown(document)}; a prompt file has `requests:`, a list, and `defaults:`")
    for key in document:
        if key not in ("defaults", "requests"):
            raise InputError(f"{name}:1: {shown(key)}: unknown key{nearest(key, ['defaults', 'requests'])}")
    defaults, requests = document.get("defaults") or Block(), document.get("requests")
    if not isinstance(defaults, Block):
        raise InputError(f"{name}:1: defaults: {shown(defaults)} is not a mapping of fields")
    if not isinstance(requests, list) or not requests:
        raise InputError(f"{name}:1: requests: {shown(requests)} is not a list of rows")
    previous = 1
    for index, row in enumerate(requests):
        if not isinstance(row, Block):
            raise InputError(f"{name}:{previous}: row {index}: {shown(row)} is not a mapping; write `- prompt: …`")
        previous = row.line
    return RowFile(((row.line, dict(row)) for row in requests), dict(defaults), defaults.line or 1)


_CSV_ERRORS = {
    "unexpected end of data": "a quote is opened and never closed",
    "field larger than field limit": "a cell is longer than 131072 characters: is a quote not closed?",
    "',' expected after '\"'": "text after a closing quote: is a quote not closed, or one inside a cell not doubled?",
}
# Option letters in other tools' prompt lines, and the fields they mean.
_OPTIONS = {
    "n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "s": "num_inference_steps",
    "l": "guidance_scale", "t": "strength",
}  # fmt: skip
_FORMATS: dict[str, Callable[[str, str], RowFile]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
}
