"""Read picture files: PNG, JPEG, WebP and JPEG XL, fully checked and decoded, with size limits."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError
from genkit.files import file_size, place
from genkit.storage import StoragePath, parsed

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 2**26  # of a file
MAX_PIXELS = 2**26  # 8192 x 8192: 200 MB decoded
MAX_CHUNKS = 50_000  # of a PNG; 64 MiB in the usual chunks of 8 KiB are 8,192
MOST_PIXELS = 2**24  # of a resized picture: a very long, narrow one would take gigabytes before it is cropped
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".jxl"}
_JXL = b"\0\0\0\x0cJXL \r\n\x87\n"  # in boxes; else the two bytes FF 0A
UNKNOWN = "is not a PNG, JPEG, WebP or JPEG XL picture"


def check_image(path: str | Path, contained: bool = False, mask: bool = False) -> tuple[int, int]:
    """Return (width, height) in pixels of a picture that decodes without error, as by `read_image` or `read_mask`.

    contained: refuse a symbolic link that points outside its folder. Cached until the file changes. Raises InputError
    naming the file and what is wrong with it.
    """
    path = path if isinstance(path, StoragePath) else Path(path)
    file_size(path)
    if isinstance(path, StoragePath):
        return (read_mask if mask else read_image)(path).size
    if contained and path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise InputError(f"{place(path)}: is a link that leads out of its folder")
    status = os.stat(path)
    return _size(path, (status.st_ino, status.st_size, status.st_mtime_ns), mask)


def check_resized(size: tuple[int, int], resized: tuple[int, int], model: str) -> None:
    """Raise InputError for a picture so narrow that resizing it for a model would make it too large.

    size, resized: (height, width) in pixels.
    """
    if resized[0] * resized[1] > max(MOST_PIXELS, size[0] * size[1]):
        raise InputError(
            f"{size[1]}x{size[0]} pixels are too narrow: {model} would resize them to {resized[1]}x{resized[0]}"
        )


@functools.lru_cache(maxsize=4096)
def _size(path: Path, _state: tuple[int, int, int], mask: bool) -> tuple[int, int]:
    return (read_mask if mask else read_image)(path).size


def read_image(source: Any) -> Image.Image:
    """Return a picture as RGB, rotated by its EXIF, transparency on white, from wherever it comes.

    source: a path or the bytes of a PNG, JPEG, WebP or JPEG XL file, a PIL image, or a numpy array (H, W) or (H, W, 1,
    3 or 4) of uint8, of uint16, or of floats from 0 to 1. 16 bits a channel are scaled to 8. Raises InputError for
    other formats, animations, files larger than MAX_BYTES or MAX_PIXELS, and truncated or damaged ones as far as the
    format allows (PNG: all checksums; JPEG: its end marker; WebP, JPEG XL: its length).
    """
    return _read(source, _rgb)


def read_mask(source: Any) -> Image.Image:
    """Return a mask in greyscale from any source that `read_image` takes; transparent pixels become black.

    Raises InputError, as `read_image` does, and for a mask in black on transparency, which would select nothing.
    """
    return _read(source, _painted)


def as_pil(source: Any) -> Image.Image:
    """Return the bytes of a file, or an array, as a PIL image: RGBA if it has transparency, else RGB."""
    return _read(source, lambda picture: picture.convert("RGBA") if picture.has_transparency_data else _rgb(picture))


def _read(source: Any, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    where = place(source) if isinstance(source, str | Path) else "the picture"
    try:
        if hasattr(source, "getbands"):
            return _converted(source, convert)
        if hasattr(source, "__array_interface__"):
            return convert(_from_array(source))
        return _decoded(source if isinstance(source, bytes) else _bytes(source), convert)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(where) else f"{where}: {message}") from None
    except Exception as error:  # Pillow's parsers raise anything from struct.error to KeyError for a bad file
        raise InputError(f"{where}: cannot be decoded: {' '.join(str(error).split())[:200]}") from None


def decode_image(data: bytes, where: str) -> Image.Image:
    """Return the picture in `data` as by `read_image`, but RGBA if it is transparent. where: its name in errors."""
    if not 0 < len(data) <= MAX_BYTES:
        raise InputError(f"{where}: has {len(data)} bytes; a picture has 1 to {MAX_BYTES}")
    try:
        return _decoded(data, lambda picture: _rgb(picture, transparent=True))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:
        raise InputError(f"{where}: cannot be decoded: {' '.join(str(error).split())[:200]}") from None


def list_images(folder: str | Path) -> list[Path]:
    """Return the .png, .jpg, .jpeg, .webp and .jxl files of `list_files`."""
    return [path for path in list_files(folder) if path.suffix.lower() in SUFFIXES]


def list_files(folder: str | Path) -> list[Path]:
    """Return the files in `folder` and below, in natural order: 2.png before 10.png.

    Without hidden files and folders; linked folders are not entered, since they may form loops. Raises InputError if
    the folder, or one below, cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{place(error.filename)}: cannot be listed: {error.strerror}")

    if isinstance(folder, StoragePath):
        return sorted((folder / name for name in folder.sizes() if f"/{name}".find("/.") < 0), key=natural)
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found, key=natural)


