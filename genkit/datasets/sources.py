"""Read data sets: folders, metadata tables, class folders, kohya's folders, archives. Pictures are not decoded."""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from genkit.datasets.archives import is_listing, read_parquet, read_tar
from genkit.datasets.config import Data
from genkit.datasets.example import Example, Examples, caption_fields, captions_of, json_object, text_of
from genkit.errors import InputError, nearest, shown
from genkit.files import place, user_path
from genkit.pictures.images import SUFFIXES, list_files

TABLES = ("metadata.jsonl", "metadata.csv")
HELD = {"val", "valid", "validation", "test", "eval", "dev"}  # folders and archives beside `train`
KOHYA = re.compile(r"(\d+)_(.+)")  # 10_ohwx man: repeats and caption, in kohya's scripts
OTHERS = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".ppm", ".tif", ".tiff"}  # formats that are not supported


def read_examples(data: Data, path: str | list[str] | None = None, field: str = "data.path") -> Examples:
    """Return the pictures of a data set, in the order of their names.

    path: instead of data.path, from the key `field` of the recipe. Raises InputError naming the file and its problem.
    Missing captions are left to the doctor.
    """
    named = data.path if path is None else path
    patterns = [named] if isinstance(named, str) else named
    paths = [one for pattern in patterns for one in _matching(pattern, field)]
    base = os.path.commonpath([os.path.abspath(one.parent) for one in paths])
    found, notes, lacking = Examples(), list[str](), list[str]()
    for one in paths:
        read = _Reading(data, field, notes, lacking).source(one)
        inside = os.path.relpath(one if one.is_dir() else one.parent, base)
        several = len(paths) > 1 and inside != "."
        found += (dataclasses.replace(e, key=f"{inside}/{e.key}") for e in read) if several else read
    if not found and lacking:
        raise InputError(f"{field}: {shown(named)}: no sample has a picture: {', '.join(lacking[:3])}")
    if not found:
        raise InputError(f"{field}: {shown(named)}: holds no pictures ({', '.join(sorted(SUFFIXES))})")
    found.sort(key=lambda e: e.key)
    for a, b in itertools.pairwise(found):
        if a.key == b.key:
            raise InputError(f"{field}: {place(b.place[0])}: {shown(b.key)} is there twice")
    many = sum(bool(e.captions) for e in found)
    notes += [f"{many} pictures have several captions: one is drawn at each visit"] if many else []
    whole = Examples(found[: data.limit])
    whole.notes, whole.lacking = tuple(notes), tuple(lacking)
    return whole


def _matching(pattern: str, field: str) -> list[Path]:
    """Return the path itself if it exists, else the paths that match its wildcards."""
    path = str(user_path(pattern))
    if os.path.exists(path):
        return [Path(path)]
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
    if not found:
        raise InputError(f"{field}: {shown(pattern)}: there is no such file or folder")
    return [Path(one) for one in found]


def left_out(data: Data) -> list[str]:
    """Return the files in a data set's folders that are not read: unsupported formats, and symlinked folders."""
    found = []
    for pattern in [data.path] if isinstance(data.path, str) else data.path:
        for folder in filter(Path.is_dir, _matching(pattern, "data.path")):
            for parent, folders, files in os.walk(folder):
                folders[:] = [name for name in folders if not name.startswith(".")]
                linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
                others = [name for name in files if Path(name).suffix.lower() in OTHERS and not name.startswith(".")]
                found += [os.path.relpath(os.path.join(parent, name), folder) for name in linked + others]
    return sorted(found)


