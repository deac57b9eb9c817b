"""Picture files: every way one can be bad is one line, what is good reads right, and what is written reads back."""

from __future__ import annotations

import functools
import io
import os
import random
import struct
import sys
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from genkit.errors import InputError
from genkit.pictures import images
from genkit.pictures.encoders import encoding
from genkit.pictures.images import check_image, list_images, read_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)


def saved(kind: str = "PNG", picture: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture or Image.fromarray(PIXELS)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, bits: int = 1, colour: int = 0) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))


def with_chunks(*chunks: bytes) -> bytes:
    """A good PNG with more chunks after its header."""
    return saved()[:33] + b"".join(chunks) + saved()[33:]


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return saved(kind, frames[0], save_all=True, append_images=frames[1:])


PNG, JPEG, WEBP = saved(), saved("JPEG", quality=95), saved("WEBP", lossless=True)
WRONG_CRC = PNG[:50] + bytes([PNG[50] ^ 1]) + PNG[51:]
BOMB = header(50_000, 50_000) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
TEXT_BOMB = with_chunks(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 5_000_000)))

JXL_BOX = b"\0\0\0\x0cJXL \r\n\x87\n"


def jxl_header(width: int, height: int, *extra: int) -> bytes:
    """A JPEG XL codestream's beginning: no small size, each side as 18 or 30 bits, then single bits."""
    value, at = 0, 1
    for side, after in ((height, 3), (width, 0)):  # after the height three zero bits: no ratio
        value |= 3 << at | (side - 1) << at + 2
        at += 32 + after
    for bit in extra:
        value |= bit << at
        at += 1
    return b"\xff\x0a" + value.to_bytes(40, "little")


