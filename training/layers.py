"""The layers of a training picture: itself, and the conditioning beside it, which is scaled and cropped as it is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from genkit.datasets.config import Data
from genkit.datasets.example import Example
from genkit.errors import InputError, nearest, shown
from genkit.pictures.edges import COMPUTED

if TYPE_CHECKING:
    from PIL import Image

BLACK = (0, 0, 0)


def check_conditioning(data: Data, examples: Sequence[Example]) -> None:
    """Raise InputError for a picture without conditioning beside it, where a ControlNet reads that."""
    name = data.beside
    without = [e for e in examples if name is not None and e.conditioning is None]
    if without:
        near = nearest(str(name), (*COMPUTED, *without[0].fields))
        raise InputError(
            f"data.conditioning: {shown(name)}: {len(without)} of {len(examples)} pictures have no such picture beside "
            f"them, as {without[0].key}{near}; {' or '.join(COMPUTED)} is computed"
        )


def read_beside(conditioning: Example, size: tuple[int, int]) -> Image.Image:
    """Return a picture's conditioning in RGB, on black where it is transparent, as large as the picture."""
    from PIL import Image

    found = conditioning.read()
    found = pasted(found, found.size, (0, 0), BLACK)
    return found if found.size == size else found.resize(size, Image.Resampling.LANCZOS)


def pasted(picture: Image.Image, size: tuple[int, int], at: tuple[int, int], colour: tuple[int, ...]) -> Image.Image:
    """Return a picture scaled to `size`, at a place on a ground as large as it was."""
    from PIL import Image

    ground = Image.new("RGB", picture.size, colour)
    small = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
    ground.paste(small, at, small if picture.mode == "RGBA" else None)
    return ground


def fitted(
    layers: list[Image.Image], shape: tuple[int, int], crop: Literal["center", "random"], flip: float,
    rng: random.Random,
) -> tuple[list[Image.Image], tuple[int, ...]]:  # fmt: skip
    """Return the layers scaled, cropped to `shape` and perhaps mirrored, in RGB, and SDXL's sizes."""
    from PIL import Image

    picture = layers[0]
    original = picture.height, picture.width
    scale = max(shape[0] / picture.width, shape[1] / picture.height)
    width, height = max(shape[0], round(picture.width * scale)), max(shape[1], round(picture.height * scale))
    if (width, height) != picture.size:
        layers = [layer.resize((width, height), Image.Resampling.LANCZOS) for layer in layers]
    spare = width - shape[0], height - shape[1]
    left, top = (rng.randint(0, s) for s in spare) if crop == "random" else (s // 2 for s in spare)
    layers = [layer.crop((left, top, left + shape[0], top + shape[1])) for layer in layers]
    if rng.random() < flip:
        layers = [layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for layer in layers]
        left = spare[0] - left
    return [layer.convert("RGB") for layer in layers], (*original, top, left, shape[1], shape[0])
