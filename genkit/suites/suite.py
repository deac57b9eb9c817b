"""Suites: rows with a prompt, a task, and an expression that is true of a correct picture."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.files import place, user_path
from genkit.rows.prompts import checked_rows
from genkit.rows.request import Request, field_name
from genkit.rows.rowfiles import RowFile, open_rows
from genkit.scoring.gates import Expression
from genkit.suites import emoji, geneval

BUILT_IN = {"geneval": geneval.rows, "emoji": emoji.rows}
OWN = ("verify", "task")  # fields of a suite's row besides those of a prompt file
# Fields that select pictures, or draw more where some fail, are refused: every picture of a suite counts.
CHOOSING = ("gate", "rank_by", "keep", "max_images", "prune", "expansions")
MAX_TASK = 100  # characters


@dataclasses.dataclass(frozen=True)
class Suite:
    """A checked suite. rows: with `verify` as their `gate`; tasks: the task of each row."""

    name: str
    rows: list[Request]
    tasks: list[str]

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of the prompts and how they are judged, independent of row order and file name."""
        told = sorted(
            [str(r.id), task, r.prompt, r.gate, r.labels, r.num_images if _states(r) else None, r.fingerprint()]
            for r, task in zip(self.rows, self.tasks, strict=True)
        )
        return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode("utf-8", "backslashreplace")).hexdigest()

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """The names of the scores that the expressions use, with "p" if they use labels."""
        found = [Expression(str(row.gate), row.labels, names=None) for row in self.rows]
        return frozenset(name for e in found for name in (*e.names, *(["p"] if e.labels else [])))

    def needs_clip(self) -> bool:
        """Return whether an expression uses a CLIP score."""
        return any(Expression(str(r.gate), r.labels, names=None).needs_scorer for r in self.rows)


def read_suite(source: str | Path | Sequence[Mapping[str, Any]]) -> Suite:
    """Return a suite: a built-in one, one of a .jsonl, .csv or .yaml file, or one of rows as dictionaries.

    Raises InputError, naming file, line and field.
    """
    if isinstance(source, str | Path):
        text = str(source)
        if text in BUILT_IN:
            return _checked(RowFile(list(enumerate(BUILT_IN[text](), 1))), Path(f"suite {text}"), text)
        path = user_path(text)
        if not path.suffix and not path.exists():
            there = ", ".join(BUILT_IN)
            raise InputError(f"--suite: {shown(text)}: no such suite{nearest(text, BUILT_IN)}; give a file, or {there}")
        if path.suffix.lower() == ".txt":
            raise InputError(f"{place(path)}: a .txt line has no `verify`; a suite is a .jsonl, .csv or .yaml file")
        return _checked(open_rows(path, "genkit", OWN), path, path.stem)
    return _checked(RowFile(list(enumerate(map(dict, source), 1))), Path("suite"), "suite")


def _checked(file: RowFile, path: Path, name: str) -> Suite:
    tasks: list[str] = []
    try:
        shared = {name: value for name, value in file.defaults.items() if name not in OWN}
        peeled = _peeled(file, path, tasks)
        rows = checked_rows(dataclasses.replace(file, rows=peeled, defaults=shared), path)
    except InputError as error:
        raise InputError(as_verify(str(error))) from None
    return Suite(name, rows, tasks)


def _peeled(file: RowFile, path: Path, tasks: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows with `verify` as their gate, and append their tasks to `tasks`."""
    for line, fields in file.rows:
        try:
            given = {**file.defaults, **fields}
            for key in given:
                if field_name(key) in CHOOSING:
                    raise InputError(f"{shown(key)}: has no place in a suite: every picture counts, as it is drawn")
            verify, task = (_text(name, given) for name in OWN)
        except InputError as error:
            raise InputError(f"{place(path)}:{line}: {error}") from None
        tasks.append(task)
        yield line, {**{key: value for key, value in fields.items() if key not in OWN}, "gate": verify}


def _text(name: str, fields: Mapping[str, Any]) -> str:
    value = fields.get(name)
    if value is None:
        raise InputError(f"{name}: is missing{nearest(name, map(str, fields))}; {_MEANS[name]}")
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name}: {shown(value)} is not a text; {_MEANS[name]}")
    if name == "task" and (len(value) > MAX_TASK or any(ord(c) < 32 for c in value)):
        raise InputError(f"task: {shown(value)} is no name: at most {MAX_TASK} characters, in a line")
    return value.strip()


def as_verify(message: str) -> str:
    """Return a message about a row's gate with the name `verify`, which it has in a suite."""
    unknown = "; --scorer NAME adds those of an installed scorer" if "no such score;" in message else ""
    return re.sub(r"(^|: )gate: ", r"\1verify: ", message, count=1) + unknown


def _states(row: Request) -> bool:
    return "num_images" in row.model_fields_set


_MEANS = {
    "verify": "an expression that is true of a right picture, say p['a cat'] > 0.5",
    "task": "the name of the group that the row counts in, say counting",
}
