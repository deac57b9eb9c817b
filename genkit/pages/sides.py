"""`genkit label --side-by-side`: the pictures of a row at once; the marked ones are good, the others bad."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.pages.desk import Desk, prompt_of
from genkit.rows.result import Result
from genkit.selection.ballots import Ballots
from genkit.selection.decide import image_name
from genkit.selection.votes import UNDO, line_of, read_votes, standing

SHOWN = 9  # pictures at a time: one for each digit key


class RowDesk(Desk):
    """One row at a time, in the order in which rows come in `pictures`."""

    page, asks, words = "sides", "row", ("store",)
    keys = "1 to 9 mark good ones, enter stores (the others are bad), u undo, space later"

    def __init__(self, folder: Path, pictures: Mapping[str, Result], ballots: Ballots) -> None:
        self._ballots, self._pictures = ballots, [*pictures.values()]
        rows: dict[str, list[int]] = defaultdict(list)
        for k, r in enumerate(self._pictures):
            rows[r.id].append(k)
        self._rows = [*rows.values()]
        numbers = {name: k for k, name in enumerate(pictures)}
        found, _ = standing(read_votes(ballots.path), pictures, str(ballots.path), strict=False)
        self._votes = {numbers[name]: votes for name, votes in found.items()}
        self._before: dict[int, dict[int, list[bool]]] = {}  # the votes that a row had when it was asked about
        self._marks: dict[int, set[int]] = {}  # of rows that are asked about again
        latest = {k: place for place, k in enumerate(self._votes)}
        finished = [n for n, row in enumerate(self._rows) if latest.keys() >= {*row}]
        finished.sort(key=lambda n: max(latest[k] for k in self._rows[n]))
        super().__init__([folder / str(r.file) for r in self._pictures], len(self._rows), finished)

    def _store(self, number: int, answer: Mapping[str, Any]) -> None:
        good, row = self._marked(number, answer), self._rows[number]
        before = {k: self._votes.get(k, []) for k in row}
        self._change({k: [k in good] for k in row})
        self._before[number] = before
        self._marks.pop(number, None)

    def _undo(self, number: int) -> None:
        row = self._rows[number]
        marks = {k for k in row if self._votes[k][-1]}
        self._change(self._before.get(number, {k: [] for k in row}))
        self._before.pop(number, None)
        self._marks[number] = marks

    def _put_off(self, number: int, answer: Mapping[str, Any]) -> None:
        self._marks[number] = self._marked(number, answer)

    def _marked(self, number: int, answer: Mapping[str, Any]) -> set[int]:
        """Return the pictures that an answer calls good. Raises ValueError, TypeError or KeyError."""
        good = set(answer["good"])
        if not good <= {*self._rows[number]} or any(type(k) is not int for k in good):
            raise ValueError("not a vote")
        return good

    def _change(self, votes: Mapping[int, list[bool]]) -> None:
        """Give each picture these votes, in one write: what it has otherwise is cancelled.

        All that is cancelled comes before all that is new. So, of a write that a power cut tore, at least one picture
        has no vote: the row counts as unfinished, and is asked about again with what it has as marks.
        """
        changed = {k: new for k, new in votes.items() if new != self._votes.get(k, [])}
        lines = [line_of(self._pictures[k], UNDO) for k in changed for _ in self._votes.get(k, [])]
        lines += [line_of(self._pictures[k], "yes" if good else "no") for k, new in changed.items() for good in new]
        self._ballots.add(lines)
        for k, new in changed.items():
            self._votes.pop(k, None)
            if new:
                self._votes[k] = new

    def _state(self) -> dict[str, Any]:
        good, waiting = sum(votes[-1] for votes in self._votes.values()), [*itertools.islice(self._waiting, 2)]
        row = None
        if waiting:
            numbers = self._rows[waiting[0]]
            marks = self._marks.get(waiting[0], {k for k in numbers if self._votes.get(k, [False])[-1]})
            images = [{"number": k, "name": image_name(self._pictures[k]), "good": k in marks} for k in numbers]
            first = self._pictures[numbers[0]]
            row = {"number": waiting[0], "name": first.id, "prompt": prompt_of(first), "images": images}
        ahead = self._rows[waiting[1]][:SHOWN] if waiting[1:] else []
        counts = {"good": good, "bad": len(self._votes) - good}
        return {**super()._state(), **counts, "row": row, "next": ahead}
