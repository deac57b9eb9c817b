"""The gallery of a large run: index.html, and data files in gallery/ that the page loads on demand.

A page opened from a folder (file://) may load scripts only. So each data file is a script that calls a function of the
page with one string, which the page parses as JSON. All files lie in a new folder of gallery/, and index.html is
replaced last, so that an open page or a killed process never leaves a mixture.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.durable import disk, json_line
from genkit.pages.gallery import SETTINGS_OF_IMAGE as SHOWN
from genkit.pages.gallery import about, write_page
from genkit.runs.columns import NO_JSON
from genkit.runs.table import Table
from genkit.selection.verdicts import Selection

DATA = "gallery"  # in a run folder
IMAGES, LINES = 100, 20_000  # images, and lines of prompts, in a file
DONE = "whole.js"  # written last
DAY = 86_400  # seconds after which an unfinished folder of another machine is taken to be abandoned
_STATES = ("rejected", "kept", "failed")


def write_large_gallery(folder: Path, selection: Selection, config: Mapping[str, Any]) -> Path:
    """Write index.html of a run folder and its files in gallery/; return the page's path.

    The images of one data file are in memory at a time. Files are not synced: `genkit filter` can write them again.
    Raises HostError.
    """
    new = folder / DATA / f"{time.time_ns():x}-{_host()}-{os.getpid()}"
    with disk(new):
        new.mkdir(parents=True)
        try:
            head = {**about(folder, config), "large": _write(new, selection)}
            page = write_page(folder, [json_line(head).strip()], large=True)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    remove_older(folder, new.name)
    return page


def remove_older(folder: Path, current: str = "") -> None:
    """Remove the files of earlier galleries of a run. Those that another process is writing stay."""
    for path in (folder / DATA).glob("*-*"):
        found = re.fullmatch(r"[0-9a-f]+-([0-9a-f]{8})-([0-9]+)", path.name)
        if found is None or path.name == current:
            continue
        killed = found[1] == _host() and not _runs(int(found[2]))
        if killed or (path / DONE).exists() or path.stat().st_mtime < time.time() - DAY:
            shutil.rmtree(path, ignore_errors=True)
    if not current and (folder / DATA).is_dir() and not any((folder / DATA).iterdir()):
        (folder / DATA).rmdir()


def _host() -> str:
    """Return eight hexadecimal digits for this machine, because others may write to the same folder."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _write(new: Path, selection: Selection) -> dict[str, Any]:
    """Write the data files of a gallery; return what index.html itself holds."""
    table, states, clips = selection.table, _states(selection), list(_clips(selection.table))
    for name in ("texts", "images", "order"):
        (new / name).mkdir()
    for n, lines in enumerate(_texts(table)):
        _put(new, f"texts/{n}", json_line("\n".join(lines)).strip().encode("utf-8", "backslashreplace"))
    text_of = functools.cache(_verdict)
    with open(table.path, "rb") as results, open(table.rows.path, "rb") as rows:
        for n, start in enumerate(range(0, len(table), IMAGES)):
            if n % 1000 == 0:
                (new / "images" / str(n // 1000)).mkdir()
            images = range(start, min(len(table), start + IMAGES))
            _put(new, f"images/{n // 1000}/{n}", _shelf(selection, images, results.fileno(), rows.fileno(), text_of))
    _put(new, "states", _packed(states))
    _put(new, "counts", _packed(_whole([len(table.span(n)) for n in range(len(table.rows))])))
    _put(new, "order/rank", _packed(_order([rank or math.inf for rank in selection.rank])))
    _put(new, "order/clip", _packed(_order([9.0 if clip is None else -clip for clip in clips])))
    _put(new, DONE.removesuffix(".js"), b"1")
    return _summary(new, table, states, [clip for clip in clips if clip is not None])


def _put(new: Path, name: str, text: bytes) -> None:
    """Write a data file with one line of text."""
    quoted = text.replace(b"\\", b"\\\\").replace(b"'", b"\\'")
    (new / f"{name}.js").write_bytes(b"genkit('%s','%s');\n" % (name.encode(), quoted))


def _packed(values: bytes) -> bytes:
    return base64.b64encode(values)


def _whole(values: Sequence[int]) -> bytes:
    """Return numbers as little-endian 32-bit integers."""
    import numpy as np

    return np.array(values, "<u4").tobytes()


def _order(keys: list[float]) -> bytes:
    """Return the indices that sort the keys in ascending order."""
    import numpy as np

    return np.argsort(np.array(keys), kind="stable").astype("<u4").tobytes()


def _clips(table: Table) -> Iterator[float | None]:
    """Yield the CLIP score of each image, or None."""
    for value in table.column("clip"):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        yield value if number else None


def _states(selection: Selection) -> bytes:
    """Return the state of each image, as an index into _STATES."""
    failed = selection.table.is_failed
    return bytes(2 if failed(image) else kept for image, kept in enumerate(selection.kept))


def _summary(new: Path, table: Table, states: bytes, clips: Sequence[float]) -> dict[str, Any]:
    count = {name: states.count(n) for n, name in enumerate(_STATES)}
    return {
        "folder": f"{DATA}/{new.name}", "images": len(table), "chunk": IMAGES, "rows": len(table.rows),
        "texts": -(-len(table.rows) // LINES), "lines": LINES, "first": table.rows.ids[::LINES], "count": count,
        "clip": [min(clips), max(clips)] if clips else None, "boxes": table.detected,
    }  # fmt: skip


def _texts(table: Table) -> Iterator[list[str]]:
    """Yield the searchable text of LINES rows at a time: id and prompt, one line each."""
    lines: list[str] = []
    for row_id, prompt in table.rows.prompts():
        lines.append(f"{row_id} {' '.join(prompt.split())}")
        if len(lines) == LINES:
            yield lines
            lines = []
    if lines:
        yield lines


def _shelf(selection: Selection, images: range, results: int, rows: int, text_of: Callable[..., str]) -> bytes:
    """Return the JSON of one data file of images: rows, records and decisions.

    results, rows: file descriptors of the run's files. text_of: the cached `_verdict`.
    """
    table = selection.table
    of_row = table.of_row[images.start : images.stop]
    asked = map(_row, _lines(rows, [table.rows.place(n) for n in dict.fromkeys(of_row)]))
    lines = _lines(results, table.line_places(images))
    records = [_cut(line) if plain else _record(line) for plain, line in zip(table.plain(images), lines, strict=True)]
    columns = (column[images.start : images.stop] for column in (selection.kept, selection.rank, selection.reason))
    gone = map(table.gone.__contains__, images)
    verdicts = ", ".join(map(text_of, *columns, map(selection.ranked.__getitem__, of_row), gone))
    decided = verdicts.encode("utf-8", "backslashreplace")
    return b'{"rows": [%s], "images": [%s], "verdicts": [%s]}' % (b",".join(asked), b",".join(records), decided)


def _verdict(*values: Any) -> str:
    """Return the JSON of a decision: kept, rank, reason, ranked images in its row, whether its file is gone."""
    return json_line(values).strip()


def _lines(file: int, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the lines at (bytes, offset) of a file, with one read if they lie close together."""
    start, end = min(at for _, at in places), max(size + at for size, at in places)
    if end - start > 2 * sum(size for size, _ in places):
        return [os.pread(file, size, at) for size, at in places]
    data = os.pread(file, end - start, start)
    return [data[at - start : at - start + size] for size, at in places]


def _row(line: bytes) -> bytes:
    line = line.strip()
    if line.startswith(b"{") and not any(text in line for text in NO_JSON):
        return line
    return json_line(json.loads(line)).strip().encode("utf-8", "backslashreplace")


def _cut(line: bytes) -> bytes:
    """Return a record as genkit writes it without the hash, and without the prompt and what follows it."""
    start, end = line.index(b', "sha256": "'), line.rindex(b', "prompt": "')
    return line[:start] + line[start + 78 : end] + b"}"  # a hash has 64 digits


def _record(line: bytes) -> bytes:
    found = json.loads(line)
    return json_line({name: found.get(name) for name in ("id", *SHOWN)}).strip().encode("utf-8", "backslashreplace")
