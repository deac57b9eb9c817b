"""Sources of pictures and captions: folders, tables, class folders, WebDataset, Parquet; without decoding."""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from genkit.datasets.config import Data
from genkit.errors import InputError, nearest, shown
from genkit.files import file_size, place
from genkit.pictures.images import SUFFIXES, UNKNOWN, list_files

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = ("text", "caption", "prompt")  # where captions are looked for besides the column that the recipe names
TABLES = ("metadata.jsonl", "metadata.csv")
OTHERS = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".ppm", ".tif", ".tiff"}  # pictures not read


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
            cell = _parquet_cell(path, length)
            if not isinstance(cell, bytes):  # null, or only the path of a picture that is elsewhere
                raise InputError(f"{self.key}: holds no bytes of a picture")
            return cell
        file_size(Path(path))  # raises for a pipe, which would block
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise InputError(f"{self.key}: cannot be read: {error.strerror}") from None

    def read(self) -> Image.Image:
        """Return the picture, RGBA where it is transparent, else RGB. Raises InputError, naming it, for a bad one."""
        from genkit.pictures.images import decode_image

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


def read_examples(data: Data, path: str | list[str] | None = None, field: str = "data.path") -> list[Example]:
    """Return the pictures of a data set, in the order of their names.

    path: another than the recipe's, which `field` of the recipe names. Raises InputError naming the file and what is
    wrong with it; a picture without a caption is for the doctor to judge.
    """
    named = data.path if path is None else path
    patterns = [named] if isinstance(named, str) else named
    paths = [one for pattern in patterns for one in _matching(pattern, field)]
    base = os.path.commonpath([os.path.abspath(one.parent) for one in paths])
    found: list[Example] = []
    for one in paths:
        read = _read(one, data.caption, field)
        inside = os.path.relpath(one if one.is_dir() else one.parent, base)
        several = len(paths) > 1 and inside != "."
        found += (dataclasses.replace(e, key=f"{inside}/{e.key}") for e in read) if several else read
    if not found:
        raise InputError(f"{field}: {shown(named)}: holds no pictures ({', '.join(sorted(SUFFIXES))})")
    found.sort(key=lambda e: e.key)
    for a, b in itertools.pairwise(found):
        if a.key == b.key:
            raise InputError(f"{field}: {place(b.place[0])}: {shown(b.key)} is there twice")
    return found[: data.limit]


def _matching(pattern: str, field: str) -> list[Path]:
    """Return what a path names: itself where it exists, else what its wildcards match."""
    path = os.path.expanduser(pattern)
    if os.path.exists(path):
        return [Path(path)]
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
    if not found:
        raise InputError(f"{field}: {shown(pattern)}: there is no such file or folder")
    return [Path(one) for one in found]


def left_out(data: Data) -> list[str]:
    """Return files of a data set's folders that are not read: other picture formats, and linked folders."""
    found = []
    for pattern in [data.path] if isinstance(data.path, str) else data.path:
        for folder in filter(Path.is_dir, _matching(pattern, "data.path")):
            for parent, folders, files in os.walk(folder):
                folders[:] = [name for name in folders if not name.startswith(".")]
                linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
                others = [name for name in files if Path(name).suffix.lower() in OTHERS and not name.startswith(".")]
                found += [os.path.relpath(os.path.join(parent, name), folder) for name in linked + others]
    return sorted(found)


def _read(path: Path, column: str, field: str) -> Iterable[Example]:
    if path.is_dir():
        files = list_files(path)
        pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
        tables = [p for p in files if p.name in TABLES]
        shards = [p for p in files if p.parent == path and p.suffix in _FORMATS]
        if shards and pictures:
            several = f"holds pictures, {shown(pictures[0].name)}, and shards, {shown(shards[0].name)}"
            raise InputError(f"{field}: {place(path)}: {several}: name the one or the other")
        if tables:
            return _tables(path, tables, pictures, column)
        return [e for s in shards for e in _FORMATS[s.suffix](s, column)] if shards else _folder(path, pictures, files)
    reader = _FORMATS.get(path.suffix)
    if reader is None:
        raise InputError(f"{field}: {place(path)}: is neither a folder nor one of {', '.join(_FORMATS)}")
    return reader(path, column)


