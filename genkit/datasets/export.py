"""Export kept pictures as a data set: a folder with metadata.jsonl (imagefolder of `datasets`), or shards."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from genkit.datasets.kept import caption, picture
from genkit.datasets.shards import need_pyarrow, write_shards
from genkit.durable import TEMP_PREFIX, TEMP_SUFFIX, disk, each_line, is_temporary, json_line, write_whole
from genkit.errors import HostError, InputError, nearest, shown
from genkit.files import local
from genkit.progress import Steps
from genkit.rows.result import Result

METADATA = "metadata.jsonl"
PLAN = ".export.jsonl"  # lists the existing and planned files while an export is unfinished
SHARD = 500_000_000  # bytes
_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclasses.dataclass(frozen=True)
class Target:
    """The form of an export: folder, webdataset or parquet. shard_size: bytes of a shard; None is SHARD."""

    form: str = "folder"
    shard_size: int | None = None

    @classmethod
    def of(cls, form: str, shard_size: str | None) -> Target:
        """Read the command line's --format and --shard-size ("500MB"). Raises InputError."""
        found = None if shard_size is None else re.fullmatch(r"([0-9]{1,9})\s*([A-Za-z]*)", shard_size)
        if shard_size is not None and (found is None or found[2].lower() not in _UNITS):
            raise InputError(f"--shard-size: {shown(shard_size)} is not like 500MB or 2GB")
        return cls(form, None if found is None else int(found[1]) * _UNITS[found[2].lower()])

    def check(self, out: Path | None) -> None:
        """Raise InputError for an invalid combination, before anything is read or written."""
        local(out)
        if self.form not in FORMATS:
            known = ", ".join(FORMATS)
            raise InputError(f"--format: {shown(self.form)} is none of {known}{nearest(self.form, FORMATS)}")
        if out is None and self != Target():
            raise InputError(
                f"--{'format' if self.form != 'folder' else 'shard-size'}: needs -o, the folder to write to"
            )
        if self.shard_size is not None and self.form == "folder":
            raise InputError("--shard-size: is for --format webdataset and parquet; a folder has no shards")
        if self.shard_size is not None and not 1000 <= self.shard_size <= 10**12:
            raise InputError(f"--shard-size: {self.shard_size} bytes is not within 1 kB to 1000 GB")
        if self.form == "parquet":
            need_pyarrow()


def export(folder: Path, kept: Sequence[Result], out: Path, target: Target | None = None) -> int:
    """Copy the pictures of `kept` from a run folder to `out` in the form of `target`; return their number.

    Raises InputError for an `out` that holds anything but an earlier export; HostError for a full disk, a bad picture.
    """
    target = target or Target()
    return FORMATS[target.form](folder, kept, out, target.shard_size or SHARD)


def _folder(folder: Path, kept: Sequence[Result], out: Path, _size: int) -> int:
    """Copy the pictures of `kept` from a run folder to `out`, with a line each in metadata.jsonl; return their number.

    A line has file_name, text (the prompt), id, index, seed, sha256, scores and meta, which is JSON text so that the
    column has one type for `datasets`. `out` is new, empty, or an earlier export, finished or not: pictures of `kept`
    that it has stay, its other pictures are removed. Raises InputError for another folder, HostError.
    """
    names = {Path(str(r.file)).name: r.sha256 for r in kept}
    with disk(out):
        earlier = _exported(out)
        out.mkdir(parents=True, exist_ok=True)
        planned = itertools.chain(earlier.items(), names.items())
        write_whole(out / PLAN, (json_line({"file_name": n, "sha256": d}).encode() for n, d in planned))
        for name in filter(is_temporary, os.listdir(out)):
            (out / name).unlink()
        with Steps() as progress:
            for n, r in enumerate(kept, 1):
                name = Path(str(r.file)).name
                if earlier.get(name) != r.sha256:
                    _put(out / name, picture(folder, r))
                progress(n, len(names), "of the pictures copied")
        write_whole(out / METADATA, (_line(Path(str(r.file)).name, r) for r in kept))
        for name in earlier.keys() - names.keys():
            (out / name).unlink(missing_ok=True)
        found = sum(name in names for name in os.listdir(out))
        if found != len(kept):
            raise HostError(f"{out}: holds {found} of the {len(kept)} pictures that were copied")
        (out / PLAN).unlink()
    return found


def _exported(out: Path) -> dict[str, str]:
    """Return {name: SHA-256} of the pictures in `out` that an earlier export, finished or not, has written.

    Raises InputError for any other file, an edited picture included: it may be the user's work.
    """
    if not out.exists():
        return {}
    if not out.is_dir():
        raise InputError(f"--out: {out} is not a folder")
    tables = [out / name for name in (METADATA, PLAN) if (out / name).is_file()]
    lines = (line for table in tables for line in each_line(table) if isinstance(line, dict))
    known = {(line.get("file_name"), line.get("sha256")) for line in lines if isinstance(line.get("sha256"), str)}
    found = {}
    for path in sorted(out.iterdir()):
        if path.name in (METADATA, PLAN) or is_temporary(path.name):
            continue
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        if (path.name, found[path.name]) not in known:
            raise InputError(
                f"--out: {out} holds {shown(path.name)}, which no earlier export like this wrote: use another folder"
            )
    return found


def _put(path: Path, data: bytes) -> None:
    temp = path.with_name(f"{TEMP_PREFIX}{path.name}{TEMP_SUFFIX}")
    temp.write_bytes(data)
    temp.replace(path)


def _line(name: str, r: Result) -> bytes:
    line = {"file_name": name, **caption(r)}
    if r.meta is not None:
        line["meta"] = json_line(r.meta).strip()
    return json_line(line).encode("utf-8", "backslashreplace")


def _shards(form: str) -> Callable[[Path, Sequence[Result], Path, int], int]:
    def write(folder: Path, kept: Sequence[Result], out: Path, size: int) -> int:
        return write_shards(form, folder, kept, out, size)

    return write


FORMATS = {"folder": _folder, "webdataset": _shards("webdataset"), "parquet": _shards("parquet")}
