"""Decide on a recorded run row by row, in bounded memory: scores come from a Table, selection.json is streamed.

The result is that of `decide` on the same records; both use `judge`, `choose` and `verdicts_of`.
"""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from genkit.durable import disk, json_line, write_whole
from genkit.errors import InputError, nearest, shown
from genkit.rows.result import Result
from genkit.runs.columns import Wanted
from genkit.runs.records import SELECTION
from genkit.runs.table import Rows, Table
from genkit.scoring.gates import Expression, check_seen
from genkit.selection.choose import choose, read_known
from genkit.selection.decide import image_name, judge, verdicts_of
from genkit.selection.judged import Judged, reads_sim
from genkit.selection.picking import NONE, Picking

PIECE = 5000  # images written at a time
_TRUTH = {False: "false", True: "true"}


@dataclasses.dataclass(frozen=True)
class Question:
    """The options of a decision.

    where, rank_by, keep: replace gate, rank_by and keep of every row. picking: diversity and duplicates. votes: by
    image name, whether it was voted good; replaces gate and keep of every row. ballot: the file with the votes.
    """

    where: str | None = None
    rank_by: str | None = None
    keep: int | None = None
    picking: Picking = NONE
    votes: Mapping[str, bool] | None = None
    ballot: str | None = None

    def expressions(self, rows: Rows) -> list[Expression]:
        """Return all expressions of the options and rows. Raises InputError, naming the option, for an invalid one."""
        labels = _labels(rows)
        found = []
        for option, text in (("--where", self.where), ("--rank-by", self.rank_by)):
            if text is not None:
                try:
                    found.append(Expression(text, labels, names=None))
                except InputError as error:
                    raise InputError(f"{option}: {error}") from None
        for _, _, gate, order, _, own in rows.kinds:
            found += [Expression(text, own, names=None) for text in (gate, order) if text is not None]
        return found

    def wanted(self, rows: Rows) -> Wanted:
        """Return the scores that these expressions, the gallery and `picking` need."""
        found = self.expressions(rows)
        names = frozenset({"clip"}.union(*(expression.names for expression in found)))
        labels = frozenset[str]().union(*(expression.labels for expression in found))
        alike = self.picking != NONE or any(map(reads_sim, found))
        classes = frozenset(label for expression in found for label in expression.classes)
        seen = {"boxes", "detected"} if any(expression.seen for expression in found) else set()
        seen |= {"answers"} if any(expression.questions for expression in found) else set()
        return Wanted(names, labels, classes, frozenset(seen), alike)

    def check(self, table: Table, classes: Collection[str] | None = None) -> None:
        """Raise InputError, naming the option, for an expression that reads a score that no image has.

        classes: the labels of the run's classifier, where it has one.
        """
        labels, known = _labels(table.rows), table.names | {"sim"}
        for option, text in (("--where", self.where), ("--rank-by", self.rank_by)):
            if text is None:
                continue
            try:
                expression = Expression(text, labels, known)
            except InputError as error:
                raise InputError(f"{option}: {error}") from None
            if option == "--where" and not expression.decides:
                raise InputError(f"{option}: {shown(text)} is a number, not true or false; compare it with one")
            for name in sorted(expression.names - known if len(table) else ()):
                raise InputError(f"{option}: {shown(name)}: no image of this run has that score{nearest(name, known)}")
            if expression.senses:
                check_seen(option, expression, [r.scores for r in table.results(range(len(table)))], classes)


def _labels(rows: Rows) -> set[str]:
    return {label for *_, labels in rows.kinds for label in labels or ()}


