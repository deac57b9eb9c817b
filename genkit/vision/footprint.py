"""What a vision model of a run takes on a device, by the headers of its weights and its image processor."""

from __future__ import annotations

import math
from collections.abc import Mapping

from genkit.device.memory import Look
from genkit.vision.models import VisionInfo
from genkit.vision.preprocess import read_size

PATCH = 14  # widths a position of the first layer: residual, norm, attention, the wider layer between
STEM = (5, 400)  # where it is a convolution that steps by two: widths a position, and the least numbers
PIXELS = 6  # numbers a pixel: three of the picture as it is prepared, three as it is normalised
DEFORMABLE = 250  # numbers a pixel in Grounding DINO's encoder: sampled values of four levels, all at once


def looks(infos: Mapping[str, VisionInfo], dtype: str, device: str, largest: tuple[int, int]) -> dict[str, Look]:
    """Return what the models take that look at pictures of up to `largest` (width, height), by their names.

    dtype: "float32", "float16", "bfloat16", or "int8", with which they compute in the device's usual precision.
    """
    item = 4 if dtype == "float32" or (dtype == "int8" and device == "cpu") else 2
    width, height = largest
    return {name: Look(item * info.part.parameters, item * row(info, height, width)) for name, info in infos.items()}


def row(info: VisionInfo, height: int, width: int) -> int:
    """Return the numbers alive at the peak of looking at one picture of this size.

    An estimate from the first convolution, which makes positions of pixels: most of what is alive has their number.
    """
    down, across = read_size(height, width, info.processor)
    first = next((t.shape for t in info.part.tensors.values() if len(t.shape) == 4 and t.shape[1] == 3), (768, 3, 16))
    side = first[-1]
    step, each = (side, PATCH * first[0]) if side % 2 == 0 else (2, max(STEM[0] * first[0], STEM[1]))
    extra = DEFORMABLE * down * across if info.kind == "GroundingDinoForObjectDetection" else 0
    return math.ceil(down / step) * math.ceil(across / step) * each + PIXELS * down * across + extra
