"""Parse the lines of results.jsonl into columns: in blocks where they look as genkit writes them, else one by one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from genkit.runs.records import PICTURE, newest
from genkit.scoring.recorded import well_formed

TEXT = rb'[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*'  # the inside of a JSON string
MISSING: Any = object()  # the value of a score that an image does not have
_COUNT = rb"(?:0|[1-9][0-9]{0,11}|null)"
_NUMBER = rb"(?:-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|null)"
# A finished image as `Result.to_json` writes it; any other line matches with empty groups and is parsed as JSON, as are
# lines with a `meta` or with braces in a label.
_LINE = re.compile(
    rb'\{"id": "([A-Za-z0-9._-]+)", "index": (0|[1-9][0-9]{0,8}), "seed": (?:0|[1-9][0-9]{0,11}), "status": "done", '
    rb'"reason": null, "file": "(' + PICTURE.pattern.encode() + rb')", "bytes": ' + _COUNT + rb', "sha256": '
    rb'"([0-9a-f]{64})", "width": ' + _COUNT + rb', "height": ' + _COUNT + rb', "scores": '
    rb'(\{[^{}\n]*(?:\{[^{}\n]*\}[^{}\n]*)*\}), "steps": ' + _COUNT + rb', "nfe": ' + _COUNT + rb', "seconds": '
    + _NUMBER + rb', "prompt": "' + TEXT + rb'", "meta": null, "fingerprint": (?:"[0-9a-f]*"|null)\}\n|[^\n]*\n'
)  # fmt: skip
NO_JSON = (
    b"NaN",
    b"Infinity",
    b"\r",
)  # accepted by Python's json, but not by a browser, or not within one line of a page
_Parts = tuple[bytes, bytes, bytes, bytes, bytes]  # id, index, file, sha256, scores


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The scores to read.

    names: of numbers. labels: of p. classes: of p_class. seen: fields of vision models. hashes: whether the pictures'
    SHA-256 are read.
    """

    names: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()
    seen: frozenset[str] = frozenset()
    hashes: bool = False

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        odds = ("p",) * bool(self.labels) + ("classes",) * bool(self.classes)
        return sorted({*self.names, *odds, *self.seen})


class Lines:
    """The columns of results.jsonl, with one entry for each valid line about an image of the given rows."""

    def __init__(self, rows: Sequence[str], wanted: Wanted) -> None:
        """rows: the ids of the run's rows, in order."""
        self.rows = {row_id.encode(): n for n, row_id in enumerate(rows)}
        self.row, self.index, self.shape, self.length = array("i"), array("q"), array("i"), array("i")
        self.offset = array("q")
        self.status, self.plain = array("i"), bytearray()
        self.file: list[Any] = []
        self.hashes: list[str | None] = []
        self.reasons: dict[int, str | None] = {}
        self.shapes: dict[tuple[str, ...], int] = {}
        self.damaged: list[int] = []  # offsets of lines that are no record of an image
        self.statuses = {"done": 0}
        self.columns, self.keep_hashes = wanted.columns, wanted.hashes
        self.cut = {"p": wanted.labels, "classes": wanted.classes}  # only these labels are kept
        self.values: list[list[Any]] = [[] for _ in self.columns]

    def read(self, blocks: Iterable[Sequence[bytes]]) -> None:
        """Parse the lines of the file, given in blocks."""
        start = 0
        for lines in blocks:
            start = self._take(lines, start)

    def _take(self, lines: Sequence[bytes], start: int) -> int:
        """Parse a block of lines that begins at byte `start` of the file; return the offset of its end."""
        text = b"".join(lines)
        sound = text.isascii() or is_utf8(text)
        if not sound and len(lines) > 1:
            for line in lines:
                start = self._take([line], start)
            return start
        found = _LINE.findall(text) if sound else [(b"",) * 5]
        rows = [self.rows.get(parts[0], -1) for parts in found]
        first = 0
        for stop in [
            *(k for k, n in enumerate(rows) if n < 0),
            len(rows),
        ]:  # runs of regular lines, split at irregular ones
            if first < stop:
                start = self._plain(lines[first:stop], rows[first:stop], found[first:stop], start)
            if stop < len(rows):
                start = self._other(lines[stop], start)
            first = stop + 1
        return start

    def _plain(self, lines: Sequence[bytes], rows: list[int], found: Sequence[_Parts], start: int) -> int:
        """Enter regular lines, whose scores are parsed in one call."""
        _, numbers, files, digests, texts = zip(*found, strict=True)
        scores = _scores(texts)
        if scores is None and len(lines) > 1:
            for line in lines:
                start = self._take([line], start)
            return start
        if scores is None:
            return self._other(lines[0], start)
        self.status.extend(itertools.repeat(0, len(rows)))
        odd = any(text in b"".join(texts) for text in NO_JSON)  # rare: only then is each line checked
        self.plain += bytes(not (odd and any(text in own for text in NO_JSON)) for own in texts)
        if self.keep_hashes:
            self.hashes += [digest.decode() for digest in digests]
        return self._enter(rows, list(map(int, numbers)), files, scores, list(map(len, lines)), start)

    def _other(self, line: bytes, start: int) -> int:
        """Enter an irregular line, or skip one that is no record of an image."""
        records, bad = newest([parsed(line)])
        if bad:
            self.damaged.append(start)
        for r in records.values():
            n = self.rows.get(r.id.encode("utf-8", "backslashreplace"))
            if n is None or r.index >= 2**62:
                continue
            if r.status != "done":
                self.reasons[len(self.row)] = r.reason
            self.status.append(self.statuses.setdefault(r.status, len(self.statuses)))
            self.plain.append(0)
            if self.keep_hashes:
                self.hashes.append(r.sha256)
            file = None if r.file is None else str(r.file).encode()
            self._enter([n], [r.index], [file], [r.scores], [len(line)], start)
        return start + len(line)

    def _enter(
        self, rows: list[int], numbers: list[int], files: Sequence[bytes | None], scores: Sequence[dict[str, Any]],
        sizes: list[int], start: int,
    ) -> int:  # fmt: skip
        """Append records to the columns; return the offset of their end."""
        self.row.extend(rows)
        self.index.extend(numbers)
        self.file += files
        self.length.extend(sizes)
        *starts, end = itertools.accumulate(sizes, initial=start)
        self.offset.extend(starts)
        shapes = list(map(tuple, scores))
        for shape in dict.fromkeys(shapes):
            self.shapes.setdefault(shape, len(self.shapes))
        self.shape.extend(map(self.shapes.__getitem__, shapes))
        for name, column in zip(self.columns, self.values, strict=True):
            found = [own.get(name, MISSING) for own in scores]
            if (labels := self.cut.get(name)) is not None:
                found = [_cut(odds, labels) for odds in found]
            column += found
        return end


def _cut(odds: Any, labels: Collection[str]) -> Any:
    """Return probabilities by label, of these labels only."""
    return {label: value for label, value in odds.items() if label in labels} if type(odds) is dict else odds


def _scores(texts: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """Return the scores in each text, or None if a text is not exactly one JSON object, or none that genkit writes."""
    try:
        values: list[dict[str, Any]] = json.loads(
            "[" + b",\n".join(texts).decode() + "]"
        )  # a break cannot be within a text, so joins cannot change it
    except (ValueError, RecursionError):
        return None
    return values if len(values) == len(texts) and all(map(well_formed, values)) else None


def is_utf8(text: bytes) -> bool:
    """Whether bytes are valid UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def parsed(line: bytes) -> Any:
    """Return the value of a line of JSON, or None if it is not valid."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