BAD = [
    ("56-empty", b"", "is empty"),
    ("57-text", b"hello, I am a picture", "is not a PNG, JPEG, WebP or JPEG XL picture"),
    ("58-png-cut", PNG[: len(PNG) // 2], "is truncated"),
    ("58-png-without-end", PNG[:-12], "is truncated"),
    ("58-png-zero-tail", PNG[: len(PNG) // 2] + b"\0" * (len(PNG) // 2), "is damaged"),
    ("58-jpeg-cut", JPEG[: len(JPEG) // 2], "is truncated"),
    ("58-jpeg-zero-tail", JPEG[: len(JPEG) // 2] + b"\0" * (len(JPEG) // 2), "is truncated"),
    ("58-jpeg-header-only", JPEG[:100], "is truncated"),
    ("58-webp-cut", WEBP[: len(WEBP) // 2], "is truncated"),
    ("58-webp-header-only", WEBP[:14], "is not a PNG, JPEG, WebP"),
    ("59-crc", WRONG_CRC, "checksum"),
    ("60-bomb", BOMB, "is 50000x50000"),
    ("60-jxl-bomb", jxl_header(50_000, 50_000), "is 50000x50000"),
    ("60-jxl-bomb-in-a-box", JXL_BOX + b"\0\0\0\0jxlc" + jxl_header(2**30, 1), "is 1073741824x1"),
    (
        "60-jxl-bomb-in-parts",
        JXL_BOX
        + b"\0\0\0\x10jxlp\0\0\0\0"
        + jxl_header(50_000, 50_000)[:4]
        + b"\0\0\0\0jxlp\0\0\0\x01"
        + jxl_header(50_000, 50_000)[4:],
        "is 50000x50000",
    ),
    ("58-jxl-box-cut", JXL_BOX + b"\0\0\1\0jxlc" + jxl_header(8, 8), "is truncated"),
    ("58-jxl-box-of-no-length", JXL_BOX + b"\0\0\0\4jxlc" + jxl_header(8, 8), "is truncated"),
    ("63-jxl", jxl_header(8, 8, 0, 1, 0, 0, 0, 0, 0, 1), "is animated"),
    ("65-jxl-boxes", JXL_BOX + b"\0\0\0\x08free" * 50_001, "has more than 50000 boxes"),
    ("61-no-width", header(0, 5) + chunk(b"IEND", b""), ""),
    ("61-no-height", header(5, 0) + chunk(b"IEND", b""), ""),
    ("62-float-tiff", saved("TIFF", Image.new("F", (4, 4))), "is not a PNG, JPEG, WebP"),
    ("63-gif", animated("GIF"), "is not a PNG, JPEG, WebP"),
    ("63-apng", animated("PNG"), "is animated"),
    ("63-webp", animated("WEBP"), "is animated"),
    ("65-text-bomb", TEXT_BOMB, "cannot be decoded"),
    ("65-chunks", with_chunks(*[chunk(b"eXIf", b"")] * 50_000), "has more than 50000 chunks"),
    ("66-svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a PNG, JPEG, WebP"),
    ("66-pdf", b"%PDF-1.7\n", "is not a PNG, JPEG, WebP"),
    ("66-psd", b"8BPS\0\1", "is not a PNG, JPEG, WebP"),
    ("66-fits", b"SIMPLE  =                    T", "is not a PNG, JPEG, WebP"),
]


@pytest.mark.parametrize(("data", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_pictures(tmp_path: Path, data: bytes, words: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(data)
    for read in (check_image, read_image):
        with pytest.raises(InputError) as caught:
            read(file)
        assert str(caught.value).startswith(f"{file}: ") and words in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


PLACES: list[tuple[str, Callable[[Path], object], str]] = [
    ("37-absent", lambda p: None, "is absent"),
    ("37-folder", lambda p: p.mkdir(), "is a folder"),
    ("37-fifo", lambda p: os.mkfifo(p), "a pipe"),
    ("37-device", lambda p: p.symlink_to("/dev/zero"), "device"),
    ("37-link-to-itself", lambda p: p.symlink_to(p), "leads back to itself"),
    ("65-too-many-bytes", lambda p: sparse(p, 2**26 + 1), "more than the"),
]


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in PLACES], ids=[case[0] for case in PLACES])
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(InputError, match=words):
        check_image(tmp_path / "a.png")


def test_68_segments_before_the_pixels(tmp_path: Path) -> None:
    many = b"".join(b"\xff\xe5\xff\xff" + b"\0" * 65533 for _ in range(20))
    (tmp_path / "a.jpg").write_bytes(JPEG[:2] + many + JPEG[2:])
    assert read_image(tmp_path / "a.jpg").size == (32, 24)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (8193, 1)])
def test_69_odd_sizes_are_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(saved(picture=Image.new("RGB", size)))
    assert check_image(tmp_path / "a.png") == size


@pytest.mark.parametrize(
    "name", ["a\nb.png", "<b>.png", "\U0001f98a.png", "x" * 250 + ".png", os.fsdecode(b"\xff.png")]
)
def test_71_file_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PNG)
    assert check_image(tmp_path / name) == (32, 24)
    assert list_images(tmp_path) == [tmp_path / name]
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        check_image(tmp_path / name)
    assert "\n" not in str(caught.value) and str(caught.value).encode()


def test_a_link_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "inner/out.png").symlink_to("../a.png")
    (tmp_path / "inside.png").symlink_to("a.png")
    assert check_image(tmp_path / "inner/out.png") == (32, 24)
    assert check_image(tmp_path / "inside.png", contained=True) == (32, 24)
    with pytest.raises(InputError, match="leads out of its folder"):
        check_image(tmp_path / "inner/out.png", contained=True)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(PNG)
    assert check_image(file) == (32, 24)
    file.write_bytes(saved(picture=Image.new("RGB", (5, 6))))
    assert check_image(file) == (5, 6)
    file.write_bytes(b"nothing")
    with pytest.raises(InputError):
        check_image(file)


RED = (255, 0, 0)
MODES: list[tuple[str, bytes, Any]] = [
    ("rgb", saved(picture=Image.new("RGB", (4, 4), RED)), RED),
    ("grey", saved(picture=Image.new("L", (4, 4), 77)), (77, 77, 77)),
    ("one-bit", saved(picture=Image.new("1", (4, 4), 1)), (255, 255, 255)),
    ("grey-alpha", saved(picture=Image.new("LA", (4, 4), (0, 51))), (204, 204, 204)),
    ("rgba-transparent", saved(picture=Image.new("RGBA", (4, 4), (9, 9, 9, 0))), (255, 255, 255)),
    ("rgba-half", saved(picture=Image.new("RGBA", (4, 4), (255, 0, 0, 128))), (255, 127, 127)),
    ("palette", saved(picture=Image.new("RGB", (4, 4), RED).quantize(2)), RED),
    ("palette-transparent", saved(picture=Image.new("P", (4, 4)), transparency=0), (255, 255, 255)),
    ("rgb-one-colour-transparent", saved(picture=Image.new("RGB", (4, 4), RED), transparency=RED), (255, 255, 255)),
    ("grey-16", saved(picture=Image.fromarray(np.full((4, 4), 0x8080, np.uint16))), (128, 128, 128)),
    ("grey-16-black", saved(picture=Image.fromarray(np.full((4, 4), 200, np.uint16))), (1, 1, 1)),
    ("rgb-16", header(4, 4, 16, 2)
     + chunk(b"IDAT", zlib.compress((b"\0" + b"\xff\xff\x80\x80\0\0" * 4) * 4)) + chunk(b"IEND", b""), (255, 128, 0)),
    ("cmyk", saved("JPEG", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100), RED),
    ("webp-alpha", saved("WEBP", Image.new("RGBA", (4, 4), (0, 0, 255, 0)), lossless=True), (255, 255, 255)),
]  # fmt: skip


@pytest.mark.parametrize(("data", "colour"), [case[1:] for case in MODES], ids=[f"62-{case[0]}" for case in MODES])
def test_62_every_mode_becomes_rgb(tmp_path: Path, data: bytes, colour: tuple[int, int, int]) -> None:
    (tmp_path / "a.png").write_bytes(data)
    picture = read_image(tmp_path / "a.png")
    assert picture.mode == "RGB"
    np.testing.assert_allclose(np.asarray(picture).reshape(-1, 3).astype(int) - colour, 0, atol=2)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_64_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    source = np.zeros((16, 32, 3), np.uint8)
    source[:8, :8] = 255  # one corner is white: where it ends up tells the turns apart
    (tmp_path / "a").write_bytes(
        saved(kind, Image.fromarray(source), exif=exif, **({"quality": 95} if kind != "PNG" else {}))
    )
    found = np.asarray(read_image(tmp_path / "a").convert("L"))
    corners = [bool(found[y, x] > 128) for y, x in ((2, 2), (2, -2), (-2, -2), (-2, 2))]
    white = {2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}.get(orientation, 0)
    assert corners == [i == white for i in range(4)]
    assert found.shape == ((32, 16) if 5 <= orientation <= 8 else (16, 32))
    assert check_image(tmp_path / "a") == found.shape[::-1]


def test_damaged_exif_is_left_out_in_silence(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    data = encoding("jpeg").encode(np.zeros((8, 8, 3), np.uint8), {"genkit": "{}", "parameters": "a"})
    start = b"Exif\0\0MM\0*\0\0\0\x08\0"
    (tmp_path / "a.jpg").write_bytes(data.replace(start + b"\x02", start + b"\xff"))  # entries of the directory
    assert read_image(tmp_path / "a.jpg").size == (8, 8) and not len(recwarn)


def test_good_pictures_read_exactly(tmp_path: Path) -> None:
    for data in (PNG, WEBP):
        (tmp_path / "a").write_bytes(data)
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a")), PIXELS)


def test_list_images(tmp_path: Path) -> None:
    for name in (
        "b.PNG",
        "a.jpg",
        "sub/c.webp",
        "sub/d.jpeg",
        "sub/e.jxl",
        "notes.txt",
        ".hidden.png",
        ".git/e.png",
        "f.png.part",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    assert [str(f.relative_to(tmp_path)) for f in list_images(tmp_path)] == [
        "a.jpg",
        "b.PNG",
        "sub/c.webp",
        "sub/d.jpeg",
        "sub/e.jxl",
    ]
    with pytest.raises(InputError, match="cannot be listed"):
        list_images(tmp_path / "nothing")


@pytest.fixture
def jxl() -> Callable[..., bytes]:
    """A way to write JPEG XL, where Pillow's plugin is installed."""
    pytest.importorskip("pillow_jxl")
    return functools.partial(saved, "JXL")


def test_jpeg_xl_reads_exactly_and_whole_or_not_at_all(tmp_path: Path, jxl: Callable[..., bytes]) -> None:
    file = tmp_path / "a.jxl"
    for options in ({}, {"exif": Image.Exif().tobytes()}):
        data = jxl(lossless=True, effort=1, **options)
        file.write_bytes(data)
        np.testing.assert_array_equal(np.asarray(read_image(file)), PIXELS)
        assert data.startswith(JXL_BOX) == bool(options)
        for cut in (*range(20), len(data) // 2, len(data) - 1):
            file.write_bytes(data[:cut])
            with pytest.raises(InputError) as caught:
                read_image(file)
            assert len(str(caught.value)) < len(str(file)) + 60, "and not the plugin's page on building libraries"
    file.write_bytes(data + b"\0\0\1\0Exif1234")  # a last box cut off, which libjxl lets pass
    with pytest.raises(InputError, match="is truncated"):
        read_image(file)


JXL_SIZES = [(1, 1), (264, 256), (1, 2000), (2000, 1), (9000, 2)]
JXL_RATIOS = [(256, 256), (240, 200), (128, 96), (150, 100), (480, 270), (80, 64), (62, 31)]  # 1 to 7 of the standard


@pytest.mark.parametrize("size", JXL_SIZES + JXL_RATIOS)
def test_jpeg_xl_sizes(
    tmp_path: Path, jxl: Callable[..., bytes], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size that is checked before decoding is the size that comes out, however it is written down."""
    (tmp_path / "a.jxl").write_bytes(jxl(Image.new("RGB", size), lossless=True, effort=1, num_threads=0))
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(images, "_check_size", lambda *found: seen.append(found))
    assert read_image(tmp_path / "a.jxl").size == size
    assert seen == [size, size]


def test_jpeg_xl_is_turned_once(tmp_path: Path, jxl: Callable[..., bytes]) -> None:
    """libjxl turns what it decodes; only a JPEG packed into JPEG XL comes out as it was."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    source = Image.new("RGB", (32, 16))
    (tmp_path / "a.jxl").write_bytes(jxl(source, exif=exif.tobytes()))
    assert read_image(tmp_path / "a.jxl").size == (32, 16)
    source.save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as turned:
        (tmp_path / "b.jxl").write_bytes(jxl(turned, lossless_jpeg=True))
    assert read_image(tmp_path / "b.jxl").size == read_image(tmp_path / "a.jpg").size == (16, 32)


def test_jpeg_xl_without_its_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl.JpegXLImagePlugin", None)
    (tmp_path / "a.jxl").write_bytes(jxl_header(8, 8, 1))
    with pytest.raises(InputError, match="pip install pillow-jxl-plugin"):
        read_image(tmp_path / "a.jxl")


def test_noise_is_refused_or_read(tmp_path: Path) -> None:
    rng = random.Random(0)
    kinds = [PNG, JPEG, WEBP, TEXT_BOMB]
    if find_spec("pillow_jxl"):
        import pillow_jxl  # noqa: F401

        kinds += [saved("JXL", lossless=True, effort=1)]
    file = tmp_path / "a.png"
    read = 0
    for i in range(1500):
        data = bytearray(rng.choice(kinds))
        for _ in range(rng.choice([0, 1, 3, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        file.write_bytes(bytes(data))
        try:
            read_image(file)
            read += 1
        except InputError as error:
            assert "\n" not in str(error), i
    assert read > 20
