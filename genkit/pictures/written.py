"""Texts that a picture file holds about itself: text chunks of a PNG, EXIF of every format. No pixel is decoded."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genkit.errors import InputError, reason, shown
from genkit.files import place
from genkit.pictures.images import picture_bytes, silent

TEXT_BYTES = 2_000_000  # of all texts of a picture; a large graph of ComfyUI has a tenth of it
_TAGS = {0x010E: "ImageDescription", 0x010F: "Make", 0x0110: "Model", 0x0131: "Software"}
_INNER, _COMMENT = 0x8769, 0x9286  # the directory of EXIF proper, and UserComment in it


def read_texts(path: str | Path) -> dict[str, str]:
    """Return the texts of a PNG, JPEG, WebP or JPEG XL file by name: a chunk's keyword, or EXIF's name of a field.

    Raises InputError, naming the file, for one that `picture_bytes` refuses, for more than TEXT_BYTES, and for text
    that is damaged.
    """
    data = picture_bytes(path)
    found: dict[str, str] = {}
    try:
        for name, text in _texts(data):
            found[name] = text
    except InputError as error:
        raise InputError(f"{place(path)}: {error}") from None
    except Exception as error:  # Pillow's EXIF raises anything from struct.error to SyntaxError for a bad block
        raise InputError(f"{place(path)}: its metadata is damaged: {reason(error)}") from None
    return found


def _texts(data: bytes) -> Iterator[tuple[str, str]]:
    room = TEXT_BYTES
    for kind, block in _blocks(data):
        parts = list(_exif(block)) if kind == b"EXIF" else [_chunk_text(kind, block, room)]
        room -= sum(len(name) + len(text.encode("utf-8", "replace")) for name, text in parts)
        if room < 0 or len(block) > TEXT_BYTES:
            raise InputError(f"has more than {TEXT_BYTES} bytes of metadata")
        yield from parts


def _blocks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (chunk type, its bytes) of what holds text; EXIF of every format as b"EXIF". The file has been checked."""
    if data.startswith(b"\x89PNG"):
        yield from _png_blocks(data)
    elif data.startswith(b"\xff\xd8"):
        at = 2
        while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the start of the pixels
            length = 0 if data[at + 1] == 0xFF else struct.unpack_from(">H", data, at + 2)[0]
            if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                yield b"EXIF", data[at + 4 : at + 2 + length]
            at += 2 + length if length else 1
    elif data.startswith(b"RIFF"):
        at = 12
        while at + 8 <= len(data):
            kind, length = struct.unpack_from("<4sI", data, at)
            if kind == b"EXIF":
                yield b"EXIF", data[at + 8 : at + 8 + length]
            at += 8 + length + length % 2
    else:
        at = 0 if data.startswith(b"\0\0\0\x0c") else len(data)  # a bare codestream holds no metadata
        while at + 8 <= len(data):
            length, kind, longer = struct.unpack(">I4sQ", data[at : at + 16].ljust(16, b"\0"))
            start = at + (16 if length == 1 else 8)
            end = len(data) if length == 0 else at + (longer if length == 1 else length)
            if kind == b"Exif":
                # Behind the offset of the TIFF header, which the plugin of Pillow does not write.
                yield b"EXIF", data[start + (0 if data[start : start + 2] in (b"MM", b"II") else 4) : end]
            at = end


def _png_blocks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf"):
            yield b"EXIF" if kind == b"eXIf" else kind, data[at + 8 : at + 8 + length]
        if kind == b"IEND":
            return
        at += 12 + length


def _chunk_text(kind: bytes, block: bytes, room: int) -> tuple[str, str]:
    """Return (keyword, text) of a text chunk of a PNG (RFC 2083, and iTXt of PNG 1.2)."""
    key, _, rest = block.partition(b"\0")
    name = key.decode("latin-1")
    packed = kind == b"zTXt"
    if packed:
        rest = rest[1:]
    elif kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].split(b"\0", 2)[-1]
    if packed:
        try:
            unpacker = zlib.decompressobj()
            rest = unpacker.decompress(rest, room + 1)
        except zlib.error:
            raise InputError(f"{shown(name)}: its compressed text is damaged") from None
        if not unpacker.eof and len(rest) <= room:
            raise InputError(f"{shown(name)}: its compressed text is cut")
    try:
        return name, rest[: room + 1].decode("utf-8" if kind == b"iTXt" else "latin-1")
    except UnicodeDecodeError as error:
        if len(rest) > room:  # the cut may be within a letter
            raise InputError(f"has more than {TEXT_BYTES} bytes of metadata") from None
        raise InputError(f"{shown(name)}: byte {error.start} of its text is not UTF-8") from None


def _exif(block: bytes) -> Iterator[tuple[str, str]]:
    from PIL import Image

    if len(block) > TEXT_BYTES:
        raise InputError(f"has more than {TEXT_BYTES} bytes of metadata")
    exif = Image.Exif()
    with silent():
        exif.load(block)
        fields = {name: exif.get(tag) for tag, name in _TAGS.items()}
        comment = exif.get_ifd(_INNER).get(_COMMENT)
    for name, value in fields.items():
        if isinstance(value, str):
            yield name, value.rstrip("\0")
    if comment:
        yield "UserComment", _comment(comment)


def _comment(value: Any) -> str:
    """Return the text of a UserComment, whose first eight bytes name its encoding (EXIF 2.32, table 9)."""
    if isinstance(value, str):
        return value.rstrip("\0")
    code, rest = bytes(value[:8]), bytes(value[8:])
    if code == b"UNICODE\0":
        # The order of bytes is nowhere written: in the right one most letters are of few bytes.
        read = [rest.decode(f"utf-16-{order}", "replace") for order in ("be", "le")]
        return max(read, key=lambda text: sum(letter < "\x80" for letter in text[:4000])).rstrip("\0")
    if code not in (b"ASCII\0\0\0", bytes(8)):
        rest = bytes(value)  # without a code, as some tools write it
    return rest.decode("utf-8", "replace").rstrip("\0 ")
