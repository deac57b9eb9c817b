"""A picture of a data set: its captions, metadata and location in a file, a tar or a Parquet table."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError, nearest, shown
from genkit.files import file_size, place
from genkit.pictures.images import SUFFIXES, UNKNOWN

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = ("text", "caption", "prompt")  # columns of captions, tried after the one that the recipe names


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture of the data set: its name in messages (key), caption, metadata and the location of its bytes.

    place: file, offset and length (length -1: the whole file; offset -1: row `length` of a Parquet file, in `column`).
    captions: all of them if there are several; one is drawn each time, and `caption` is the first. repeat: how often
    the picture is used in an epoch, as in kohya's folders. conditioning: the picture that a ControlNet reads with it.
    """

    key: str
    caption: str | None
    fields: dict[str, Any]
    place: tuple[str, int, int]
    captions: tuple[str, ...] = ()
    repeat: int = 1
    column: str = ""
    conditioning: Example | None = None

    @property
    def places(self) -> list[tuple[str, int, int]]:
        """The places of the picture and of its conditioning."""
        return [self.place, *([] if self.conditioning is None else [self.conditioning.place])]

    def data(self) -> bytes:
        """Return the bytes of the picture. Raises InputError when they cannot be read."""
        path, offset, length = self.place
        if offset < 0:
            cell = _parquet_cell(path, length, self.column)
            if not isinstance(cell, bytes):  # null, or only a path to another file
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
        """Return (width, height) in pixels from the header. Raises InputError for what is not a picture."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.data())) as picture:
                turned = picture.getexif().get(0x0112, 1) >= 5
                return picture.size[::-1] if turned else picture.size
        except Exception:  # whatever Pillow's parsers stumble over
            raise InputError(f"{self.key}: {UNKNOWN}") from None

    def digest(self) -> str:
        """Return the SHA-256 of the bytes, those of its conditioning included, in hex."""
        return hashlib.sha256(self.data() + (self.conditioning.data() if self.conditioning else b"")).hexdigest()


class Examples(list[Example]):
    """The pictures of a data set. notes: assumptions made in reading it. lacking: samples without a picture."""

    notes: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()


def text_of(data: bytes, where: str) -> str:
    """Return the text of `data`, without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save it as UTF-8") from None


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
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


def captions_of(row: dict[str, Any], column: str, where: str) -> list[str]:
    """Remove the captions from a row of metadata and return them: its value is a text or a list of texts."""
    name = next((n for n in (column, *COLUMNS) if n in row), None)
    value = None if name is None else row.pop(name)
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str | None) for text in texts):
        raise InputError(f"{where}: {name}: {shown(value)} is not a text")
    return [text.strip() for text in texts if text is not None and text.strip()]


def caption_fields(captions: list[str]) -> dict[str, Any]:
    """Return the keyword arguments `caption` and `captions` of an Example."""
    return {"caption": captions[0] if captions else None, "captions": tuple(captions) if len(captions) > 1 else ()}


def image_column(path: Path, schema: Any, beside: str | None = None) -> str:
    """Return the column of pictures: `image`, or the only one that is {bytes, path} or named like a suffix (jpg).

    beside: the column of the pictures' conditioning, if they have any.
    """
    cells = [f.name for f in schema if str(f.type).startswith("struct<bytes: ") and f.name != beside]
    named = [f.name for f in schema if f".{f.name}" in SUFFIXES and str(f.type) in ("binary", "large_binary")]
    found = ["image"] if "image" in schema.names else cells or named
    if len(found) != 1:
        raise InputError(f"{place(path)}: has no column image{nearest('image', schema.names)}")
    return found[0]


def parquet_read(path: Path, what: str, **options: Any) -> Any:
    """Call pyarrow's function `what` on a file. Raises InputError for a file that is not Parquet."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{place(path)}: Parquet needs pyarrow: pip install 'genkit-diffusion[parquet]'") from None
    try:
        return getattr(parquet, what)(path, memory_map=True, **options)
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{place(path)}: is no Parquet file: {shown(str(error), 100)}") from None


_OPEN: dict[
    tuple[str, str], Any
] = {}  # open columns by path and name: a row of a Parquet file cannot be read by an offset
_OPENING = threading.Lock()


def _parquet_cell(path: str, row: int, column: str) -> Any:
    with _OPENING:
        if (path, column) not in _OPEN:
            _OPEN[path, column] = parquet_read(Path(path), "read_table", columns=[column]).column(column)
        cell = _OPEN[path, column][row].as_py()
    return cell.get("bytes") if isinstance(cell, dict) else cell