class _Reading:
    """Reads one source. notes, lacking: those of Examples, which are appended to."""

    def __init__(self, data: Data, field: str, notes: list[str], lacking: list[str]) -> None:
        self.column, self.beside, self.field = data.caption, data.beside, field
        self.notes, self.lacking = notes, lacking

    def source(self, path: Path) -> Iterable[Example]:
        """Return the pictures of a folder or an archive."""
        if path.is_dir():
            return self._directory(path)
        reader = _FORMATS.get(path.suffix.lower())
        if reader is None:
            raise InputError(f"{self.field}: {place(path)}: is neither a folder nor one of {', '.join(_FORMATS)}")
        return reader(path, self.column, self.beside, self.lacking)

    def _directory(self, path: Path) -> Iterable[Example]:
        files = list_files(path)
        pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
        splits = sorted({p.relative_to(path).parts[0] for p in files if p.parent != path})
        if not any(p.parent == path for p in pictures) and "train" in splits and set(splits) & HELD:
            others = ", ".join(name for name in splits if name in HELD)
            where = f"{place(path / 'train')} is trained on, and not {others} beside it"
            self.notes.append(f"{where}: data.validation may name one")
            return [dataclasses.replace(e, key=f"train/{e.key}") for e in self.source(path / "train")]
        tables = [p for p in files if p.name in TABLES]
        packed = [p for p in files if p.parent == path and p.suffix.lower() in _FORMATS]
        archives = self._archives(path, packed, pictures)
        if archives and not tables:
            return [e for a in archives for e in self.source(a)]
        suffix = "" if self.beside is None else f".{self.beside}"
        own = {p.with_name(p.stem.removesuffix(suffix)): p for p in pictures if suffix and p.stem.endswith(suffix)}
        pictures = [p for p in pictures if not suffix or not p.stem.endswith(suffix)]
        if tables:
            found: Iterable[Example] = _tables(path, tables, pictures, self.column, self.beside)
        else:
            found = self._folder(path, pictures, files)
        return [_with_conditioning(e, own.get(Path(e.place[0]).with_suffix("")), path) for e in found]

    def _archives(self, path: Path, found: list[Path], pictures: list[Path]) -> list[Path]:
        """Return the archives of a folder that are part of the training set."""
        listings = [p for p in found if is_listing(p, self.beside)] if pictures or len(found) > 1 else []
        archives = [p for p in found if p not in listings]
        if listings and (archives or pictures):
            self.notes.append(f"{place(path)}: {len(listings)} Parquet files without pictures are not read")
        else:
            archives = found
        if archives and pictures:
            several = f"holds pictures, {shown(pictures[0].name)}, and shards, {shown(archives[0].name)}"
            raise InputError(f"{self.field}: {place(path)}: {several}: name the one or the other")
        parts = {p: re.split(r"[-_.]", p.name)[0].lower() for p in archives}
        held = [p for p, split in parts.items() if split in HELD]
        if held and any(split == "train" for split in parts.values()):
            self.notes.append(f"{place(path)}: {shown(held[0].name)} and the like are not trained on")
            archives = [p for p in archives if p not in held]
        return archives

    def _folder(self, path: Path, pictures: list[Path], files: list[Path]) -> Iterator[Example]:
        """Yield pictures with captions in .txt files of the same name, in class folders, or in kohya's folders.

        Subfolders are classes if there are at least two, and no file there looks like a caption.
        """
        stems = {p.name.partition(".")[0] for p in pictures}
        folders = {p.parent for p in pictures}
        texts = {p.with_suffix(".txt"): p for p in files if p.suffix.lower() == ".txt"}
        meant = any(p.name.partition(".")[0] in stems for p in files if p.suffix.lower() not in SUFFIXES)
        meant = meant or any(p.parent in folders for p in texts)
        repeats = {p: KOHYA.fullmatch(p.relative_to(path).parts[0]) for p in folders if p != path}
        kohya = path not in folders and bool(repeats) and all(repeats.values())
        classes = not kohya and not meant and path not in folders and len(folders) > 1
        if kohya:
            named = ", ".join(sorted({f"{m[0]}: {m[1]} repeats of {shown(m[2])}" for m in repeats.values() if m}))
            self.notes.append(f"{place(path)}: read as folders of kohya's scripts: {named}")
        for picture in pictures:
            where, key = (str(picture), 0, -1), picture.relative_to(path).as_posix()
            beside = texts.get(picture.with_suffix(".txt"))
            label = picture.parent.name.replace("_", " ")
            text = "" if beside is None else text_of(beside.read_bytes(), place(beside)).strip()
            match = repeats.get(picture.parent)
            if classes:
                yield Example(key, label, {"label": label}, where)
            elif kohya and match:
                yield Example(key, text or match[2].strip(), {}, where, repeat=max(1, int(match[1])))
            else:
                yield Example(key, text or None, {}, where)


def _with_conditioning(example: Example, file: Path | None, folder: Path) -> Example:
    """Return a picture of a folder with its conditioning in the file beside it, if it has none yet."""
    if file is None or example.conditioning is not None:
        return example
    own = Example(file.relative_to(folder).as_posix(), None, {}, (str(file), 0, -1))
    return dataclasses.replace(example, conditioning=own)


