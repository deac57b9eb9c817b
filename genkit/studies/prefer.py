"""`genkit label RUN OTHER`: pairs of pictures of two runs, without saying which is whose; the better one is chosen."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.errors import EXIT_SIGINT, InputError
from genkit.pages.desk import Desk, place_of, prompt_of
from genkit.pages.server import check_port, serve
from genkit.selection.ballots import Ballots, held
from genkit.selection.votes import UNDO
from genkit.studies.pairs import Pair, Paired, pair_runs
from genkit.studies.preferences import COLUMNS, OTHER, PREFERENCES, RUN, TIE, choices_of, described, line_of, tally


class PairDesk(Desk):
    """One pair at a time, in the order of `pairs`, which of the pictures is left at random."""

    page, asks, words = "pair", "pair", ("left", "right", "tie")
    keys = "left or right arrow for the better picture, down arrow or = for a tie, u undo, space later"

    def __init__(
        self, paired: Paired, pairs: list[Pair], choices: Mapping[str, str], ballots: Ballots, seed: int
    ) -> None:
        self._ballots, self._pairs, self._other = ballots, pairs, paired.two
        self._turned = [place_of(seed, f"left/{pair.name}")[0] % 2 == 1 for pair in pairs]
        files = []
        for pair, turned in zip(pairs, self._turned, strict=True):
            two = [paired.one.folder / str(pair.a.file), paired.two.folder / str(pair.b.file)]
            files += two[::-1] if turned else two
        numbers = {pair.name: k for k, pair in enumerate(pairs)}
        super().__init__(files, len(pairs), [numbers[name] for name in choices if name in numbers])

    def _store(self, number: int, answer: Mapping[str, Any]) -> None:
        choice = answer["vote"]
        if choice != TIE:
            choice = RUN if (choice == "left") != self._turned[number] else OTHER
        self._ballots.add([line_of(self._pairs[number], self._other, choice)])

    def _undo(self, number: int) -> None:
        self._ballots.add([line_of(self._pairs[number], self._other, UNDO)])

    def _state(self) -> dict[str, Any]:
        waiting = [*itertools.islice(self._waiting, 2)]
        pair = None
        if waiting:
            found = self._pairs[waiting[0]]
            pair = {"number": waiting[0], "name": found.name, "prompt": prompt_of(found.a)}
            pair["images"] = [2 * waiting[0], 2 * waiting[0] + 1]
        ahead = [2 * waiting[1], 2 * waiting[1] + 1] if waiting[1:] else []
        return {**super()._state(), "pair": pair, "next": ahead}


def prefer(run: Path, other: Path, seed: int = 0, in_order: bool = False, port: int = 0) -> int:
    """Serve the page until Ctrl-C; returns 130. Choices go into preferences.csv of `run`.

    Pairs of one and the same file are not asked about. seed: of the order, unless `in_order`, and of which picture is
    left. port: 0 takes a free one. Raises InputError, HostError.
    """
    check_port(port)
    paired = pair_runs(run, other)
    pairs = [pair for pair in paired.pairs if pair.a.sha256 is None or pair.a.sha256 != pair.b.sha256]
    if not pairs:
        raise InputError(f"{run}, {other}: all {len(paired.pairs)} pairs are the same file twice: nothing to choose")
    if not in_order:
        pairs.sort(key=lambda pair: place_of(seed, pair.name))
    with held(run / PREFERENCES, COLUMNS) as ballots:
        choices, _ = choices_of(paired)
        desk = PairDesk(paired, pairs, choices, ballots, seed)
        state = desk.state()
        serve(desk, port, f"{state['done']} of {len(pairs)} pairs are judged.")
        left = desk.state()["left"]
        print(f"\n{left} of {len(pairs)} pairs left; run the same command again to continue", file=sys.stderr)
        print(described(tally(paired, *choices_of(paired)), str(run), str(other)), file=sys.stderr)
    return EXIT_SIGINT