def natural(path: Path) -> list[Any]:
    """Return a key that sorts paths in natural order: numbers in names by their value."""
    *folders, name = path.parts or ("",)
    return [*map(_known_words, folders), _words(name)]


def _words(part: str) -> list[tuple[int, int, str]]:
    words = re.split(r"(\d+)", part)
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in words]


_known_words = functools.lru_cache(_words)  # for folders, which many pictures share


def _bytes(source: str | Path) -> bytes:
    path = parsed(source) or Path(source)
    size = file_size(path)
    if size == 0:
        raise InputError("is empty")
    if size > MAX_BYTES:
        raise InputError(f"has {size} bytes, more than the {MAX_BYTES} that a picture may have")
    if isinstance(path, StoragePath):
        return path.read_bytes()
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # O_NONBLOCK: do not wait if it became a pipe
        return file.read(MAX_BYTES + 1)


def picture_bytes(path: str | Path) -> bytes:
    """Return the bytes of a picture file that is whole as far as its format's own checks tell; no pixel is decoded.

    Raises InputError as `read_image` does for a file that is too large, damaged, or of another format.
    """
    try:
        data = _bytes(path)
        _plugin(data)
    except (InputError, OSError) as error:
        message = str(error)
        raise InputError(message if message.startswith(place(path)) else f"{place(path)}: {message}") from None
    return data


def _plugin(data: bytes) -> Callable[[io.BytesIO], Any]:
    """Return Pillow's opener for the format of a file, after integrity checks that Pillow does not make."""
    from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    # Not Image.open: it prints warnings, and identifies a phone's two-picture JPEG as another format.
    formats = (
        (b"\x89PNG\r\n\x1a\n", _check_png, PngImagePlugin.PngImageFile),
        (b"\xff\xd8\xff", _check_jpeg, JpegImagePlugin.JpegImageFile),
        (b"RIFF", _check_webp, WebPImagePlugin.WebPImageFile),
        ((b"\xff\x0a", _JXL), _check_jxl, _open_jxl),
    )
    for magic, check, plugin in formats:
        if data.startswith(magic):
            check(data)
            return plugin
    raise InputError(UNKNOWN)


