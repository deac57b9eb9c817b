"""One reader for a picture, from wherever it comes: path, bytes, PIL image or array, in every mode; and for masks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genkit import ClipScorer, InputError, Request
from genkit.pictures.images import list_files, read_image, read_mask


def half(mode: str = "RGB") -> Image.Image:
    """Return a picture whose left third is yellow on blue, in a mode."""
    picture = Image.new("RGB", (12, 8), "blue")
    picture.paste("yellow", (0, 0, 4, 8))
    if mode == "I;16":
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        return Image.fromarray(grey)
    return picture.convert(mode)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def ways(picture: Image.Image, folder: Path, kind: str, **save: Any) -> dict[str, Any]:
    """Return the picture as it may come: as a path, as text, as bytes, and as a PIL image of the file."""
    path = folder / f"a.{kind}"
    picture.save(path, **save)
    return {"path": path, "text": str(path), "bytes": path.read_bytes(), "object": Image.open(path)}


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "I;16", "CMYK"])
def test_every_mode_is_the_same_from_everywhere(mode: str, tmp_path: Path) -> None:
    kind = "jpg" if mode == "CMYK" else "png"
    found = {name: np.asarray(read_image(way)) for name, way in ways(half(mode), tmp_path, kind).items()}
    for name, pixels in found.items():
        assert pixels.shape == (8, 12, 3) and np.array_equal(pixels, found["path"]), name
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(found["path"], np.asarray(half()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_phone_is_held_in_any_way(orientation: int, tmp_path: Path) -> None:
    from PIL import ImageOps

    found = ways(half(), tmp_path, "png", exif=exif(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    for name, way in found.items():
        once = read_image(way)
        assert np.array_equal(np.asarray(once), upright), name
        assert np.array_equal(np.asarray(read_image(once)), upright), "and is not turned a second time"


@pytest.mark.parametrize("transparent", ["RGBA", "LA", "P"])
def test_transparency_is_on_white(transparent: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (6, 6), (200, 20, 20, 0))
    if transparent == "P":
        picture = Image.new("P", (6, 6), 3)
        picture.putpalette([0, 0, 0] * 256)
        found = ways(picture, tmp_path, "png", transparency=3)
    else:
        found = ways(picture.convert(transparent), tmp_path, "png")
    for name, way in found.items():
        assert np.asarray(read_image(way)).min() == 255, name


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((4, 5), 7, np.uint8), 7),
        (np.full((4, 5, 1), 7, np.uint8), 7),
        (np.full((4, 5, 3), 7, np.uint8), 7),
        (np.full((4, 5, 3), 0.5, np.float32), 128),
        (np.full((4, 5, 3), 1.0), 255),
        (np.full((4, 5), 65535, np.uint16), 255),
    ],
)
def test_arrays(array: np.ndarray, expected: int) -> None:
    found = np.asarray(read_image(array))
    assert found.shape == (4, 5, 3) and set(found.flatten()) == {expected}
    request = Request(prompt="a", image=array)
    assert np.array_equal(np.asarray(read_image(request.image)), found)


@pytest.mark.parametrize(
    "array",
    [np.full((3, 4, 5), 7, np.uint8), np.full((4, 5, 3), 2.0), np.zeros((4, 5, 3), np.int64), np.zeros(3, np.uint8)],
)
def test_arrays_that_are_no_picture(array: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"the picture: is an array .* of \w+; a picture has rows, columns and"):
        read_image(array)


def test_bytes_that_are_no_picture() -> None:
    for data in (b"", b"no picture", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(InputError, match="the picture: "):
            read_image(data)


def masks() -> dict[str, Image.Image]:
    """Return the same mask, its right half to be drawn anew, as paint programs save it."""
    plain = Image.new("L", (8, 8), 0)
    plain.paste(255, (4, 0, 8, 8))
    strokes = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    strokes.paste((255, 255, 255, 255), (4, 0, 8, 8))
    hidden = Image.new("RGBA", (8, 8), (255, 255, 255, 0))  # white under the transparency, as after the eraser
    hidden.paste((255, 255, 255, 255), (4, 0, 8, 8))
    covered = Image.merge("RGBA", (*plain.convert("RGB").split(), Image.new("L", (8, 8), 255)))
    palette = plain.convert("P")
    return {
        "L": plain, "RGB": plain.convert("RGB"), "1": plain.convert("1"), "P": palette, "RGBA, white strokes": strokes,
        "RGBA, erased": hidden, "RGBA, opaque": covered, "LA": strokes.convert("LA"),
    }  # fmt: skip


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("way", ["path", "object", "bytes"])
def test_a_mask_is_what_is_painted_white(name: str, way: str, tmp_path: Path) -> None:
    found = read_mask(ways(masks()[name], tmp_path, "png")[way])
    assert found.mode == "L" and np.array_equal(np.asarray(found), np.asarray(masks()["L"]))


def test_a_mask_of_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    mask = Image.new("P", (8, 8), 0)
    mask.putpalette([255, 255, 255, 255, 255, 255])  # colour 0, white as well, is the transparent one
    mask.paste(1, (4, 0, 8, 8))
    for way in ways(mask, tmp_path, "png", transparency=0).values():
        assert np.array_equal(np.asarray(read_mask(way)), np.asarray(masks()["L"]))


def test_a_mask_painted_in_black_is_refused_before_anything_loads(tmp_path: Path) -> None:
    from genkit.rows.prompts import read_prompts

    mask = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    mask.paste((0, 0, 0, 255), (4, 0, 8, 8))
    mask.save(tmp_path / "mask.png")
    half().save(tmp_path / "in.png")
    with pytest.raises(InputError, match=r"mask.png: is painted in black on transparency: paint in white"):
        read_mask(tmp_path / "mask.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "image": "in.png", "mask_image": "mask.png"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:1: mask_image: .*painted in black"):
        read_prompts(rows)
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    assert not read_mask(tmp_path / "black.png").getbbox(), "a mask that keeps everything says so without transparency"


def test_scores_do_not_depend_on_how_a_picture_comes(tmp_path: Path) -> None:
    scorer = ClipScorer.from_pretrained("emoji-clip", device="cpu")
    for save in ({"exif": exif(6)}, {}):
        picture = half("RGB" if save else "RGBA")
        found = [scorer.score([way], "a fox")[0] for way in ways(picture, tmp_path, "png", **save).values()]
        assert max(found) - min(found) < 1e-6


def test_files_are_in_the_order_in_which_people_count(tmp_path: Path) -> None:
    names = ["1.png", "2.png", "10.png", "a2/3.png", "a10/1.png", "b1c2.png", "b1c10.png", "b1d1.png"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.relative_to(tmp_path).as_posix() for p in list_files(tmp_path)] == names


def test_a_stream_of_bytes_is_no_file_name() -> None:
    data = io.BytesIO()
    half().save(data, "PNG")
    assert Request(prompt="a", image=data.getvalue()).image.size == (12, 8)
