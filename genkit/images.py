"""Pictures as files: PNG, JPEG and WebP in, distrusted until wholly decoded; PNG with its settings out."""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.durable import json_line
from genkit.errors import InputError
from genkit.files import file_size, place

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from genkit.request import Result

MAX_BYTES = 2**26  # of a file
MAX_PIXELS = 2**26  # 8192 x 8192: 200 MB decoded
MAX_CHUNKS = 50_000  # of a PNG; 64 MiB in the usual chunks of 8 KiB are 8,192
METADATA_BYTES = 2**16  # of both text chunks together
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def check_image(path: str | Path, contained: bool = False) -> tuple[int, int]:
    """Return (width, height) in pixels, as `read_image` gives it, of a picture that decodes without error.

    contained: refuse a symbolic link that leads out of the folder it lies in. The answer is remembered for as long as
    the file stays the same. Raises InputError, in one line, naming the file and what is wrong with it.
    """
    path = Path(path)
    file_size(path)
    if contained and path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise InputError(f"{place(path)}: is a link that leads out of its folder")
    status = os.stat(path)
    return _size(path, (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=4096)
def _size(path: Path, _state: tuple[int, int, int]) -> tuple[int, int]:
    return read_image(path).size


def read_image(path: str | Path) -> Image.Image:
    """Return a PNG, JPEG or WebP file as an RGB picture: turned as its EXIF asks, on white where transparent.

    16 bits a channel are scaled to 8. Raises InputError for what is no such picture, is animated, is larger than
    MAX_BYTES or MAX_PIXELS, or is truncated or damaged as far as the format can tell (PNG: every checksum; JPEG: its
    end; WebP: its length).
    """
    path = Path(path)
    try:
        return _decoded(_bytes(path))
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(place(path)) else f"{place(path)}: {message}") from None
    except Exception as error:  # whatever Pillow's parsers stumble over, from struct.error to KeyError: a bad file
        raise InputError(f"{place(path)}: cannot be decoded: {' '.join(str(error).split())[:200]}") from None


def list_images(folder: str | Path) -> list[Path]:
    """Return the .png, .jpg, .jpeg and .webp files in `folder` and below, sorted.

    Hidden files and folders are left out, and linked folders are not entered: they could lead round in circles.
    Raises InputError when the folder, or one below, cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{place(error.filename)}: cannot be listed: {error.strerror}")

    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, f) for f in files if Path(f).suffix.lower() in SUFFIXES and not f.startswith(".")]
    return sorted(found)


def _bytes(path: Path) -> bytes:
    size = file_size(path)
    if size == 0:
        raise InputError("is empty")
    if size > MAX_BYTES:
        raise InputError(f"has {size} bytes, more than the {MAX_BYTES} that a picture may have")
    with open(
        os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb"
    ) as file:  # should a pipe have taken its place, do not wait
        return file.read(MAX_BYTES + 1)


def _decoded(data: bytes) -> Image.Image:
    from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    # The plugins by hand: Image.open warns on standard error, and takes a phone's two-picture JPEG for another format.
    formats = (
        (b"\x89PNG\r\n\x1a\n", _check_png, PngImagePlugin.PngImageFile),
        (b"\xff\xd8\xff", _check_jpeg, JpegImagePlugin.JpegImageFile),
        (b"RIFF", _check_webp, WebPImagePlugin.WebPImageFile),
    )
    for magic, check, plugin in formats:
        if data.startswith(magic):
            check(data)
            picture: Image.Image = plugin(io.BytesIO(data))
            break
    else:
        raise InputError("is not a PNG, JPEG or WebP picture")
    width, height = picture.size
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise InputError(f"is {width}x{height}; a picture has 1 to {MAX_PIXELS} pixels")
    if getattr(picture, "n_frames", 1) > 1:
        raise InputError("is animated; give one frame")
    picture.load()
    turn = _TURNS.get(picture.getexif().get(0x0112, 1))
    picture = _rgb(picture)
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


def _rgb(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        import numpy as np

        grey = np.asarray(picture).astype(np.uint32).clip(0, 65535)
        picture = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _check_png(data: bytes) -> None:
    """Check every chunk's checksum and that the file ends where it says: Pillow decodes files that lack their end."""
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
            if at < len(data):
                raise InputError(f"has {len(data) - at} bytes after its end")
            return
    raise InputError("is truncated")


