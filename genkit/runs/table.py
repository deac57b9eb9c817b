"""The rows and records of a run in columns, so that a million images take hundreds of megabytes and not gigabytes.

Of each image the columns hold its row, number and status, the position of its line in the file, and the scores that are
needed. Lines as genkit writes them are parsed by a regular expression, all others as JSON; the result is that of
`read_rows` and `read_results`.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from genkit.durable import disk, json_line, line_blocks, whole_lines
from genkit.errors import InputError, shown
from genkit.files import names_in
from genkit.rows.request import MAX_TEXT, SEED_LIMIT, Request
from genkit.rows.result import Result
from genkit.runs.columns import MISSING, TEXT, Lines, Wanted, is_utf8, parsed
from genkit.runs.records import REPLACED, RESULTS, ROWS, newest, parts_of, read_all
from genkit.scoring.names import names_of
from genkit.storage import StoragePath

LISTINGS = 8  # directory listings that are cached
GONE = "its file is missing"
# A row as `Request.to_json` writes it. The last group is the same text in most rows, and is validated once.
_ROW = re.compile(
    rb'\{"id": "([A-Za-z0-9._-]{1,100})", "prompt": "(' + TEXT + rb')", "negative_prompt": "(' + TEXT + rb')", '
    rb'(?:"seed": (0|[1-9][0-9]{0,9}), )?("num_images": .*\}\n)'
)


class Row(NamedTuple):
    """The fields of a Request that decide which images are kept."""

    id: str
    num_images: int
    keep: int | None
    gate: str | None
    rank_by: str | None
    max_images: int | None
    labels: tuple[str, ...] | None


Terms = tuple[int, int | None, str | None, str | None, int | None, tuple[str, ...] | None]  # a Row without its id


@dataclasses.dataclass
class Rows:
    """The rows of requests.jsonl: ids, terms (shared by equal rows), and the offsets of their lines."""

    path: Path
    ids: list[str] = dataclasses.field(default_factory=list)
    terms: list[Terms] = dataclasses.field(default_factory=list)
    offsets: array[int] = dataclasses.field(default_factory=lambda: array("q"))
    size: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, n: int) -> Row:
        return Row(self.ids[n], *self.terms[n])

    def place(self, n: int) -> tuple[int, int]:
        """Return (bytes, offset) of the line of row `n`, with its newline."""
        end = self.offsets[n + 1] if n + 1 < len(self) else self.size
        return end - self.offsets[n], self.offsets[n]

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Yield (id, prompt) of every row, read from the file."""
        with disk(self.path):
            for row_id, line in zip(self.ids, whole_lines(self.path), strict=True):
                found = _ROW.fullmatch(line)
                plain = found is not None and b"\\" not in found[2] and b'"prompt": ' not in found[5]
                yield row_id, found[2].decode() if found is not None and plain else parsed(line).get("prompt", "")

    @property
    def kinds(self) -> Collection[Terms]:
        """The distinct terms of the rows."""
        return set(self.terms)


def read_row_table(folder: Path) -> Rows:
    """Return the rows of requests.jsonl. Raises InputError naming an invalid line, as `read_rows` does.

    Rows that differ only in id, prompts and seed are validated once, because no check combines these with other fields.
    """
    rows = Rows(folder / ROWS)
    if not rows.path.is_file():
        raise InputError(f"{folder}: holds no {ROWS}: not a run folder, or one that never began")
    seen: dict[bytes, Terms] = {}
    there: set[str] = set()
    with disk(rows.path):
        for number, line in enumerate(whole_lines(rows.path), 1):
            row_id, terms = _known_row(line, seen) or _checked_row(line, seen, f"{rows.path}:{number}")
            if row_id in there:
                raise InputError(f"{rows.path}:{number}: id: {shown(row_id)} is that of an earlier row")
            there.add(row_id)
            rows.ids.append(row_id)
            rows.terms.append(terms)
            rows.offsets.append(rows.size)
            rows.size += len(line)
    return rows


