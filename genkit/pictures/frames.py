"""Frames of a clip, sampled evenly: an animated GIF or WebP, a folder of pictures, or a list of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError
from genkit.files import file_size, place
from genkit.pictures.images import MAX_PIXELS, list_images, read_image

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 2**28  # of a file
MAX_FRAMES, MAX_DECODED = 10_000, 2**33  # pixels of all frames together
UNKNOWN = "is neither an animated GIF or WebP nor a folder of pictures; of a video, write the frames into a folder"


def sampled(total: int, count: int) -> list[int]:
    """Return the numbers of `count` of `total` frames: the middle one of each of `count` equal parts."""
    return [(2 * k + 1) * total // (2 * count) for k in range(count)]


def read_frames(clip: Any, count: int) -> tuple[list[Image.Image], int]:
    """Return `count` evenly sampled frames of a clip as RGB, and how many it has.

    clip: an animated GIF or WebP, a folder, whose pictures are taken in natural order (2.png before 10.png), or a list
    of pictures as `read_image` takes them. Only the frames that are sampled are kept. Raises InputError for other
    files, damaged ones, and clips of fewer frames.
    """
    if not isinstance(clip, str | Path):
        return [read_image(clip[n]) for n in _chosen(len(clip), count, "the clip")], len(clip)
    path = Path(clip)
    if path.is_dir():
        files = [file for file in list_images(path) if file.parent == path]
        if not files:
            raise InputError(f"{place(path)}: holds no PNG, JPEG, WebP or JPEG XL picture")
        return [read_image(files[n]) for n in _chosen(len(files), count, place(path))], len(files)
    try:
        return _animation(path, count)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(place(path)) else f"{place(path)}: {message}") from None
    except Exception as error:  # Pillow's parsers raise anything for a bad file
        raise InputError(f"{place(path)}: cannot be decoded: {' '.join(str(error).split())[:200]}") from None


def _chosen(total: int, count: int, where: str) -> Sequence[int]:
    if total < count:
        frames = "1 frame" if total == 1 else f"{total} frames"
        raise InputError(f"{where}: has {frames}, fewer than the {count} that are looked at")
    return sampled(total, count)


def _animation(path: Path, count: int) -> tuple[list[Image.Image], int]:
    size = file_size(path)
    if not 0 < size <= MAX_BYTES:
        raise InputError(f"has {size} bytes; a clip has 1 to {MAX_BYTES}")
    data = path.read_bytes()
    picture = _opened(data)
    total = int(getattr(picture, "n_frames", 1))
    width, height = picture.size
    if total > MAX_FRAMES or width * height > MAX_PIXELS or width * height * total > MAX_DECODED:
        raise InputError(f"has {total} frames of {width}x{height}, more than is read: at most {MAX_FRAMES} frames")
    found: list[Image.Image] = []
    for number in _chosen(total, count, place(path)):
        picture.seek(number)
        picture.load()
        found.append(read_image(picture.copy()))
    return found, total


def _opened(data: bytes) -> Any:
    from PIL import GifImagePlugin, WebPImagePlugin

    kinds: tuple[tuple[bool, bool, Callable[[Any], Any]], ...] = (
        (data[:6] in (b"GIF87a", b"GIF89a"), data.rstrip(b"\0\r\n").endswith(b";"), GifImagePlugin.GifImageFile),
        (
            data[:4] == b"RIFF" and data[8:12] == b"WEBP",
            int.from_bytes(data[4:8], "little") + 8 <= len(data),
            WebPImagePlugin.WebPImageFile,
        ),
    )
    for known, whole, plugin in kinds:
        if known and not whole:
            raise InputError("is truncated")
        if known:
            return plugin(io.BytesIO(data))
    raise InputError(UNKNOWN)
