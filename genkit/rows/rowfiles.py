"""The four formats of prompt files, read into rows of fields as written, each with its line number."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.files import file_size, parse_json, place, read_utf8
from genkit.rows.prompting import PROMPTS
from genkit.rows.request import ALIASES, SCHEDULES, Request, canonical, field_name
from genkit.rows.typed import COUNTS, NUMBERS, typed

MAX_BYTES = 2**27  # of a prompt file
META = "meta."  # prefix of the names of table columns whose cells go into the field `meta`
AUTO, OWN = "auto", "genkit"  # forms: recognise files of other tools, or never
FORMS = {
    "a1111-lines": "lines of options of AUTOMATIC1111",
    "infotext": "infotext of AUTOMATIC1111",
    "kohya": "lines of prompts of kohya's scripts",
    "comfyui": "a graph of ComfyUI",
}

Numbered = Iterable[tuple[int, dict[str, Any]]]  # line number from 1, fields as written


@dataclasses.dataclass(frozen=True)
class RowFile:
    """The contents of a prompt file: rows, parsed lazily, and YAML's `defaults:` with their line."""

    rows: Numbered
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    defaults_line: int = 1
    notes: list[str] = dataclasses.field(default_factory=list)  # what was assumed; complete once all rows are read


def open_rows(path: Path, form: str = AUTO, more: Collection[str] = ()) -> RowFile:
    """Open a .txt, .jsonl, .csv or .yaml file, or one of another tool. form: one of FORMS.

    more: names that a table's columns may have besides the fields of a row. Raises InputError, now or while iterating,
    naming file and line.
    """
    name = place(path)
    if form not in (AUTO, OWN, *FORMS):
        known = (AUTO, OWN, *FORMS)
        raise InputError(
            f"--format-in: {shown(form)}: no such form{nearest(form, known)}; there are {', '.join(known)}"
        )
    suffix = path.suffix.lower()
    reader = _FORMATS.get(suffix)
    if reader is None and suffix != ".json" and form in (AUTO, OWN):
        file_size(path)  # raises for a folder or a missing file
        raise InputError(f"{name}: unknown kind of file {shown(path.suffix)}; give .txt, .jsonl, .csv or .yaml")
    text = read_utf8(path, MAX_BYTES)
    foreign = form in FORMS or (form == AUTO and suffix in (".txt", ".json"))
    found = _read_foreign(text, name, form) if foreign else None
    if found is not None:
        return found
    if reader is None:
        raise InputError(
            f"{name}: holds no graph of ComfyUI as its API takes it; rows go into a .jsonl, .csv or .yaml file"
        )
    return _read_csv(text, name, more) if reader is _read_csv else reader(text, name)


def _read_foreign(text: str, name: str, form: str) -> RowFile | None:
    """Return the rows of a file of another tool; None if it is recognised as none."""
    from genkit.rows.foreign import numbered_rows, sniff

    found = sniff(text) if form == AUTO else form
    if found is None:
        return None
    notes = [f"{name}: read as {FORMS[found]}"]
    rows = numbered_rows(text, found, name, notes)
    if found in ("a1111-lines", "infotext"):
        rows = [(at, {"syntax": "a1111", **fields}) for at, fields in rows]
    if found == "infotext":  # its prompts are expanded already: escape what would be a template again
        for _, fields in rows:
            fields |= {key: re.sub("[{}]|_(?=_)", r"\\\g<0>", fields[key]) for key in PROMPTS if key in fields}
    return RowFile(rows, notes=notes)


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
        row = parse_json(line, f"{name}:{number}", gaps=True)
        yield number, {key: None if value != value else value for key, value in row.items()}  # NaN: a gap of pandas