def _check_jpeg(data: bytes) -> None:
    """Check that the pixel data come to an end: Pillow decodes files whose last part is zeros."""
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
        raise InputError("is not a PNG, JPEG or WebP picture")
    if struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise InputError("is truncated")


def encode_png(pixels: np.ndarray, text: dict[str, str] | None = None) -> bytes:
    """Return (height, width, 3) uint8 pixels as the bytes of a PNG file, bit-exact, with `text` in text chunks."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value, zip=False)  # a compressed chunk that unpacks past a limit makes the file unreadable
    buffer = io.BytesIO()
    # Run-length coding of filtered rows. Milliseconds and KiB a picture on one core, emoji of 128x128 and the same
    # enlarged to 512x512 with noise of +-1: RLE 0.9, 10.1 and 15, 243; level 1 0.9, 11.5 and 23, 301; level 3 1.5, 11.1
    # and 41, 285; level 6, Pillow's default, 2.3, 10.1 and 89, 257. All of noise: 18 against 24 to 26, 769 all.
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info, compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def png_text(request: dict[str, Any], result: Result, model: str, version: str) -> dict[str, str]:
    """Return the two text chunks of a picture: `parameters`, which other tools read, and `genkit`, all of it as JSON.

    request: Request.to_json() of a row whose defaults are filled in. `parameters` is AUTOMATIC1111's infotext. Together
    they take METADATA_BYTES at most. Of paths only the file's name is written: pictures travel, folders are private.
    """
    request = {
        name: os.path.basename(value) if name in ("image", "mask_image") else value for name, value in request.items()
    }
    parameters = _clipped(_infotext(request, result, model, version), METADATA_BYTES // 2)
    record = {
        "version": version, "model": model, "request": request, "id": result.id, "index": result.index,
        "seed": result.seed, "steps": result.steps, "nfe": result.nfe, "width": result.width, "height": result.height,
        "scores": result.scores, "fingerprint": result.fingerprint,
    }  # fmt: skip
    room = METADATA_BYTES - len(parameters.encode())
    whole = _json(record)
    if len(whole.encode()) > room:
        short = {name: value for name, value in request.items() if len(_json(value)) < 1000}
        whole = _json({**record, "request": short, "scores": {}, "cut": True})
    return {"parameters": parameters, "genkit": whole}


def _infotext(request: dict[str, Any], result: Result, model: str, version: str) -> str:
    scheduler = request.get("scheduler")
    options = scheduler if isinstance(scheduler, dict) else {"solver": scheduler}
    fields = {
        "Steps": result.steps if result.steps is not None else request.get("num_inference_steps"),
        "Sampler": _SAMPLERS.get(str(options.get("solver")), options.get("solver")),
        "Schedule type": options.get("spacing"),
        "CFG scale": request.get("guidance_scale"),
        "Seed": result.seed,
        "Size": f"{result.width}x{result.height}",
        "Model": model,
        "Denoising strength": request.get("strength"),
        "Version": f"genkit {version}",
    }
    negative = request.get("negative_prompt")
    lines = [str(request.get("prompt", "")), *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{k}: {_quoted(v)}" for k, v in fields.items() if v is not None)])


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def _clipped(text: str, limit: int) -> str:
    """Cut the middle out of a text of more than `limit` bytes: its last line is what other tools look for."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return text
    tail = data[-min(2000, limit // 2) :].decode("utf-8", "ignore")
    return data[: limit - len(tail.encode()) - 3].decode("utf-8", "ignore") + "…" + tail


def _json(value: Any) -> str:
    return json_line(value).rstrip("\n")


# EXIF orientation to the names of Pillow's Transpose; 1 needs nothing and anything else is no orientation.
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
_SAMPLERS = {
    "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M", "sde-dpmpp_2m": "DPM++ 2M SDE", "pndm": "PLMS", "dpm2": "DPM2", "unipc": "UniPC",
}  # fmt: skip
