"""Labels of pictures as good or bad: votes.csv, as `genkit label` writes it, or lists of names."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from genkit.errors import InputError, nearest, shown
from genkit.files import place, read_text
from genkit.rows.result import Result

VOTES, COLUMNS = "votes.csv", ("image", "vote", "sha256")
UNDO = "undo"  # cancels the picture's last vote, since the file is append-only
_WORDS = {True: ("1", "yes", "y", "true", "good"), False: ("0", "no", "n", "false", "bad")}
MEANING: dict[str, bool | None] = {UNDO: None} | {word: good for good, words in _WORDS.items() for word in words}
LIMIT = 2**27  # bytes of a file of votes; a million votes have about 10**8


@dataclasses.dataclass(frozen=True)
class Vote:
    """A line of votes.csv. good: None cancels the picture's last vote. sha256: of the picture, or empty."""

    line: int
    image: str
    good: bool | None
    sha256: str = ""


@dataclasses.dataclass
class Labels:
    """Labels by picture name; tied: pictures with as many votes for as against; stale: votes on redrawn pictures."""

    good: dict[str, bool]
    tied: int = 0
    stale: int = 0


def read_labels(path: Path, bad: Path | None, others_bad: bool, pictures: Mapping[str, Result]) -> Labels:
    """Return the labels of a run's pictures (by name), a majority where a picture has several votes.

    path: votes.csv with columns image and vote, or any other file, which lists the good pictures, one a line. For such
    a list, `bad` lists the bad ones, or `others_bad` says that all others are bad. Raises InputError with file and line
    for an invalid vote or an unknown picture.
    """
    if path.suffix.lower() != ".csv":
        return _listed(path, bad, others_bad, pictures)
    if bad is not None or others_bad:
        raise InputError(f"{place(path)}: says itself which pictures are bad: leave --bad and --others-bad out")
    found, stale = standing(read_votes(path), pictures, place(path))
    shares = {name: sum(votes) / len(votes) for name, votes in found.items()}
    good = {name: share > 0.5 for name, share in shares.items() if share != 0.5}
    return Labels(good, len(shares) - len(good), stale)


def read_votes(path: Path) -> list[Vote]:
    """Return the lines of a votes.csv. Raises InputError with file and line."""
    return [_vote(cells, place(path), line) for line, cells in read_cells(path, COLUMNS[:2])]


def read_cells(path: Path, needed: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Return the lines of a CSV file, by number and column. Raises InputError if a column of `needed` is missing."""
    where = place(path)
    usual = csv.field_size_limit(LIMIT)  # additional columns may be long
    reader = csv.reader(io.StringIO(read_text(path, LIMIT).removeprefix("\ufeff"), newline=""), strict=True)
    found: list[tuple[int, dict[str, str]]] = []
    try:
        names = _names_of(next(reader, ()))
        for column in needed:
            if names.count(column) != 1:
                raise InputError(f"{where}:1: needs one column {column!r}{nearest(column, names)}")
        for cells in reader:
            if cells:
                found.append((reader.line_num, dict(zip(names, map(str.strip, cells), strict=False))))
    except csv.Error as error:
        raise InputError(f"{where}:{reader.line_num}: is not CSV: {error}") from None
    finally:
        csv.field_size_limit(usual)
    return found


def header(path: Path) -> list[str]:
    """Return the names of the columns of a votes.csv that `read_votes` has read."""
    with io.TextIOWrapper(path.open("rb"), encoding="utf-8-sig", newline="") as file:
        return _names_of(next(csv.reader(file)))


def _names_of(cells: Iterable[str]) -> list[str]:
    return [name.strip().lower() for name in cells]


def _vote(cells: dict[str, str], where: str, line: int) -> Vote:
    image, vote = (cells.get(column, "") for column in COLUMNS[:2])
    if vote.lower() not in MEANING:
        close = nearest(vote.lower(), MEANING)
        raise InputError(f"{where}:{line}: vote: {shown(vote)} is none of 1, 0, yes, no, {UNDO}{close}")
    return Vote(line, image, MEANING[vote.lower()], cells.get("sha256", ""))


def line_of(r: Result, vote: str) -> dict[str, str]:
    """Return a line of votes.csv by column."""
    return {"image": str(r.file), "vote": vote, "sha256": r.sha256 or ""}


def standing(
    votes: Iterable[Vote], pictures: Mapping[str, Result], where: str, strict: bool = True
) -> tuple[dict[str, list[bool]], int]:
    """Return the votes of each picture that were not cancelled, and the number of votes on redrawn pictures.

    Pictures come in the order of their last votes. strict: raise InputError for an unknown picture, do not skip it.
    """
    found: dict[str, list[bool]] = defaultdict(list)
    stale = 0
    for vote in votes:
        name = _resolved(vote.image, pictures)
        if name is None:
            if strict:
                raise _unknown(vote.image, pictures, f"{where}:{vote.line}")
        elif vote.sha256 and vote.sha256 != pictures[name].sha256:
            stale += vote.good is not None
        elif vote.good is not None:
            found[name] = [*found.pop(name, []), vote.good]
        elif found[name]:
            found[name].pop()
    return {name: votes for name, votes in found.items() if votes}, stale


def _listed(path: Path, bad: Path | None, others_bad: bool, pictures: Mapping[str, Result]) -> Labels:
    good = _names(path, pictures)
    if (bad is None) != others_bad:
        problem = (
            "names the good pictures only: name the bad ones with --bad FILE, or, if you looked at every picture of"
            " the run, say --others-bad" if bad is None else "--bad, --others-bad: give one of them, not both"
        )  # fmt: skip
        raise InputError(f"{place(path)}: {problem}")
    if bad is None:
        return Labels({name: name in good for name in pictures})
    poor = _names(bad, pictures)
    for name in good.keys() & poor.keys():
        raise InputError(f"{place(bad)}:{poor[name]}: {shown(name)} is also in {place(path)}, line {good[name]}")
    return Labels(dict.fromkeys(good, True) | dict.fromkeys(poor, False))


def _names(path: Path, pictures: Mapping[str, Result]) -> dict[str, int]:
    """Return the pictures that a file lists, one a line, with their lines; skips blank lines and # comments."""
    found: dict[str, int] = {}
    for line, text in enumerate(read_text(path, LIMIT).removeprefix("\ufeff").split("\n"), 1):
        if text.strip() and not text.lstrip().startswith("#"):
            name = _resolved(text.strip(), pictures)
            if name is None:
                raise _unknown(text.strip(), pictures, f"{place(path)}:{line}")
            found[name] = line
    return found


def _resolved(text: str, pictures: Collection[str]) -> str | None:
    """Return the picture with that name or file name, ignoring folders, or None."""
    last = text.replace("\\", "/").rpartition("/")[2]
    return next((name for name in (last, PurePosixPath(last).stem) if name in pictures), None)


def _unknown(text: str, pictures: Iterable[str], where: str) -> InputError:
    last = text.replace("\\", "/").rpartition("/")[2][:200]
    return InputError(f"{where}: {shown(text)} is no picture of this run{nearest(PurePosixPath(last).stem, pictures)}")
