"""Two runs of the same rows: which pictures of them are a pair."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.errors import InputError, shown
from genkit.files import there
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.records import read_config, read_results, read_rows
from genkit.selection.decide import image_name


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two runs."""

    folder: Path
    config: Mapping[str, Any]
    rows: Mapping[str, Request]
    results: Mapping[str, Result]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same row and image number in both runs, drawn from the same prompt and seed."""

    name: str
    a: Result
    b: Result

    @property
    def group(self) -> str:
        """The group of correlated pairs that this one belongs to: its prompt or, without one, its row."""
        return self.a.prompt or f"\0{self.a.id}"


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two runs, their pairs in the order of the first, and the names of unpaired pictures by reason."""

    one: Side
    two: Side
    pairs: list[Pair]
    alone: dict[str, list[str]]


def pair_runs(a: Path, b: Path) -> Paired:
    """Return the pairs of two run folders. Raises InputError for other folders, and for runs without any pair."""
    one, two = _side(a), _side(b)
    if a.resolve() == b.resolve():
        raise InputError(f"{b}: is the first run again")
    pairs, alone = pair_up(one.results, two.results)
    if not pairs:
        why = ", ".join(f"{len(names)} {reason}" for reason, names in alone.items()) or "both are empty"
        raise InputError(f"{a}, {b}: no picture has a partner of the same row, number, prompt and seed: {why}")
    return Paired(one, two, pairs, alone)


def _side(folder: Path) -> Side:
    config = read_config(folder)
    if config is None:
        raise InputError(f"{shown(str(folder))}: holds no run.json: not a run folder")
    rows = {str(row.id): row for row in read_rows(folder)}
    places = {row: place for place, row in enumerate(rows)}
    found = sorted((r for r in read_results(folder, say=True) if r.id in rows), key=lambda r: (places[r.id], r.index))
    results = {image_name(r): r for r in found}
    files = {*there(folder, [folder / str(r.file) for r in found if r.status == "done"])}
    for name, r in results.items():
        if r.status == "done" and folder / str(r.file) not in files:
            results[name] = dataclasses.replace(r, status="missing")
    return Side(folder, config, rows, results)


def pair_up(a: Mapping[str, Result], b: Mapping[str, Result]) -> tuple[list[Pair], dict[str, list[str]]]:
    """Return the pairs in the order of A, and the names of unpaired pictures by reason."""
    pairs: list[Pair] = []
    alone: dict[str, list[str]] = defaultdict(list)
    for name in [*a, *(name for name in b if name not in a)]:
        one, two = a.get(name), b.get(name)
        if one is None or two is None:
            alone["only in A" if two is None else "only in B"].append(name)
        elif one.status != "done" or two.status != "done":
            alone["not finished in both"].append(name)
        elif one.prompt != two.prompt:
            alone["of another prompt"].append(name)
        elif one.seed != two.seed:
            alone["of another seed"].append(name)
        else:
            pairs.append(Pair(name, one, two))
    return pairs, dict(alone)