def _folder(path: Path, pictures: list[Path], files: list[Path]) -> Iterator[Example]:
    """Pictures with captions in files of the same name, or in a folder for each class.

    Classes are two folders or more, and nothing lies there that may have been meant as a caption.
    """
    stems = {p.name.partition(".")[0] for p in pictures}
    folders = {p.parent for p in pictures}
    told = {p for p in files if p.suffix == ".txt"}
    meant = any(p.name.partition(".")[0] in stems for p in files if p.suffix.lower() not in SUFFIXES)
    meant = meant or any(p.parent in folders for p in told)
    classes = not meant and path not in folders and len(folders) > 1
    for picture in pictures:
        where, key = (str(picture), 0, -1), picture.relative_to(path).as_posix()
        beside = picture.with_suffix(".txt")
        label = picture.parent.name.replace("_", " ")
        if classes:
            yield Example(key, label, {"label": label}, where)
            continue
        text = _utf8(beside.read_bytes(), place(beside)).strip() if beside in told else ""
        yield Example(key, text or None, {}, where)


def _utf8(data: bytes, where: str) -> str:
    """Return the text of `data`, without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save it as UTF-8") from None


def _tables(path: Path, tables: list[Path], pictures: list[Path], column: str) -> Iterator[Example]:
    """The layout of `imagefolder`: metadata.jsonl or metadata.csv with file_name and a caption a line, in any folder.

    Pictures that no line speaks of have no caption.
    """
    seen: dict[str, str] = {}
    for table in tables:
        for number, row in _rows(table):
            where = f"{place(table)}:{number}"
            name = row.pop("file_name", None)
            if not isinstance(name, str) or not name:
                raise InputError(f"{where}: file_name: is missing{nearest('file_name', row)}")
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts:
                raise InputError(f"{where}: file_name: {shown(name)} leads out of the folder")
            if not os.path.isfile(table.parent / name):
                raise InputError(f"{where}: file_name: {shown(name)}: there is no such file")
            key = (table.parent.relative_to(path) / inside).as_posix()
            if key in seen:
                raise InputError(f"{where}: file_name: {shown(name)} is there twice: see {seen[key]}")
            seen[key] = where
            yield Example(key, _caption(row, column, where), row, (str(table.parent / name), 0, -1))
    for picture in pictures:
        key = picture.relative_to(path).as_posix()
        if key not in seen:
            yield Example(key, None, {}, (str(picture), 0, -1))


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line (from 1) and the fields of each row."""
    text = _utf8(table.read_bytes(), place(table))
    if table.suffix == ".csv":
        yield from _csv_rows(text, place(table))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _object(line, f"{place(table)}:{number}")


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**24)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = reader.fieldnames or []
        twice = next((column for column in header if header.count(column) > 1), None)
        if twice is not None:
            raise InputError(f"{name}:1: {shown(twice)}: column is there twice")
        line = reader.line_num + 1
        for row in reader:
            if None in row:
                raise InputError(f"{name}:{line}: has more cells than the {len(header)} columns of the header")
            yield line, dict(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{name}:{line}: is not CSV: {error}") from None


def _object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{where}: is not a JSON object")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: holds half a character (\\ud800 to \\udfff)") from None
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
    """A WebDataset shard: NAME.webp beside NAME.txt or NAME.json; read by offset, without unpacking."""
    with open(path, "rb") as file:

        def content(suffix: str) -> bytes:
            file.seek(group[suffix][0])
            return file.read(group[suffix][1])

        for stem, group in _members(path).items():
            pictures = [suffix for suffix in group if f".{suffix}" in SUFFIXES]
            if len(pictures) != 1:
                has = "several pictures" if pictures else "no picture"
                raise InputError(f"{place(path)}: {shown(stem)}: has {has}, but {', '.join(sorted(group))}")
            key = f"{path.name}!{stem}.{pictures[0]}"
            fields = _object(content("json"), f"{key}: json") if "json" in group else {}
            caption = _caption(fields, column, key)
            if "txt" in group:
                caption = _utf8(content("txt"), f"{key}: txt").strip() or None
            yield Example(key, caption, fields, (str(path), *group[pictures[0]]))


