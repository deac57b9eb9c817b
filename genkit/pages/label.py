"""`genkit label`: a page that shows a run's pictures and takes votes on them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.errors import EXIT_SIGINT, InputError, shown
from genkit.pages.desk import Desk, place_of, prompt_of
from genkit.pages.server import check_port, serve
from genkit.pages.sides import RowDesk
from genkit.rows.result import Result
from genkit.runs.records import read_rows
from genkit.scoring.gates import passes
from genkit.selection.ballots import Ballots, held
from genkit.selection.calibrate import check_asked, checked_gate, read_pictures
from genkit.selection.decide import image_name
from genkit.selection.votes import COLUMNS, MEANING, UNDO, VOTES, line_of, read_votes, standing


class PictureDesk(Desk):
    """One picture at a time, in the order of `pictures`."""

    page, asks, words = "label", "image", ("yes", "no")
    keys = "y good, n bad, u undo, space later"

    def __init__(self, folder: Path, pictures: Mapping[str, Result], ballots: Ballots) -> None:
        self._ballots, self._pictures = ballots, [*pictures.values()]
        numbers = {name: k for k, name in enumerate(pictures)}
        found, _ = standing(read_votes(ballots.path), pictures, str(ballots.path), strict=False)
        self._votes = {numbers[name]: votes[-1] for name, votes in found.items()}
        super().__init__([folder / str(r.file) for r in self._pictures], len(pictures), self._votes)

    def _store(self, number: int, answer: Mapping[str, Any]) -> None:
        self._ballots.add([line_of(self._pictures[number], answer["vote"])])
        self._votes[number] = bool(MEANING[answer["vote"]])

    def _undo(self, number: int) -> None:
        self._ballots.add([line_of(self._pictures[number], UNDO)])
        del self._votes[number]

    def _state(self) -> dict[str, Any]:
        good, waiting = sum(self._votes.values()), [*itertools.islice(self._waiting, 2)]
        image = None
        if waiting:
            r = self._pictures[waiting[0]]
            image = {"number": waiting[0], "name": image_name(r), "prompt": prompt_of(r)}
        counts = {"good": good, "bad": len(self._votes) - good}
        return {**super()._state(), **counts, "image": image, "next": waiting[1] if waiting[1:] else None}


def label(
    folder: Path, where: str | None = None, seed: int | None = 0, port: int = 0, side_by_side: bool = False
) -> int:
    """Serve the page until Ctrl-C; returns 130. The address is printed on standard output.

    where: show only pictures that pass. seed: of the order, which is random so that the labels stand for the run; None:
    row by row. port: 0 takes a free one. side_by_side: all pictures of a row at once. Raises InputError, HostError.
    """
    check_port(port)
    pictures = _shown(folder, where)
    rows = {str(row.id): n for n, row in enumerate(read_rows(folder))} if seed is None else {}

    def place(item: tuple[str, Result]) -> tuple[Any, int]:
        name, r = item
        if seed is None or side_by_side:
            return rows[r.id] if seed is None else place_of(seed, r.id), r.index
        return place_of(seed, name), 0

    pictures = dict(sorted(pictures.items(), key=place))
    with held(folder / VOTES, COLUMNS) as ballots:
        desk = (RowDesk if side_by_side else PictureDesk)(folder, pictures, ballots)
        state, things = desk.state(), "rows" if side_by_side else "pictures"
        serve(desk, port, f"{state['done']} of {state['done'] + state['left']} {things} have votes.")
        state = desk.state()
        votes = f"{state['good'] + state['bad']} votes in {ballots.path} ({state['good']} good, {state['bad']} bad)"
        print(f"\n{votes}, {state['left']} {things} left; run the same command again to continue", file=sys.stderr)
        print(f"to keep the good ones: genkit filter {folder} --votes {ballots.path}", file=sys.stderr)
    return EXIT_SIGINT


def _shown(folder: Path, where: str | None) -> dict[str, Result]:
    """Return the run's finished pictures that pass `where`. Raises InputError if none does."""
    pictures, known, texts = read_pictures(folder)
    if where is None:
        return pictures
    gate = checked_gate(where, known, texts)
    check_asked(folder, "--where", where, pictures)
    pictures = {name: r for name, r in pictures.items() if passes(gate, r.scores)}
    if not pictures:
        raise InputError(f"--where: {shown(where)}: no picture passes")
    return pictures
