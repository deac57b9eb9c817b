"""Reading a run folder: its config, its rows and the record of every image. Writes nothing, needs no lock."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.durable import disk, each_line, each_of
from genkit.errors import InputError
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.scoring.recorded import well_formed
from genkit.storage import StoragePath, check_storage, contents

CONFIG, ROWS, RESULTS, SELECTION, GALLERY = (
    "run.json",
    "requests.jsonl",
    "results.jsonl",
    "selection.json",
    "index.html",
)
REPLACED = "replaced"  # status of a record whose picture was moved to this folder; it is drawn again
Key = tuple[str, int]  # (row id, image number)
# Valid paths of pictures, relative to the run folder: a record must not refer to other files.
PICTURE = re.compile(r"images/(?:[0-9]{3,}/)?[A-Za-z0-9._-]+-[0-9]{2,}\.(?:png|webp|jpg|jxl)")

# A part of the records, written by one of many workers; `folding.fold` makes one file of them
PART = re.compile(r"results-([A-Za-z0-9_]{1,40})\.jsonl")
RANK = {"failed": 0, "pruned": 1, "done": 2}
log = logging.getLogger("genkit")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return run.json of a run folder, or None if there is none. Raises InputError if it is something else."""
    path = folder / CONFIG
    try:
        with disk(path):
            config = json.loads(path.read_bytes()) if path.is_file() else None
    except InputError:  # of storage
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is not JSON; restore it, or use another folder") from None
    if config is None and isinstance(folder, StoragePath):
        check_storage(folder)
    if config is not None and not (
        isinstance(config, dict) and all(isinstance(config.get(k), dict) for k in ("binding", "info"))
    ):
        raise InputError(f"{path}: is not the run.json of a run")
    return config


def read_rows(folder: Path) -> list[Request]:
    """Return the rows of requests.jsonl. Raises InputError naming the invalid line."""
    path = folder / ROWS
    if not path.is_file():
        raise InputError(f"{folder}: holds no {ROWS}: not a run folder, or one that never began")
    rows = []
    with disk(path):
        for number, fields in enumerate(each_line(path), 1):
            try:
                if not isinstance(fields, dict) or not isinstance(fields.get("id"), str):
                    raise InputError("not a row")
                rows.append(Request(**fields))
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from None
    return rows


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run."""
    return (folder / RESULTS).is_file()


def part_of(folder: Path, worker: str) -> Path:
    """Return where a worker's records are."""
    return folder / f"results-{worker}.jsonl"


def parts_of(folder: Path) -> list[Path]:
    """Return the parts that workers left, or are writing, in order of their names."""
    return sorted(path for path in folder.glob("results-*.jsonl") if PART.fullmatch(path.name))


def read_results(folder: Path, say: bool = False) -> list[Result]:
    """Return the newest record of every image, in order of first appearance, without those moved to replaced/.

    say: log a warning of damaged lines, which are passed over.
    """
    found, bad = read_all(folder)
    if say:
        warn_of_damaged(folder, bad)
    return found


def read_all(folder: Path) -> tuple[list[Result], list[tuple[str, int]]]:
    """Return the records as `read_results`, and the file and line number of each damaged line."""
    path = folder / RESULTS
    if not path.is_file():
        return [], []
    with disk(path):
        parts = parts_of(folder)
        records, bad = newest(each_line(path))
        of_parts: list[tuple[str, int]] = []
        while parts:
            try:
                found, of_parts = read_parts(parts)
                if _are_there(folder, parts):
                    records |= found
                    break
            except FileNotFoundError:
                pass
            parts = parts_of(folder)  # they were folded meanwhile
            records, bad = newest(each_line(path))
    damaged = [*((RESULTS, number) for number in bad), *of_parts]
    return [r for r in records.values() if r.status != REPLACED], damaged