def _decoded(data: bytes, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    with silent():
        picture: Image.Image = _plugin(data)(io.BytesIO(data))
    _check_size(*picture.size)
    if getattr(picture, "n_frames", 1) > 1:
        raise InputError("is animated; give one frame")
    picture.load()
    return _converted(picture, convert)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Suppress Pillow's warnings of damaged EXIF, which it then leaves out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _converted(picture: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    from PIL import Image

    with silent():
        turn = _TURNS.get(picture.getexif().get(0x0112, 1))
    if turn is None:
        return convert(picture)
    turned = convert(picture).transpose(Image.Transpose[turn])
    turned.info = {}  # not to be turned again
    return turned


def _from_array(array: Any) -> Image.Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(array)
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.dtype == np.uint16:
        values = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif values.dtype.kind == "f" and values.size and values.min() >= 0 and values.max() <= 1:
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise InputError(
            f"is an array {'x'.join(map(str, values.shape))} of {values.dtype}; a picture has rows, columns and 1, 3 "
            "or 4 channels of uint8, uint16, or floats from 0 to 1"
        )
    _check_size(values.shape[1], values.shape[0])
    return Image.fromarray(values)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise InputError(f"is {width}x{height}; a picture has 1 to {MAX_PIXELS} pixels")


def _rgb(picture: Image.Image, transparent: bool = False) -> Image.Image:
    from PIL import Image

    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        import numpy as np

        grey = np.asarray(picture).astype(np.uint32).clip(0, 65535)
        picture = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if transparent and any(picture.getchannel("A").histogram()[:255]):
            return picture
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _painted(picture: Image.Image) -> Image.Image:
    """Return lightness times opacity: a brush leaves the pixels that it does not paint transparent."""
    from PIL import ImageChops

    if not picture.has_transparency_data:
        return _rgb(picture).convert("L")
    layers = picture.convert("RGBA")
    light, alpha = layers.convert("RGB").convert("L"), layers.getchannel("A")
    painted = ImageChops.multiply(light, alpha)
    if not painted.getbbox() and alpha.getbbox():
        raise InputError("is painted in black on transparency: paint in white what is to be drawn anew")
    return painted


def _check_png(data: bytes) -> None:
    """Check every chunk's checksum and the end of the file: Pillow decodes files that lack their end."""
    at, count = 8, 0
    while at < len(data):
        if at + 12 > len(data):
            raise InputError("is truncated")
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            raise InputError("is truncated")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise InputError(f"is damaged: the checksum of its {ascii(kind)[2:-1]} chunk is wrong")
        at, count = end + 4, count + 1
        if count > MAX_CHUNKS:
            raise InputError(f"has more than {MAX_CHUNKS} chunks")
        if kind == b"IEND":
            return  # what some tools add behind it is no part of it
    raise InputError("is truncated")


def _check_jpeg(data: bytes) -> None:
    """Check for the end of the pixel data: Pillow decodes files whose last part is zeros."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:  # start of scan; within one, FF is always followed by 00 or a restart marker
            if data.find(b"\xff\xd9", at) < 0:
                break
            return
        at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise InputError("is truncated or damaged")


def _check_webp(data: bytes) -> None:
    if len(data) < 16 or data[8:12] != b"WEBP":
        raise InputError(UNKNOWN)
    if struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise InputError("is truncated")


def _check_jxl(data: bytes) -> None:
    """Check that all boxes are complete, the size, and that there is one frame: the plugin does not.

    Fields as in ISO/IEC 18181-1, annex D, least significant bit first.
    """
    head = int.from_bytes(_codestream(data)[2:], "little")

    def take(bits: int) -> int:
        nonlocal head
        value, head = head & ((1 << bits) - 1), head >> bits
        return value

    def size() -> tuple[int, int]:
        small = take(1)
        height = 8 * (take(5) + 1) if small else 1 + take((9, 13, 18, 30)[take(2)])
        ratio = take(3)
        if ratio:
            part, whole = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
            return height * part // whole, height
        return 8 * (take(5) + 1) if small else 1 + take((9, 13, 18, 30)[take(2)]), height

    _check_size(*size())
    plain, extra = take(1), take(1)
    if plain or not extra:
        return
    take(3)  # orientation
    if take(1):
        size()  # intrinsic size
    preview, moving = take(1), take(1)
    if preview or moving:
        raise InputError("is animated; give one frame" if moving else "has a preview beside the picture")


def _codestream(data: bytes) -> bytes:
    """Return the first bytes of a JPEG XL picture's codestream, which may stand in boxes (ISO/IEC 18181-2)."""
    if not data.startswith(_JXL):
        return data[:40]
    at, count, found = 0, 0, b""
    while at < len(data):
        length, kind, longer = struct.unpack_from(">I4sQ", data[at : at + 16].ljust(16, b"\0"))
        start = at + (16 if length == 1 else 8)
        end = len(data) if length == 0 else at + (longer if length == 1 else length)
        if end < start or end > len(data):
            raise InputError("is truncated")
        if kind in (b"jxlc", b"jxlp") and len(found) < 40:
            found += data[start + 4 * (kind == b"jxlp") : min(end, start + 44)]
        at, count = end, count + 1
        if count > MAX_CHUNKS:
            raise InputError(f"has more than {MAX_CHUNKS} boxes")
    return found


def _open_jxl(file: io.BytesIO) -> Image.Image:
    try:
        from pillow_jxl.JpegXLImagePlugin import JXLImageFile
    except ImportError:
        raise InputError("is a JPEG XL picture; to read it: pip install pillow-jxl-plugin") from None
    try:
        picture = JXLImageFile(file)
    except Exception:  # its message is about building libjxl
        raise InputError("is truncated or damaged") from None
    if picture.mode == "F":
        raise InputError("has floating-point pixels, of which Pillow makes black and white")
    if not picture.jpeg:  # only a losslessly recompressed JPEG is not rotated yet
        picture.info.pop("exif", None)
    return picture


# EXIF orientation to the names of Pillow's Transpose; 1 is upright, other values are invalid.
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
