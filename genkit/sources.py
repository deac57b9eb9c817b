"""Where pictures and captions come from: folders, tables, classes, WebDataset shards, Parquet; nothing is decoded."""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError, nearest, shown
from genkit.files import place
from genkit.images import SUFFIXES, UNKNOWN, list_images
from genkit.training.recipe import Data

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = ("text", "caption", "prompt")  # where captions are looked for besides the column that the recipe names
TABLES = ("metadata.jsonl", "metadata.csv")


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture of the data set: its name in messages, its caption and metadata, and where its bytes are.

    place: file, offset and length (length -1: the whole file; offset -1: row `length` of a Parquet file).
    """

    key: str
    caption: str | None
    fields: dict[str, Any]
    place: tuple[str, int, int]

    def data(self) -> bytes:
        """Return the bytes of the picture. Raises InputError when they cannot be read."""
        path, offset, length = self.place
        if offset < 0:
            cell = _parquet_bytes(path)[length]
            if not isinstance(cell, bytes):  # null, or only the path of a picture that is elsewhere
                raise InputError(f"{self.key}: column image: holds no picture")
            return cell
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise InputError(f"{self.key}: cannot be read: {error.strerror}") from None

    def read(self) -> Image.Image:
        """Return the picture, RGBA where it is transparent, else RGB. Raises InputError, naming it, for a bad one."""
        from genkit.images import decode_image

        return decode_image(self.data(), self.key)

    def size(self) -> tuple[int, int]:
        """Return (width, height) in pixels, by the header alone. Raises InputError for what is no picture."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.data())) as picture:
                turned = picture.getexif().get(0x0112, 1) >= 5
                return picture.size[::-1] if turned else picture.size
        except Exception:  # whatever Pillow's parsers stumble over
            raise InputError(f"{self.key}: {UNKNOWN}") from None

    def digest(self) -> str:
        """Return the SHA-256 of the bytes, in hex."""
        return hashlib.sha256(self.data()).hexdigest()


def read_examples(data: Data, path: str | list[str] | None = None) -> list[Example]:
    """Return the pictures of a data set, in the order of their names.

    path: another than the recipe's (its validation set). Raises InputError naming the file and what is wrong with it;
    for pictures without a caption only where the recipe does not allow them.
    """
    found: list[Example] = []
    named = path or data.path
    for pattern in [named] if isinstance(named, str) else named:
        paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not paths:
            raise InputError(f"data.path: {shown(pattern)}: there is no such file")
        for one in map(Path, paths):
            read = _read(one, data.caption)
            several = isinstance(named, list) and len(named) > 1 and one.is_dir()
            found += (dataclasses.replace(e, key=f"{one.name}/{e.key}") for e in read) if several else read
    if not found:
        raise InputError(f"data.path: {shown(named)}: holds no pictures ({', '.join(sorted(SUFFIXES))})")
    found.sort(key=lambda e: e.key)
    for a, b in itertools.pairwise(found):
        if a.key == b.key:
            raise InputError(f"{a.key}: is there twice")
    return found[: data.limit]


def _read(path: Path, column: str) -> Iterable[Example]:
    if path.is_dir():
        tables = [path / name for name in TABLES if (path / name).is_file()]
        shards = sorted([*path.glob("*.tar"), *path.glob("*.parquet")])
        if tables:
            return _table(path, tables[0], column)
        if shards and not list_images(path):
            return [e for shard in shards for e in _FORMATS[shard.suffix](shard, column)]
        return _folder(path)
    reader = _FORMATS.get(path.suffix)
    if not path.exists():
        raise InputError(f"data.path: {place(path)}: there is no such file or folder")
    if reader is None:
        raise InputError(f"data.path: {place(path)}: is neither a folder nor one of {', '.join(_FORMATS)}")
    return reader(path, column)


def _folder(path: Path) -> Iterator[Example]:
    """Pictures with captions in files of the same name, or, where there is none at all, in a folder for each class."""
    pictures = list_images(path)
    texts = {p for p in path.rglob("*.txt") if not p.name.startswith(".")}
    classes = not texts and all(p.parent != path for p in pictures)
    for picture in pictures:
        where, key = (str(picture), 0, -1), picture.relative_to(path).as_posix()
        beside = picture.with_suffix(".txt")
        label = picture.parent.name.replace("_", " ")
        if classes:
            yield Example(key, label, {"label": label}, where)
            continue
        yield Example(key, _text(beside) if beside in texts else None, {}, where)


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise InputError(f"{place(path)}: byte {error.start} is not UTF-8") from None