def warn_of_damaged(folder: Path, bad: Sequence[tuple[str, int]]) -> None:
    """Log which lines of a run's records were passed over; `genkit generate` draws images again that have no other."""
    if bad:
        name, line = bad[0]
        more = f" and {len(bad) - 1:,} more lines are" if bad[1:] else " is"
        log.warning("%s:%d%s damaged and passed over", folder / name, line, more)


def finished(folder: Path) -> dict[Path, Result]:
    """Return {picture: record} of the finished images of a run; empty for a folder that is none."""
    return {folder / str(r.file): r for r in read_results(folder, say=True) if r.status == "done"}


def _are_there(folder: Path, parts: list[Path]) -> bool:
    if isinstance(folder, StoragePath):
        return {*parts} <= {*parts_of(folder)}
    return all(map(Path.exists, parts))


def read_parts(paths: Iterable[Path]) -> tuple[dict[Key, Result], list[tuple[str, int]]]:
    """Return the record of each image in the parts, and (file name, number) of invalid lines. Raises OSError.

    Several workers may have recorded an image, as when one was taken for dead: which record counts does not depend on
    the order of the parts. Of the records of one worker in several segments the last counts.
    """
    found: dict[Key, Result] = {}
    bad: list[tuple[str, int]] = []
    of_worker: dict[str, dict[Key, Result]] = {}
    for path, lines in _lines_of(list(paths)):
        records, wrong = newest(lines)
        bad += [(path.name, number) for number in wrong]
        of_worker.setdefault(path.stem.partition("__")[0], {}).update(records)
    for records in of_worker.values():
        for key, result in records.items():
            if key not in found or _order(result) > _order(found[key]):
                found[key] = result
    return found, bad


def _lines_of(paths: list[Path]) -> Iterator[tuple[Path, Iterable[Any]]]:
    """Yield each part and its lines; of those on storage some are read ahead."""
    stored = [path for path in paths if isinstance(path, StoragePath)]
    for segment, data in zip(stored, contents(stored), strict=True):
        yield segment, each_of(data)
    for path in paths[len(stored) :]:
        yield path, each_line(path)


def _order(result: Result) -> tuple[Any, ...]:
    """Return a sort key by which the best of several workers' records of an image is the greatest."""
    return RANK.get(result.status, -1), result.sha256 or "", json.dumps(result.to_json(), sort_keys=True)


def newest(lines: Iterable[Any]) -> tuple[dict[Key, Result], list[int]]:
    """Return the last record of each image, and the numbers (from 1) of invalid lines."""
    found: dict[Key, Result] = {}
    bad: list[int] = []
    shared: dict[Any, Any] = {}  # strings that many records share are kept once
    for number, line in enumerate(lines, 1):
        result = _result(line)
        if result is None:
            bad.append(number)
        else:
            for name in ("id", "prompt", "status", "fingerprint"):
                text = getattr(result, name)
                setattr(result, name, shared.setdefault(text, text))
            found[result.id, result.index] = result
    return found, bad


def _result(line: Any) -> Result | None:
    """Return a line as a Result, or None if it is not a valid record."""
    try:
        result = Result.from_json(line)
    except (TypeError, AttributeError):
        return None
    sound = (
        isinstance(result.id, str)
        and isinstance(result.prompt, str)
        and isinstance(result.fingerprint, str | None)
        and type(result.index) is int
        and result.index >= 0
        and isinstance(result.status, str)
        and isinstance(result.reason, str | None)
        and isinstance(result.sha256, str | None)
        and isinstance(result.meta, dict | None)
        and isinstance(result.scores, dict)
        and well_formed(result.scores)
        and (result.status != "done" or PICTURE.fullmatch(str(result.file)) is not None)
    )
    return result if sound else None


def found_at(model: Mapping[str, Any]) -> str:
    """Return where the model of a binding lies: its folder as it was at the last start, else its name."""
    folder = model.get("folder")
    return folder if folder is not None and Path(folder).exists() else model["name"]
