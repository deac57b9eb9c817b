"""Encode pixels and metadata as the bytes of a PNG, WebP, JPEG or JPEG XL file."""

from __future__ import annotations

import dataclasses
import io
import struct
from typing import TYPE_CHECKING, Any

from zlib_ng import zlib_ng as zlib

from genkit.errors import InputError, nearest, shown
from genkit.pictures.metadata import exif

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

QUALITY = 90  # of a format that has one: JPEG XL's authors call it visually lossless
BLOCK = 2**17  # bytes filtered at a time: they stay in a core's cache until they are compressed


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A picture format, made by `encoding`. quality: 1 to 100; None for PNG."""

    name: str
    quality: int | None

    def __str__(self) -> str:
        return self.name if self.quality is None else f"{self.name}, quality {self.quality}"

    @property
    def suffix(self) -> str:
        """The suffix of file names, with the dot."""
        return _FORMATS[self.name][0]

    def encode(self, pixels: np.ndarray, text: dict[str, str] | None = None) -> bytes:
        """Return (height, width, 3) uint8 pixels as a file with `text`, as from `texts`, in it.

        Bit-exact for PNG, and at quality 100 for WebP and JPEG XL. Several threads may call it at once: they run in
        parallel.
        """
        return _FORMATS[self.name][1](pixels, text or {}, self.quality or 0)


def encoding(name: str = "png", quality: int | None = None) -> Encoding:
    """Return the encoding of that name; quality defaults to QUALITY.

    Raises InputError for an unknown name, a quality out of range, and a format that this Pillow lacks the plugin for.
    """
    name = "jpeg" if name == "jpg" else name
    if name not in _FORMATS:
        raise InputError(f"--format: {shown(name)} is not png, webp, jpeg or jxl{nearest(str(name).lower(), _FORMATS)}")
    if name == "png":
        if quality is not None:
            raise InputError("--quality: png keeps every bit and has none; it is for webp, jpeg and jxl")
        return Encoding(name, None)
    quality = QUALITY if quality is None else quality
    if type(quality) is not int or not 1 <= quality <= 100:
        raise InputError(f"--quality: {shown(quality)} is not a whole number from 1 to 100")
    if name == "jxl":
        try:
            import pillow_jxl  # noqa: F401
        except ImportError:
            raise InputError("--format: jxl needs a plugin of Pillow: pip install pillow-jxl-plugin") from None
    return Encoding(name, quality)


def _png(pixels: np.ndarray, text: dict[str, str], _quality: int) -> bytes:
    """PNG (RFC 2083): every row through the Paeth filter, then run-length and Huffman coding."""
    import numpy as np

    height, width, _ = pixels.shape
    rows = np.zeros((height + 1, 3 * width + 3), np.uint8)  # zeros left of and above the picture
    rows[1:, 3:] = pixels.reshape(height, -1)
    # CPU time and bytes beside Pillow's default, median (worst) of 20 photographs and grainy drawings of 512x512: this
    # 0.07 (0.14), 1.00 (1.12); with the standard library's zlib 0.11 (0.22), the same bytes; Pillow with run lengths
    # 0.24 (0.48), 1.00 (1.12), at level 1 0.30 (0.72), 1.12 (1.23); OpenCV 0.12 (0.22), 1.07 (1.26); this filter with
    # libdeflate 0.07 (0.19), 1.07 (1.10), with ISA-L 0.04 (0.08), 1.09 (1.15). Noise 0.12, 1.00.
    pack = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    step = max(1, BLOCK // rows.shape[1])
    data = [pack.compress(_paeth(rows[top : top + step + 1])) for top in range(0, height, step)]
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    words = [_text_chunk(key, value) for key, value in text.items()]
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *words, _chunk(b"IDAT", *data, pack.flush()), _chunk(b"IEND")])


def _paeth(rows: np.ndarray) -> np.ndarray:
    """Return all but the first of (count, 3 + bytes) rows as PNG's filter 4 leaves them: (count - 1, 1 + bytes).

    The prediction is that of left, above and corner which is nearest to left + above - corner. All in eight bits: with
    the corner clipped to what lies between the other two, its distances to them are those of the sum, swapped.
    """
    import numpy as np

    left, above, corner = rows[1:, :-3], rows[:-1, 3:], rows[:-1, :-3]
    low, high = np.minimum(left, above), np.maximum(left, above)
    corner = np.minimum(np.maximum(corner, low), high)
    to_low, to_high = high - corner, corner - low
    near, far = np.minimum(to_low, to_high), np.maximum(to_low, to_high)
    # Select by masks of 0 and 255: numpy.where takes ten times as long on bytes
    prediction = high ^ ((low ^ high) & -(to_low < to_high).view(np.uint8))
    prediction ^= (prediction ^ corner) & -(near > far - near).view(np.uint8)
    filtered = np.empty((left.shape[0], left.shape[1] + 1), np.uint8)
    filtered[:, 0] = 4
    np.subtract(rows[1:, 3:], prediction, out=filtered[:, 1:])
    return filtered


def _chunk(kind: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))])


def _text_chunk(key: str, value: str) -> bytes:
    """Return an uncompressed text chunk: readers limit the size of decompressed text."""
    try:
        return _chunk(b"tEXt", key.encode(), b"\0", value.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", key.encode(), b"\0\0\0\0\0", value.encode())


def _webp(pixels: np.ndarray, text: dict[str, str], quality: int) -> bytes:
    if quality == 100:  # a fifth fewer bytes than PNG; method 0 saves none, 2 and above a hundredth or two more
        return _pillow("WEBP", pixels, text, lossless=True, quality=0, method=1)
    return _pillow("WEBP", pixels, text, quality=quality, method=2)


def _jpeg(pixels: np.ndarray, text: dict[str, str], quality: int) -> bytes:
    # From 90 on colours at full resolution, as ImageMagick has it: halved, they bleed at the edges of flat drawings.
    return _pillow("JPEG", pixels, text, quality=quality, subsampling=0 if quality >= 90 else 2)


def _jxl(pixels: np.ndarray, text: dict[str, str], quality: int) -> bytes:
    if quality == 100:  # a fifth fewer bytes than PNG; effort 1 takes a twentieth of the time and saves none
        return _pillow("JXL", pixels, text, lossless=True, effort=3, num_threads=0)
    return _pillow("JXL", pixels, text, quality=quality, effort=3, num_threads=0)


def _pillow(kind: str, pixels: np.ndarray, text: dict[str, str], **options: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options, **({"exif": exif(text)} if text else {}))
    return buffer.getvalue()


# By format: the file suffix, and a function (pixels, text, quality) -> bytes.
_FORMATS: dict[str, tuple[str, Callable[[np.ndarray, dict[str, str], int], bytes]]] = {
    "png": (".png", _png), "webp": (".webp", _webp), "jpeg": (".jpg", _jpeg), "jxl": (".jxl", _jxl),
}  # fmt: skip
