"""`genkit detect`: boxes of words in any pictures, as JSON lines and as drawings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.device.devices import check_device
from genkit.errors import EXIT_OK, EXIT_SOME_FAILED, InputError, shown
from genkit.files import local
from genkit.pictures.images import read_image
from genkit.progress import Progress, printable
from genkit.scoring.boxes import Box, check_word
from genkit.studies.score import check_out, output_of, pictures_at, written
from genkit.studies.senses import made_folder, names_of, read_ahead, write_png
from genkit.vision.models import inspect_vision
from genkit.vision.words import Lengths

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from genkit.vision.detector import Detector

BATCH = 8  # pictures of a batch; as many are read ahead
PALETTE = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#f032e6",
)  # a colour for each word


def detect_images(
    images: Path, words: Sequence[str], like: Path | None, detector: str, threshold: float | None, out: Path | None,
    draw: Path | None, device: str, dtype: str,
) -> int:  # fmt: skip
    """Write a JSON line for each picture: file, size, words, boxes. Returns the exit code.

    like: a picture of an object to look for, instead of words. threshold: of scores; None is the detector's own. draw:
    a folder for copies of the pictures with their boxes. A picture that cannot be read gets a line with its error.
    """
    if bool(words) == (like is not None):
        raise InputError("--words, --like: give one of them: what to look for, or a picture of it")
    for word in words:
        try:
            check_word(word)
        except InputError as error:
            raise InputError(f"--words: {error}") from None
    if len(set(words)) < len(words):
        raise InputError("--words: must be different")
    if threshold is not None and not 0 < threshold < 1:
        raise InputError(f"--threshold: {threshold:g} is not above 0 and below 1")
    files = pictures_at(images)
    check_device(device, dtype)
    check_out(out)
    _check_draw(draw, images)
    example = None if like is None else read_image(like)
    info = inspect_vision(detector, ("detector",), "--detector")
    Lengths(info).check(words)
    from genkit.vision.detector import Detector

    model = Detector.from_pretrained(info, device=device, dtype=dtype)
    for text in info.notes:
        print(printable(text), file=sys.stderr)
    least = threshold if threshold is not None else (model.threshold if like is None else 0.6)
    names = names_of(files, images)
    drawn = {} if draw is None else {f: draw / f"{name}.png" for f, name in zip(files, names, strict=True)}
    failed = 0
    with output_of(out) as write, Progress(len(files)) as progress:
        for part in read_ahead(files, read_levels, BATCH):
            failed += written(_batch(model, part, words, example, least, drawn), len(files), write, progress)
    return EXIT_SOME_FAILED if failed else EXIT_OK


def read_levels(file: Path) -> torch.Tensor | InputError:
    """Return a picture as uint8 (3, H, W), which takes less memory than one of Pillow, or the error of reading it."""
    from genkit.scoring.clip import as_tensor

    try:
        return as_tensor(read_image(file))[0]
    except InputError as error:
        return error


def _batch(
    model: Detector, part: Sequence[tuple[Path, torch.Tensor | InputError]], words: Sequence[str], example: Any,
    least: float, drawn: Mapping[Path, Path],
) -> list[tuple[Path, dict[str, Any]]]:  # fmt: skip
    """Return the record of each picture; those in `drawn` are also written there with their boxes."""
    import numpy as np

    found: dict[Path, dict[str, Any]] = {file: {"error": str(one)} for file, one in part if isinstance(one, InputError)}
    pictures = {file: one for file, one in part if not isinstance(one, InputError)}
    shots = list(pictures.values())
    boxes = model.detect(shots, words, least) if example is None else model.detect_like(shots, example, least)
    for (file, picture), some in zip(pictures.items(), boxes, strict=True):
        named = {"words": list(words)} if example is None else {}
        size = {"width": picture.shape[-1], "height": picture.shape[-2]}
        found[file] = {**size, **named, "threshold": least, "boxes": [box.to_json() for box in some]}
        if file in drawn:
            made_folder(drawn[file].parent)
            write_png(drawn[file], np.asarray(overlay(as_picture(picture), some, words or ["like"])))
    return [(file, found[file]) for file, _ in part]


def as_picture(levels: torch.Tensor) -> Image.Image:
    """Return uint8 (3, H, W) as a picture of Pillow."""
    from PIL import Image

    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def overlay(picture: Image.Image, boxes: Sequence[Box], words: Sequence[str]) -> Image.Image:
    """Return a copy of a picture with its boxes, one colour for each word, labelled with word and score."""
    from PIL import ImageDraw

    copy = picture.copy()
    pen = ImageDraw.Draw(copy)
    width = max(1, round(min(copy.size) / 200))
    for box in reversed(boxes):  # the best box on top
        color = PALETTE[list(words).index(box.label) % len(PALETTE)]
        pen.rectangle((box.x0, box.y0, max(box.x0, box.x1 - 1), max(box.y0, box.y1 - 1)), outline=color, width=width)
        text = f"{box.label} {box.score:.2f}".encode("latin-1", "replace").decode(
            "latin-1"
        )  # all that Pillow's built-in font has
        place = pen.textbbox((box.x0 + width + 1, box.y0 + width), text)
        pen.rectangle((place[0] - 1, place[1] - 1, place[2] + 1, place[3] + 1), fill=color)
        pen.text((box.x0 + width + 1, box.y0 + width), text, fill="white")
    return copy


def _check_draw(draw: Path | None, images: Path) -> None:
    """Raise InputError if the folder for drawings is a file, or is in the folder of the pictures."""
    if draw is None:
        return
    local(draw, "--draw")
    if draw.exists() and not draw.is_dir():
        raise InputError(f"--draw: {shown(str(draw))} is not a folder")
    home = images if images.is_dir() else images.parent
    if draw.resolve() == home.resolve() or home.resolve() in draw.resolve().parents:
        raise InputError(f"--draw: {shown(str(draw))} lies where the pictures are: name a folder elsewhere")