def _table(folder: Path, table: Path, column: str) -> Iterator[Example]:
    """The layout of `imagefolder`: metadata.jsonl or metadata.csv with file_name and a caption a line."""
    for number, row in _rows(table):
        where = f"{place(table)}:{number}"
        name = row.pop("file_name", None)
        if not isinstance(name, str) or not name:
            raise InputError(f"{where}: file_name: is missing{nearest('file_name', row)}")
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise InputError(f"{where}: file_name: {shown(name)} leads out of the folder")
        if not (folder / name).is_file():
            raise InputError(f"{where}: file_name: {shown(name)}: there is no such file")
        yield Example(inside.as_posix(), _caption(row, column, where), row, (str(folder / name), 0, -1))


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{place(table)}: byte {error.start} is not UTF-8") from None
    if table.suffix == ".csv":
        csv.field_size_limit(2**24)
        yield from ((i, dict(row)) for i, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 2))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _object(line, f"{place(table)}:{number}")


def _object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{where}: is not a JSON object")
    return value


def _caption(row: dict[str, Any], column: str, where: str) -> str | None:
    name = next((n for n in (column, *COLUMNS) if n in row), None)
    if name is None:
        return None
    value = row.pop(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {name}: {shown(value)} is not a text")
    return (value or "").strip() or None


def _shard(path: Path, column: str) -> Iterator[Example]:
    """A WebDataset shard: NAME.webp beside NAME.txt or NAME.json; read where it lies, by offset."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    stem, _, suffix = PurePosixPath(member.name).name.partition(".")
                    stem = str(PurePosixPath(member.name).with_name(stem))
                    group = groups.setdefault(stem, {})
                    if suffix.lower() in group:
                        raise InputError(f"{place(path)}: {shown(member.name)}: is there twice")
                    group[suffix.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{place(path)}: is not an uncompressed, whole tar file: {shown(str(error), 100)}") from None
    with open(path, "rb") as file:

        def content(span: tuple[int, int]) -> bytes:
            file.seek(span[0])
            return file.read(span[1])

        for stem, group in groups.items():
            pictures = [suffix for suffix in group if f".{suffix}" in SUFFIXES]
            if not pictures:
                raise InputError(f"{place(path)}: {shown(stem)}: has {', '.join(sorted(group))}, but no picture")
            suffix = pictures[0]
            key = f"{path.name}!{stem}.{suffix}"
            fields = _object(content(group["json"]), f"{key}: json") if "json" in group else {}
            caption = _caption(fields, column, key)
            if "txt" in group:
                caption = content(group["txt"]).decode("utf-8", "replace").strip() or None
            yield Example(key, caption, fields, (str(path), *group[suffix]))


def _parquet(path: Path, column: str) -> Iterator[Example]:
    """A Parquet file with a column `image` of bytes, or of {bytes, path} as `datasets` writes it."""
    table = _parquet_table(path)
    if "image" not in table.column_names:
        raise InputError(f"{place(path)}: has no column image{nearest('image', table.column_names)}")
    rest = table.drop_columns(["image"]).to_pylist()
    for number, row in enumerate(rest):
        key = f"{path.name}!{number:06d}"
        yield Example(key, _caption(row, column, key), row, (str(path), -1, number))


def _parquet_table(path: Path) -> Any:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{place(path)}: Parquet needs pyarrow: pip install 'genkit-diffusion[parquet]'") from None
    try:
        return parquet.read_table(path, memory_map=True)
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{place(path)}: is no Parquet file: {shown(str(error), 100)}") from None


_OPEN: dict[str, list[Any]] = {}  # of this process: a Parquet file has no offsets to read a row by
_OPENING = threading.Lock()


def _parquet_bytes(path: str) -> list[Any]:
    with _OPENING:
        if path not in _OPEN:
            cells = _parquet_table(Path(path)).column("image").to_pylist()
            _OPEN[path] = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
        return _OPEN[path]


def split(examples: list[Example], data: Data) -> tuple[list[Example], list[Example]]:
    """Return the pictures to train on, and those held out: a share by the hash of their name or of a field, or a path.

    Raises InputError for a field that a picture does not have, and where nothing is left to train on.
    """
    if isinstance(data.validation, str):
        return examples, read_examples(data, data.validation)

    def lot(e: Example) -> float:
        by = data.validation_by
        if by is not None and by not in e.fields:
            raise InputError(f"data.validation_by: {e.key} has no {shown(by)}{nearest(by, e.fields)}")
        digest = hashlib.sha256(str(e.key if by is None else e.fields[by]).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    lots = [lot(e) for e in examples]
    held = [e for e, own in zip(examples, lots, strict=True) if own < data.validation]
    least = min(lots)
    if data.validation and not held and len(examples) > 1:  # few pictures: one at least, or all of one value
        held = [e for e, own in zip(examples, lots, strict=True) if own == least]
    kept = {e.key for e in held}
    rest = [e for e in examples if e.key not in kept]
    if not rest:
        raise InputError(f"data.validation: {data.validation} of {len(examples)} pictures leaves none to train on")
    return rest, held


_FORMATS: dict[str, Callable[[Path, str], Iterable[Example]]] = {".tar": _shard, ".parquet": _parquet}
