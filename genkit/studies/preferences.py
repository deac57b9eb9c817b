"""Which of two runs' pictures was preferred by eye: preferences.csv, as `genkit label RUN OTHER` writes it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from genkit.durable import json_line
from genkit.errors import InputError, nearest, shown
from genkit.files import place
from genkit.selection.intervals import share_interval
from genkit.selection.votes import UNDO, read_cells
from genkit.studies.pairs import Pair, Paired, Side

PREFERENCES, COLUMNS = "preferences.csv", ("image", "choice", "other", "sha256", "other_sha256")
RUN, OTHER, TIE = "run", "other", "tie"  # the run whose folder holds the file is better, the other one, neither
_TURNED = {RUN: OTHER, OTHER: RUN, TIE: TIE}


def identity(side: Side) -> str:
    """Return what names a run wherever it and its model lie: a hash of what run.json said when the run began."""
    weights = side.config["binding"].get("model", {}).get("weights")
    return hashlib.sha256(json_line([side.config["info"], weights]).encode()).hexdigest()


def line_of(pair: Pair, other: Side, choice: str) -> dict[str, str]:
    """Return a line of preferences.csv by column."""
    shas = {"sha256": pair.a.sha256 or "", "other_sha256": pair.b.sha256 or ""}
    return {"image": str(pair.a.file), "choice": choice, "other": identity(other), **shas}


def choices_of(paired: Paired) -> tuple[dict[str, str], int]:
    """Return RUN, OTHER or TIE by the name of a pair, where it stands in the file of the first run.

    Also returns how many choices are left out because a picture was drawn again, or is gone, since. Raises InputError
    with file and line.
    """
    path, known = paired.one.folder / PREFERENCES, {str(pair.a.file): pair for pair in paired.pairs}
    if not path.exists():
        return {}, 0
    other, stale = identity(paired.two), 0
    found: dict[str, str] = {}
    for number, cells in read_cells(path, COLUMNS):
        choice, pair = cells.get("choice", "").lower(), known.get(cells.get("image", ""))
        if choice not in (*_TURNED, UNDO):
            where = f"{place(path)}:{number}: choice: {shown(choice)}"
            raise InputError(f"{where} is none of {', '.join(_TURNED)}, {UNDO}{nearest(choice, [*_TURNED, UNDO])}")
        if cells.get("other") != other:
            continue
        shas = [cells.get("sha256", ""), cells.get("other_sha256", "")]
        if pair is None or shas != [pair.a.sha256 or "", pair.b.sha256 or ""]:
            stale += choice != UNDO
        else:
            found.pop(pair.name, None)  # the order is that of the last choices
            if choice != UNDO:
                found[pair.name] = choice
    return found, stale


def tally(paired: Paired, choices: Mapping[str, str], stale: int) -> dict[str, Any]:
    """Return how often each run won, and the share that the first one won, where a tie is half a win.

    The 95 % interval accounts for the correlation between pairs of one prompt, as those of `compare` do.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    worth = {RUN: 1.0, TIE: 0.5, OTHER: 0.0}
    for pair in paired.pairs:
        if pair.name in choices:
            groups[pair.group].append(worth[choices[pair.name]])
    count = [*choices.values()].count
    found: dict[str, Any] = {"pairs": len(choices), "a_wins": count(RUN), "ties": count(TIE), "b_wins": count(OTHER)}
    if choices:
        share, *interval = (float(f"{x:.6g}") for x in share_interval([*groups.values()]))
        found |= {"a_share": share, "a_interval": interval}
    return {**found, "stale": stale}


def by_eye(paired: Paired) -> dict[str, Any] | None:
    """Return the `tally` of what is in the files of both runs, or None if they say nothing of each other."""
    turned = Paired(paired.two, paired.one, [Pair(pair.name, pair.b, pair.a) for pair in paired.pairs], {})
    (own, stale), (others, stale_too) = choices_of(paired), choices_of(turned)
    choices = {name: _TURNED[choice] for name, choice in others.items()} | own
    return tally(paired, choices, stale + stale_too) if choices or stale or stale_too else None


def described(found: Mapping[str, Any], a: str, b: str) -> str:
    """Return a `tally` as a line, with the names of the two runs."""
    text = f"by eye, {a} against {b}: {found['a_wins']:,} won, {found['ties']:,} tied, {found['b_wins']:,} lost"
    if found["pairs"]:
        low, high = found["a_interval"]
        text += f"; {found['a_share']:.1%} won with ties as half (95 %: {low:.1%} to {high:.1%})"
    return text + (f"; left out: {found['stale']:,} of pictures drawn again since" if found["stale"] else "")