def _tables(path: Path, tables: list[Path], pictures: list[Path], column: str, beside: str | None) -> Iterator[Example]:
    """Yield the pictures of an `imagefolder`: metadata.jsonl or .csv, in any folder, with file_name and caption.

    Pictures that are in no line have no caption. beside: the column of files of conditioning; as with `datasets`,
    `_file_name` may be added to its name.
    """
    seen: dict[str, str] = {}
    read: set[str] = set()  # files of conditioning
    for table in tables:
        for number, row in _rows(table):
            where = f"{place(table)}:{number}"
            if "file_name" not in row:
                raise InputError(f"{where}: file_name: is missing{nearest('file_name', row)}")
            name = row.pop("file_name")
            key, file = _named(path, table, name, f"{where}: file_name")
            if key in seen:
                raise InputError(f"{where}: file_name: {shown(name)} is there twice: see {seen[key]}")
            seen[key], own = where, None
            for field in () if beside is None else (beside, f"{beside}_file_name"):
                if row.get(field):
                    other, other_file = _named(path, table, row.pop(field), f"{where}: {field}")
                    own = Example(other, None, {}, (str(other_file), 0, -1))
                    read.add(other)
            captions = caption_fields(captions_of(row, column, where))
            yield Example(key, fields=row, place=(str(file), 0, -1), conditioning=own, **captions)
    for picture in pictures:
        key = picture.relative_to(path).as_posix()
        if key not in seen and key not in read:
            yield Example(key, None, {}, (str(picture), 0, -1))


def _named(path: Path, table: Path, name: Any, where: str) -> tuple[str, Path]:
    """Return a file that a row of a table names, relative to the data set's folder and as a path. Raises InputError."""
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: is missing")
    if "\\" in name and not os.path.isfile(table.parent / name):
        name = name.replace("\\", "/")  # written on Windows
    file = Path(os.path.normpath(table.parent / name))
    if PurePosixPath(name).is_absolute() or not file.is_relative_to(os.path.normpath(path)):
        raise InputError(f"{where}: {shown(name)} leads out of the folder")
    if not os.path.isfile(file):
        raise InputError(f"{where}: {shown(name)}: there is no such file")
    return file.relative_to(os.path.normpath(path)).as_posix(), file


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line (from 1) and the fields of each row."""
    text = text_of(table.read_bytes(), place(table))
    if table.suffix == ".csv":
        yield from _csv_rows(text, place(table))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, json_object(line, f"{place(table)}:{number}")


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    before = csv.field_size_limit(2**24)  # a setting of the whole process
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
            if any(cell is not None and cell.strip() for cell in row.values()):
                yield line, dict(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{name}:{line}: is not CSV: {error}") from None
    finally:
        csv.field_size_limit(before)


def split(examples: list[Example], data: Data) -> tuple[list[Example], list[Example]]:
    """Return the training and the validation set: a share by the hash of the name or of a field, or another path.

    Raises InputError for a field that a picture does not have, and for an empty training set.
    """
    if isinstance(data.validation, str):
        return examples, read_examples(data, data.validation, "data.validation")
    if len(examples) == 1:  # it is trained on
        return examples, []

    def draw(e: Example) -> float:
        by = data.validation_by
        if by is not None and by not in e.fields:
            raise InputError(f"data.validation_by: {e.key} has no {shown(by)}{nearest(by, e.fields)}")
        digest = hashlib.sha256(str(e.key if by is None else e.fields[by]).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    draws = [draw(e) for e in examples]
    held = [e for e, own in zip(examples, draws, strict=True) if own < data.validation]
    least = min(draws)
    if data.validation and not held:  # of few pictures hold out at least one, or all with one value of the field
        held = [e for e, own in zip(examples, draws, strict=True) if own == least]
    kept = {e.key for e in held}
    rest = [e for e in examples if e.key not in kept]
    if not rest:
        raise InputError(f"data.validation: {data.validation} of {len(examples)} pictures leaves none to train on")
    return rest, held


def repeated(examples: Iterable[Example]) -> list[Example]:
    """Repeat each picture `repeat` times under different keys, so that its augmentation differs each time."""
    return [e if k == 0 else dataclasses.replace(e, key=f"{e.key}#{k + 1}") for e in examples for k in range(e.repeat)]


_FORMATS: dict[str, Callable[[Path, str, str | None, list[str]], Iterable[Example]]] = {
    ".tar": read_tar, ".parquet": read_parquet,
}  # fmt: skip