def _known_row(line: bytes, seen: dict[bytes, Terms]) -> tuple[str, Terms] | None:
    """Return a row that equals one validated before but for id, prompts and seed, or None if it must be validated."""
    found = _ROW.fullmatch(line)
    if found is None or (terms := seen.get(found[5])) is None or len(line) > MAX_TEXT:
        return None
    odd = b"\\u" in line or not (line.isascii() or is_utf8(line))  # may be a NUL or a lone surrogate
    if odd or int(found[4] or 0) >= SEED_LIMIT or not _plain_id(found[1]):
        return None
    return found[1].decode(), terms


def _plain_id(row_id: bytes) -> bool:
    """Whether an id is surely not reserved (CON, COM1, "..", …): at most four letters, or dots."""
    return row_id[:1].isdigit() or len(row_id.split(b".")[0]) > 4


def _checked_row(line: bytes, seen: dict[bytes, Terms], where: str) -> tuple[str, Terms]:
    try:
        fields = parsed(line)
        if not isinstance(fields, dict) or not isinstance(fields.get("id"), str):
            raise InputError("not a row")
        row = Request(**fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    labels = None if row.labels is None else tuple(row.labels)
    terms = row.num_images, row.keep, row.gate, row.rank_by, row.max_images, labels
    found = _ROW.fullmatch(line)
    stated = found is not None and found[4] is not None
    if found is not None and found[1].decode() == row.id and isinstance(row.seed, int if stated else type(None)):
        terms = seen.setdefault(found[5], terms)
    return str(row.id), terms


class Table:
    """The newest record of every image of a run's rows, by row, then by image number.

    Images are numbered from 0 in this order. of_row: row of each image. index: its number within the row. start: first
    image of each row, and the total. names: names of scores, see `names_of`. detected: whether scores hold boxes. gone:
    images whose file was deleted since; they count as failed.
    """

    def __init__(self, folder: Path, rows: Rows, wanted: Wanted) -> None:
        """Read the records. Raises HostError."""
        self.folder, self.rows, self.wanted = folder, rows, wanted
        self.path, self._copy, self._damaged = _records_of(folder)
        lines = Lines(rows.ids, wanted)
        if self.path.is_file():
            with disk(self.path):
                lines.read(line_blocks(self.path))
        self._lines = lines
        places = [n << 62 | number for n, number in zip(lines.row, lines.index, strict=True)]
        order: Iterable[int] = range(len(places))
        if not all(map(operator.lt, places, itertools.islice(places, 1, None))):
            last = dict(zip(places, order, strict=True))
            order = map(last.__getitem__, sorted(last))
        replaced = lines.statuses.get(REPLACED, -1)
        self._at = array("q", (at for at in order if lines.status[at] != replaced))
        self.of_row = array("i", map(lines.row.__getitem__, self._at))
        self.index = array("q", map(lines.index.__getitem__, self._at))
        count = Counter(self.of_row)
        self.start = array("q", itertools.accumulate(map(count.__getitem__, range(len(rows))), initial=0))
        shapes = set(map(lines.shape.__getitem__, self._at))
        kinds = list(lines.shapes)
        self.names = names_of(dict.fromkeys(kinds[shape]) for shape in shapes)
        self._statuses = list(lines.statuses)
        self.detected = any("detected" in kinds[shape] for shape in shapes)
        self.gone = self._absent()

    def __len__(self) -> int:
        return len(self._at)

    def damaged(self) -> list[tuple[str, int]]:
        """Return the file and line number of each line that was passed over as damaged."""
        offsets = set(self._lines.damaged if self._copy is None else ())
        found, at = [*self._damaged], 0
        for number, line in enumerate(
            (line for block in line_blocks(self.path) for line in block) if offsets else (), 1
        ):
            if at in offsets:
                found.append((RESULTS, number))
            at += len(line)
        return found

    def span(self, n: int) -> range:
        """Return the images of row `n`."""
        return range(self.start[n], self.start[n + 1])

    def results(self, images: range) -> list[Result]:
        """Return the records of images with the wanted scores; those with a deleted file are failed."""
        lines, found, ids, gone = self._lines, [], self.rows.ids, self.gone
        columns = list(zip(lines.columns, lines.values, strict=True))
        of_row, index, places = (c[images.start : images.stop] for c in (self.of_row, self.index, self._at))
        for image, n, number, at in zip(images, of_row, index, places, strict=True):
            scores = {name: value for name, column in columns if (value := column[at]) is not MISSING}
            r = Result(ids[n], number, 0, scores=scores)
            if image in gone:
                r.status, r.reason = "failed", GONE
            else:
                if (file := lines.file[at]) is not None:
                    r.file = file.decode()
                if lines.status[at]:  # not "done"
                    r.status, r.reason = self._statuses[lines.status[at]], lines.reasons.get(at)
            if lines.hashes:
                r.sha256 = lines.hashes[at]
            found.append(r)
        return found

    def is_failed(self, image: int) -> bool:
        """Whether the image failed, or its picture is gone."""
        return image in self.gone or self._statuses[self._lines.status[self._at[image]]] == "failed"

    def places(self) -> Iterator[tuple[str, int, str | None]]:
        """Yield (row id, image number, file or None) of every image."""
        ids, files = self.rows.ids, self._lines.file
        for image, (n, number, at) in enumerate(zip(self.of_row, self.index, self._at, strict=True)):
            file = None if image in self.gone else files[at]
            yield ids[n], number, None if file is None else file.decode()

    def line_places(self, images: Sequence[int]) -> list[tuple[int, int]]:
        """Return (bytes, offset) of each image's line in `path`, with its newline."""
        length, offset, places = self._lines.length, self._lines.offset, self._at
        return [(length[at], offset[at]) for at in map(places.__getitem__, images)]

    def column(self, name: str) -> Iterator[Any]:
        """Yield one of the wanted scores for each image, None where it has none."""
        column = self._lines.values[self._lines.columns.index(name)]
        for at in self._at:
            value = column[at]
            yield None if value is MISSING else value

    def plain(self, images: range) -> list[int]:
        """Return for each image whether its line is that of a finished image as genkit writes it, without `meta`."""
        return list(map(self._lines.plain.__getitem__, self._at[images.start : images.stop]))

    def whole(self, images: Sequence[int]) -> Iterator[Result]:
        """Yield complete records, read from the file; those with a deleted picture as failed."""
        if not len(images):
            return
        with disk(self.path), open(self.path, "rb") as file:
            for image in images:
                ((length, start),) = self.line_places([image])
                (result,) = newest([parsed(os.pread(file.fileno(), length, start))])[0].values()
                if image in self.gone:
                    result = dataclasses.replace(result, status="failed", reason=GONE, file=None)
                yield result

    def _absent(self) -> frozenset[int]:
        """Return the finished images whose file was deleted since."""
        folders: dict[bytes, set[bytes]] = {}
        there: set[bytes] = set()  # the files in the folder of the previous image
        gone = []
        files, status, done = self._lines.file, self._lines.status, self._lines.statuses["done"]
        for image, at in enumerate(self._at):
            if status[at] != done or files[at] in there:
                continue
            under = files[at].rpartition(b"/")[0]
            if under not in folders:  # listing folders is faster than checking every file
                if len(folders) >= LISTINGS:
                    folders.pop(next(iter(folders)))
                folders[under] = self._listed(under)
            there = folders[under]
            if files[at] not in there:
                gone.append(image)
        return frozenset(gone)

    def _listed(self, under: bytes) -> set[bytes]:
        try:
            return {under + b"/" + os.fsencode(name) for name in names_in(self.folder / os.fsdecode(under))}
        except OSError:
            return set()


def _records_of(folder: Path) -> tuple[Path, Any, list[tuple[str, int]]]:
    """Return a run's records as one file.

    If it is a copy (storage, parts), also the temporary file to hold on to, and the lines that were damaged.
    """
    if not isinstance(folder, StoragePath) and not parts_of(folder):
        return folder / RESULTS, None, []
    copy = tempfile.NamedTemporaryFile(prefix="genkit-")  # noqa: SIM115
    records, bad = read_all(folder)
    copy.writelines(json_line(r.to_json()).encode() for r in records)
    copy.flush()
    return Path(copy.name), copy, bad


class Kept(Sequence[Result]):
    """The records of some images of a table, each read from the file when it is accessed."""

    def __init__(self, table: Table, images: Sequence[int]) -> None:
        """images: their numbers in the table."""
        self.table, self.images = table, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: Any) -> Any:
        return Kept(self.table, self.images[k]) if isinstance(k, slice) else next(self.table.whole([self.images[k]]))

    def __iter__(self) -> Iterator[Result]:
        return self.table.whole(self.images)
