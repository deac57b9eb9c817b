"""Archives of pictures and captions: tar files as WebDataset and img2dataset write them, and Parquet tables."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from genkit.datasets.example import (
    COLUMNS,
    Example,
    caption_fields,
    captions_of,
    image_column,
    json_object,
    parquet_read,
    text_of,
)
from genkit.errors import InputError, shown
from genkit.files import place
from genkit.pictures.images import SUFFIXES


def read_tar(path: Path, column: str, beside: str | None, lacking: list[str]) -> Iterator[Example]:
    """Yield the samples of a WebDataset shard: NAME.webp with NAME.txt or NAME.json; read by offset, not unpacked.

    beside: the suffix of conditioning, NAME.beside.webp. lacking: the names of samples without a picture are appended
    to it.
    """
    with open(path, "rb") as file:

        def content(suffix: str) -> bytes:
            file.seek(group[suffix][0])
            return file.read(group[suffix][1])

        for stem, group in _members(path).items():
            pictures = [suffix for suffix in group if f".{suffix}" in SUFFIXES]
            if not pictures:
                lacking.append(f"{path.name}!{stem} (has {', '.join(sorted(group))})")
                continue
            if len(pictures) > 1:
                raise InputError(f"{place(path)}: {shown(stem)}: has several pictures: {', '.join(sorted(pictures))}")
            key = f"{path.name}!{stem}.{pictures[0]}"
            fields = json_object(content("json"), f"{key}: json") if "json" in group else {}
            captions = captions_of(fields, column, key)
            if "txt" in group:
                text = text_of(content("txt"), f"{key}: txt").strip()
                captions = captions if text in captions[:1] else [text] if text else []
            own = next(
                (s for s in group if s.rpartition(".")[0] == beside and f".{s.rpartition('.')[2]}" in SUFFIXES), ""
            )
            yield Example(
                key, fields=fields, place=(str(path), *group[pictures[0]]), **caption_fields(captions),
                conditioning=Example(f"{path.name}!{stem}.{own}", None, {}, (str(path), *group[own])) if own else None,
            )  # fmt: skip


def _members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Return {name up to the first dot: {suffix: (offset, length)}} of the files in a tar."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    stored: dict[str, tuple[int, int]] = {}  # files that a later hard link may refer to
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                hidden = any(part.startswith(".") for part in name.parts if part not in (".", ".."))
                if hidden or not name.name or not (member.isfile() or member.islnk()):
                    continue  # metadata files of macOS; names like "/"; folders and devices
                first, _, suffix = name.name.partition(".")
                group = groups.setdefault(str(name.with_name(first)), {})
                if suffix.lower() in group:
                    raise InputError(f"{place(path)}: {shown(member.name)}: is there twice")
                stored[member.name] = stored.get(member.linkname, (0, 0)) if member.islnk() else (
                    member.offset_data, member.size,
                )  # fmt: skip
                if member.islnk() and member.linkname not in stored:
                    raise InputError(f"{place(path)}: {shown(member.name)}: links to what is not there before it")
                group[suffix.lower()] = stored[member.name]
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{place(path)}: is not an uncompressed, whole tar file: {shown(str(error), 100)}") from None
    return groups


def _check_end(path: Path, offset: int) -> None:
    """Raise ReadError if tarfile stopped early: it mistakes a damaged header for the end of the archive."""
    with open(path, "rb") as file:
        file.seek(offset)
        if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("has no end")
        file.seek(offset)
        while block := file.read(2**20):
            if block.count(0) < len(block):
                raise tarfile.ReadError(f"is damaged, or another begins, at byte {offset}")


def read_parquet(path: Path, column: str, beside: str | None, lacking: list[str]) -> Iterator[Example]:
    """Yield the rows of a Parquet file with a column `image` of bytes, or of {bytes, path} as `datasets` writes it.

    Without a column of captions the names of the class labels in `label` are the captions. beside: the column of
    conditioning. lacking: the rows that img2dataset marks as failed are appended to it.
    """
    schema = parquet_read(path, "read_schema")
    image = image_column(path, schema, beside)
    others = [name for name in schema.names if name not in (image, beside)]
    rest = parquet_read(path, "read_table", columns=others).to_pylist()
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        labels = features["label"]["names"]
    except (KeyError, TypeError, ValueError):
        labels = None
    for number, row in enumerate(rest):
        key = f"{path.name}!{number:06d}"
        if row.get("status") not in (None, "success"):
            lacking.append(f"{key} ({row['status']})")
            continue
        captions = captions_of(row, column, key)
        if isinstance(labels, list) and isinstance(row.get("label"), int) and 0 <= row["label"] < len(labels):
            row["label"] = str(labels[row["label"]]).replace("_", " ")
            captions = [row["label"]] if not {column, *COLUMNS} & {*schema.names} else captions
        where = (str(path), -1, number)
        own = Example(f"{key}: {beside}", None, {}, where, column=str(beside)) if beside in schema.names else None
        yield Example(key, fields=row, place=where, column=image, conditioning=own, **caption_fields(captions))


def is_listing(path: Path, beside: str | None) -> bool:
    """Return whether a Parquet file holds no pictures, as the metadata files that img2dataset writes."""
    try:
        image_column(path, parquet_read(path, "read_schema"), beside)
    except InputError:
        return path.suffix.lower() == ".parquet"
    return False