def _read_csv(text: str, name: str, more: Collection[str] = ()) -> RowFile:
    first, _, rest = text.partition("\n")
    told = re.fullmatch(r"sep=([,;\t|])\s*", first)  # a line that Excel reads, and writes
    delimiter = told[1] if told else _delimiter(first)
    rows = _csv_lines("\n" + rest if told else text, name, delimiter)
    line, header = next(rows, (1, []))
    header = [column.strip() for column in header]
    while header and not header[-1]:  # empty columns at the end, whose cells must be empty, too
        header.pop()
    notes = [] if delimiter == "," else [f"{name}:{line}: columns are separated by {_SEPARATORS[delimiter]}"]
    try:
        named = [column for column in header if not _is_index(column)]
        if len(set(named)) < len(named) or "" in header[1:]:
            twice = next((c for i, c in enumerate(named) if c in named[:i]), "")
            raise InputError(f"header: column {shown(twice)} {'is there twice' if twice else 'has no name'}")
        if len(header) == 1 and re.search("[;\t|]", header[0]):
            raise InputError(f"header: {shown(header[0])}: columns are separated by commas here")
        canonical(
            {c: _SOME.get(field_name(c), "8x8") for c in named if c not in more and not _is_meta(c)}
        )  # unknown names, fields given twice
    except InputError as error:
        hint = f"; names of your own columns must begin with {META!r}" if "unknown field" in str(error) else ""
        raise InputError(f"{name}:{line}: {error}{hint}") from None
    if len(named) < len(header):
        notes.append(f"{name}:{line}: a column of row numbers is not used")
    return RowFile(_csv_rows(rows, header, name, delimiter == ";"), notes=notes)


def _delimiter(header: str) -> str:
    """Return the separator under which most names of the header are fields; a comma where none is."""

    def known(separator: str) -> int:
        names = (field_name(column.strip(" \"'")) for column in header.split(separator))
        return sum(name in (*Request.model_fields, "size") for name in names)

    return max((",", ";", "\t", "|"), key=lambda separator: (header.count(separator) > 0) * known(separator))


def _is_index(column: str) -> bool:
    """Whether a column holds the row numbers of pandas, which have no name, or one like "Unnamed: 0"."""
    return not column or re.fullmatch(r"Unnamed: \d+", column) is not None


def _is_meta(column: str) -> bool:
    return column.lower().startswith(META) and len(column) > len(META)


def _csv_rows(
    rows: Iterator[tuple[int, list[str]]], header: list[str], name: str, decimal_comma: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue  # empty rows that spreadsheets write below the table
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(header):
            raise InputError(f"{name}:{line}: has {len(cells)} cells under {len(header)} columns; quote commas in text")
        try:
            stated = {column: cell for column, cell in zip(header, cells, strict=True) if cell.strip()}
            numbers = [cell for column, cell in stated.items() if _is_index(column) and not cell.strip().isdigit()]
            if numbers:
                raise InputError(f"header: the column of {shown(numbers[0])} has no name")
            own = {column[len(META) :]: cell for column, cell in stated.items() if _is_meta(column)}
            fields = {
                column: _cell(field_name(column), cell, decimal_comma)
                for column, cell in stated.items()
                if not _is_index(column) and not _is_meta(column)
            }
            if own:
                meta = next((column for column in fields if field_name(column) == "meta"), "meta")
                fields[meta] = {**(fields.get(meta) or {}), **own}
            yield line, fields
        except InputError as error:
            raise InputError(f"{name}:{line}: {error}") from None


def _cell(field: str, cell: str, decimal_comma: bool) -> Any:
    """Return the value of a cell; in a table with semicolons 7,5 is a number, as in the languages that write so."""
    if field in NUMBERS and cell.strip().lower() in ("nan", "none", "null", "na", "n/a"):
        return None
    comma = decimal_comma and field in (*NUMBERS, *COUNTS) and re.fullmatch(r"\s*[-+]?\d+,\d+\s*", cell)
    return typed(field, cell.replace(",", ".") if comma else cell)


def _csv_lines(text: str, name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
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


# Valid values for a check of the header alone, in columns where any text would be an error
_SOME = {"scheduler": "ddim", **dict.fromkeys(SCHEDULES, "karras")}
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
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
    ".tsv": _read_csv,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
}
