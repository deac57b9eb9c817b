"""Export kept pictures as shards: WebDataset tar files, or Parquet with an image column for `datasets`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from genkit.datasets.kept import caption, picture
from genkit.durable import TEMP_PREFIX, TEMP_SUFFIX, disk, is_temporary, json_line, sync_folder, write_whole
from genkit.errors import HostError, InputError, shown
from genkit.progress import Steps
from genkit.rows.result import Result

MANIFEST = ".export.json"  # hidden, since `datasets` would read it as data
GROUP = 100  # rows in a Parquet row group, the unit that a reader loads
Columns = dict[str, str]  # of Parquet: name -> type, the same in all shards
Write = Callable[[BinaryIO, Path, Sequence[Result], Columns], None]


def write_shards(form: str, folder: Path, kept: Sequence[Result], out: Path, size: int) -> int:
    """Write the pictures of `kept` to 000000.tar, 000001.tar, … (or .parquet) in `out`; return their number.

    A shard has at most `size` bytes of pictures and captions, but at least one picture, and is renamed to its final
    name when it is complete and synced. .export.json records the planned content of each shard first, so that a shard
    which exists with the same content is not written again. `kept` is iterated several times and never held in memory.
    Raises InputError for an `out` with any other file, HostError.
    """
    suffix, write, count = _FORMS[form]
    columns = _columns(kept)
    plan, digests = {}, {}
    for n, (part, digest) in enumerate(_cut(form, columns, kept, size)):
        plan[name := f"{n:06d}{suffix}"], digests[name] = part, digest
    with disk(out):
        earlier = _earlier(out)
        out.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(out):
            if is_temporary(name) or (name in earlier and earlier[name]["digest"] != digests.get(name)):
                (out / name).unlink()
        shards = {name: {"samples": len(part), "digest": digests[name]} for name, part in plan.items()}
        for name in plan:
            if name in earlier and (out / name).exists():
                shards[name] = earlier[name]
        manifest = {"format": form, "samples": len(kept), "complete": False, "shards": shards}
        _note(out, manifest)
        with Steps() as progress:
            for done, (name, part) in zip(accumulate(map(len, plan.values())), plan.items(), strict=True):
                if not (out / name).exists():
                    with _whole(out / name) as file:
                        write(file, folder, part, columns)
                found = count(out / name)
                if found != len(part):
                    raise HostError(f"{out / name}: holds {found} of {len(part)} pictures; remove it and try again")
                shards[name]["bytes"] = (out / name).stat().st_size
                progress(done, len(kept), "of the pictures are in shards")
        _note(out, {**manifest, "complete": True})
    return len(kept)


def _cut(form: str, columns: Columns, kept: Sequence[Result], size: int) -> Iterator[tuple[Sequence[Result], str]]:
    """Yield (results, hash of their content) for each shard."""
    start = total = 0
    sums = begun = hashlib.sha256(json.dumps([form, columns]).encode())
    for n, r in enumerate(kept):
        line = _json(r)
        own = _rounded(r.bytes or 0) + _rounded(len(_text(r))) + _rounded(len(line))
        if n == start:
            sums = begun.copy()
        elif total + own > size:
            yield kept[start:n], sums.hexdigest()
            start, total, sums = n, 0, begun.copy()
        sums.update(line + Path(str(r.file)).suffix.encode())
        total += own
    if start < len(kept):
        yield kept[start:], sums.hexdigest()


def _rounded(size: int) -> int:
    """Return the bytes that a file of `size` bytes takes in a tar."""
    return tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _earlier(out: Path) -> dict[str, Any]:
    """Return the shards of an earlier export in `out`. Raises InputError for other files and changed shards."""
    if not out.exists():
        return {}
    if not out.is_dir():
        raise InputError(f"--out: {out} is not a folder")
    try:
        shards = json.loads((out / MANIFEST).read_bytes())["shards"]
        known = {str(name): {"digest": s["digest"], "samples": s["samples"], **s} for name, s in shards.items()}
    except FileNotFoundError:
        known = {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"--out: {out / MANIFEST} is not that of an export") from None
    for path in sorted(out.iterdir()):
        if path.name == MANIFEST or is_temporary(path.name):
            continue
        if path.name not in known or path.stat().st_size != known[path.name].get("bytes", path.stat().st_size):
            raise InputError(
                f"--out: {out} holds {shown(path.name)}, which no earlier export like this wrote: use another folder"
            )
    return known


def _note(out: Path, manifest: dict[str, Any]) -> None:
    write_whole(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    sync_folder(out)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file, then sync and rename it."""
    temp = path.with_name(f"{TEMP_PREFIX}{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise


def _text(r: Result) -> bytes:
    return r.prompt.encode("utf-8", "backslashreplace")


def _json(r: Result) -> bytes:
    return json_line(caption(r)).strip().encode("utf-8", "backslashreplace")


def _tar(file: BinaryIO, folder: Path, part: Sequence[Result], columns: Columns) -> None:
    """Write <key>.png (or as the picture's file ends), <key>.txt and <key>.json for each picture.

    Readers cut a key at its first dot; "%2E" stands for those of an id, which holds no "%" itself.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for r in part:
            key = f"{r.id}-{r.index:02d}".replace(".", "%2E")
            parts = ((Path(str(r.file)).suffix, picture(folder, r)), (".txt", _text(r)), (".json", _json(r)))
            for suffix, data in parts:
                member = tarfile.TarInfo(key + suffix)
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


def _tar_samples(path: Path) -> int:
    with tarfile.open(path, "r:") as tar:
        return sum(member.name.endswith(".json") for member in tar)


def need_pyarrow() -> None:
    """Raise HostError, with the pip command, if pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise HostError("--format parquet: needs pyarrow, which is not installed: pip install pyarrow")


def _parquet(file: BinaryIO, folder: Path, part: Sequence[Result], columns: Columns) -> None:
    """Write a row for each picture: image, text, id, index, seed, sha256, score_NAME, and as JSON text p and meta."""
    import pyarrow
    from pyarrow import parquet

    schema = _schema(columns)
    plain = [name for name in columns if name != "image"]  # statistics of small pictures would hold two whole ones
    with parquet.ParquetWriter(file, schema, use_dictionary=plain, write_statistics=plain) as writer:
        for start in range(0, len(part), GROUP):
            rows = [_row(folder, r, columns) for r in part[start : start + GROUP]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _columns(kept: Sequence[Result]) -> Columns:
    fields = {"image": "Image", "text": "string", "id": "string", "index": "int64", "seed": "int64", "sha256": "string"}
    numbers: set[str] = set()
    others: set[str] = set()  # scores that are not always true or false
    for r in kept:
        numbers.update(name for name, value in r.scores.items() if isinstance(value, int | float))
        others.update(name for name, value in r.scores.items() if not isinstance(value, bool))
    fields |= {f"score_{name}": "float64" if name in others else "bool" for name in sorted(numbers)}
    return fields | {"p": "string", "meta": "string"}


def _schema(columns: Columns) -> Any:
    """Return the Arrow schema, with the metadata "huggingface" by which `datasets` recognises pictures."""
    import pyarrow

    types = {
        "Image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        "string": pyarrow.string(), "int64": pyarrow.int64(), "float64": pyarrow.float64(), "bool": pyarrow.bool_(),
    }  # fmt: skip
    features = {
        name: {"_type": "Image"} if kind == "Image" else {"dtype": kind, "_type": "Value"}
        for name, kind in columns.items()
    }
    line = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.schema([(name, types[kind]) for name, kind in columns.items()], metadata=line)


def _row(folder: Path, r: Result, columns: Columns) -> dict[str, Any]:
    found: dict[str, Any] = {
        "image": {"bytes": picture(folder, r), "path": Path(str(r.file)).name},
        "text": _text(r).decode(), "id": r.id, "index": r.index, "seed": r.seed, "sha256": r.sha256,
    }  # fmt: skip
    for name, kind in columns.items():
        if name.startswith("score_") and (value := r.scores.get(name.removeprefix("score_"))) is not None:
            found[name] = float(value) if kind == "float64" else value
    for name, value in (("p", r.scores.get("p")), ("meta", r.meta)):
        found[name] = None if value is None else json_line(value).strip()
    return found


def _parquet_samples(path: Path) -> int:
    from pyarrow import parquet

    return int(parquet.read_metadata(path).num_rows)


# The suffix of a shard, the function that writes it, and the one that counts its pictures.
_FORMS: dict[str, tuple[str, Write, Callable[[Path], int]]] = {
    "webdataset": (".tar", _tar, _tar_samples),
    "parquet": (".parquet", _parquet, _parquet_samples),
}