def _members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Return offset and length of a tar's files by name up to the first dot, and what follows it."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if not member.isfile() or any(part.startswith(".") for part in name.parts if part != ".."):
                    continue  # hidden: what a Mac packs beside the files
                first, _, suffix = name.name.partition(".")
                group = groups.setdefault(str(name.with_name(first)), {})
                if suffix.lower() in group:
                    raise InputError(f"{place(path)}: {shown(member.name)}: is there twice")
                group[suffix.lower()] = (member.offset_data, member.size)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{place(path)}: is not an uncompressed, whole tar file: {shown(str(error), 100)}") from None
    return groups


def _check_end(path: Path, offset: int) -> None:
    """Raise ReadError if tarfile stopped early: it takes a damaged header for the end of the archive."""
    with open(path, "rb") as file:
        file.seek(offset)
        if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("has no end")
        file.seek(offset)
        while block := file.read(2**20):
            if block.count(0) < len(block):
                raise tarfile.ReadError(f"is damaged, or another begins, at byte {offset}")


def _parquet(path: Path, column: str) -> Iterator[Example]:
    """A Parquet file with a column `image` of bytes, or of {bytes, path} as `datasets` writes it.

    Without captions the names of `datasets`' class labels, in a column `label`, are them.
    """
    schema = _parquet_read(path, "read_schema")
    image = _image_column(path, schema)
    rest = _parquet_read(path, "read_table", columns=[name for name in schema.names if name != image]).to_pylist()
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        labels = features["label"]["names"]
    except (KeyError, TypeError, ValueError):
        labels = None
    for number, row in enumerate(rest):
        key = f"{path.name}!{number:06d}"
        caption = _caption(row, column, key)
        if isinstance(labels, list) and isinstance(row.get("label"), int) and 0 <= row["label"] < len(labels):
            row["label"] = str(labels[row["label"]]).replace("_", " ")
            caption = row["label"] if not {column, *COLUMNS} & {*schema.names} else caption
        yield Example(key, caption, row, (str(path), -1, number))


def _image_column(path: Path, schema: Any) -> str:
    """Return the column of pictures: `image`, or else the only one that is {bytes, path}."""
    cells = [f.name for f in schema if str(f.type).startswith("struct<bytes: ")]
    if "image" not in schema.names and len(cells) != 1:
        raise InputError(f"{place(path)}: has no column image{nearest('image', schema.names)}")
    return "image" if "image" in schema.names else cells[0]


def _parquet_read(path: Path, what: str, **options: Any) -> Any:
    """Return what pyarrow's function `what` reads. Raises InputError for a file that is none."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{place(path)}: Parquet needs pyarrow: pip install 'genkit-diffusion[parquet]'") from None
    try:
        return getattr(parquet, what)(path, memory_map=True, **options)
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{place(path)}: is no Parquet file: {shown(str(error), 100)}") from None


_OPEN: dict[str, Any] = {}  # of this process: a Parquet file has no offsets to read a row by
_OPENING = threading.Lock()


def _parquet_cell(path: str, row: int) -> Any:
    with _OPENING:
        if path not in _OPEN:
            image = _image_column(Path(path), _parquet_read(Path(path), "read_schema"))
            _OPEN[path] = _parquet_read(Path(path), "read_table", columns=[image]).column(image)
        cell = _OPEN[path][row].as_py()
    return cell.get("bytes") if isinstance(cell, dict) else cell


def split(examples: list[Example], data: Data) -> tuple[list[Example], list[Example]]:
    """Return the pictures to train on, and those held out: a share by the hash of their name or of a field, or a path.

    Raises InputError for a field that a picture does not have, and where nothing is left to train on.
    """
    if isinstance(data.validation, str):
        return examples, read_examples(data, data.validation, "data.validation")

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