@dataclasses.dataclass
class Selection:
    """The decisions on all images of a table, as columns in its order.

    kept: 0 or 1. rank: 0 for none. reason: why it is kept or not. notes: further fields in selection.json, by image.
    ranked: number of ranked images of each row. hard: rows with too few passing images, see `decide`.
    """

    table: Table
    question: Question
    kept: bytearray = dataclasses.field(default_factory=bytearray)
    rank: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    reason: list[str] = dataclasses.field(default_factory=list)
    notes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    ranked: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    hard: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    _texts: dict[str, str] = dataclasses.field(default_factory=dict)  # interned reasons

    @property
    def count(self) -> int:
        """The number of kept images."""
        return self.kept.count(1)

    @property
    def head(self) -> dict[str, Any]:
        """The fields of selection.json before `images`."""
        q = self.question
        options = {"where": q.where, "rank_by": q.rank_by, "keep": q.keep, **q.picking.to_json()}
        options |= {} if q.ballot is None else {"votes": q.ballot}
        return {"kept": self.count, "of": len(self.kept), **options, "hard": self.hard}

    def kept_images(self) -> list[int]:
        """Return the images that are kept, in the order of the rows."""
        return [image for image, kept in enumerate(self.kept) if kept]

    def enter(self, row: Judged, chosen: list[int], notes: Mapping[Any, dict[str, Any]]) -> None:
        """Append the decisions on a row."""
        for kept, rank, reason, note in verdicts_of(row, chosen, notes):
            if note:
                self.notes[len(self.kept)] = note
            self.kept.append(kept)
            self.rank.append(rank or 0)
            self.reason.append(self._texts.setdefault(reason, reason))
        self.ranked.append(len(row.ranked))
        if row.hard is not None:
            self.hard.append(row.hard)

    def images(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (name, entry in selection.json) of every image."""
        for n in range(len(self.table.rows)):
            span = self.table.span(n)
            for image, r in zip(span, self.table.results(span), strict=True):
                verdict = {
                    "id": r.id, "index": r.index, "file": r.file, "kept": bool(self.kept[image]),
                    "rank": self.rank[image] or None, "reason": self.reason[image],
                }  # fmt: skip
                yield image_name(r), verdict | self.notes.get(image, {})


def select(folder: Path, config: Mapping[str, Any], question: Question) -> Selection:
    """Decide on the recorded scores of a run. config: run.json. Raises InputError, see `decide` and `Question`."""
    from genkit.runs.table import read_row_table

    rows = read_row_table(folder)
    table = Table(folder, rows, question.wanted(rows))
    question.check(table, (config["binding"].get("classifier") or {}).get("labels"))
    kept = question.votes is None and any(keep is not None for _, keep, *_ in rows.kinds)
    question.picking.check_rows(question.keep is not None or kept)
    selection = Selection(table, question)
    if question.picking == NONE and not table.wanted.hashes:
        for judged in _judged(table, question):
            (chosen,), notes = choose([judged], question.picking, None)
            selection.enter(judged, chosen, notes)
        return selection
    orders = [question.where, question.rank_by, *{order for _, _, _, order, *_ in rows.kinds}]
    found = table.results(range(len(table)))
    known = read_known(folder, config, found, question.picking, orders)
    everything = list(_judged(table, question, found))
    lists, notes = choose(everything, question.picking, known)
    for judged, chosen in zip(everything, lists, strict=True):
        selection.enter(judged, chosen, notes)
    return selection


def _judged(table: Table, question: Question, found: list[Result] | None = None) -> Iterator[Judged]:
    """Yield each row with its images judged. found: the records of all images, if there are any at hand."""
    labels, rows = _labels(table.rows), table.rows
    asked_gate, asked_order = (
        None if text is None else Expression(text, labels, table.names) for text in (question.where, question.rank_by)
    )
    compiled = functools.cache(lambda text, labels: Expression(text, labels, names=None))
    ahead = question.where is not None or question.keep is not None or question.votes is not None
    for n in range(len(rows)):
        row, span = rows[n], table.span(n)
        if question.votes is not None:
            row = row._replace(gate=None, keep=None)
        gate = asked_gate or (None if row.gate is None else compiled(row.gate, row.labels))
        order = asked_order or (None if row.rank_by is None else compiled(row.rank_by, row.labels))
        results = table.results(span) if found is None else found[span.start : span.stop]
        yield judge(row, results, gate, order, question.keep, ahead, question.votes)


def write_selection_file(folder: Path, selection: Selection) -> None:
    """Write selection.json of a run folder, whole or not at all, a piece at a time. Raises HostError."""
    with disk(folder / SELECTION):
        write_whole(folder / SELECTION, (text.encode("utf-8", "backslashreplace") for text in _pieces(selection)))


def _pieces(selection: Selection) -> Iterator[str]:
    """Yield the text of selection.json, as `write_selection` writes it."""
    yield json_line(selection.head).strip()[:-1] + ', "images": {'
    table, quoted = selection.table, functools.cache(lambda text: json_line(text).strip())
    parts: list[str] = []
    done = 0
    plain = table.plain(range(len(table)))
    for image, (row_id, number, file) in enumerate(table.places()):
        path = "null" if file is None else f'"{file}"' if plain[image] else quoted(file)
        note = selection.notes.get(image)
        more = "" if note is None else ", " + json_line(note).strip()[1:-1]
        parts.append(
            f'"{row_id}-{number:02d}": {{"id": "{row_id}", "index": {number}, "file": {path}, '
            f'"kept": {_TRUTH[bool(selection.kept[image])]}, "rank": {selection.rank[image] or "null"}, '
            f'"reason": {quoted(selection.reason[image])}{more}}}'
        )
        if len(parts) == PIECE:
            yield (", " if done else "") + ", ".join(parts)
            done += len(parts)
            parts = []
    yield (", " if done and parts else "") + ", ".join(parts) + "}}\n"
