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
WAITING = 32 * 2  # pictures that wait prepared for a segmenter, and where they are put together
MAPS = 32  # pictures times texts that a segmenter decodes at once
DEFORMABLE = 250  # numbers a pixel in Grounding DINO's encoder: sampled values of four levels, all at once


def looks(infos: Mapping[str, VisionInfo], dtype: str, device: str, largest: tuple[int, int]) -> dict[str, Look]:
    """Return what the models take that look at pictures of up to `largest` (width, height), by their names.

    dtype: "float32", "float16", "bfloat16", or "int8", with which they compute in the device's usual precision.
    """
    item = 4 if dtype == "float32" or (dtype == "int8" and device == "cpu") else 2
    width, height = largest
    return {name: Look(item * info.part.parameters, item * row(info, height, width)) for name, info in infos.items()}


def mask_look(info: VisionInfo, texts: int) -> Look:
    """Return what a segmenter takes that looks for up to `texts` texts in a picture; it computes in float32."""
    down, across = read_size(352, 352, info.processor)
    positions, width = _positions(info, down, across)
    layers = (info.part.config.get("vision_config") or {}).get("num_hidden_layers", 12)
    read = len(info.part.config.get("extract_layers") or (3, 6, 9))
    wide = 2 * (info.part.config.get("decoder_intermediate_size") or 2048)  # before and behind its activation
    states = (layers + 1) * positions * width  # what every layer says of a picture is kept
    maps = min(texts, MAPS) * (positions * (read * width + wide) + 2 * down * across)
    picture = states + max(row(info, down, across), maps)
    return Look(4 * (info.part.parameters + WAITING * 3 * down * across), 4 * picture)


def row(info: VisionInfo, height: int, width: int) -> int:
    """Return the numbers alive at the peak of looking at one picture of this size.

    An estimate from the first convolution, which makes positions of pixels: most of what is alive has their number.
    """
    down, across = read_size(height, width, info.processor)
    side, wide = _first(info)
    if side % 2 == 0:
        each = PATCH * wide
    else:
        side, each = 2, max(STEM[0] * wide, STEM[1])
    extra = DEFORMABLE * down * across if info.kind == "GroundingDinoForObjectDetection" else 0
    return math.ceil(down / side) * math.ceil(across / side) * each + PIXELS * down * across + extra


def _first(info: VisionInfo) -> tuple[int, int]:
    """Return side and width of the first convolution."""
    shape = next((t.shape for t in info.part.tensors.values() if len(t.shape) == 4 and t.shape[1] == 3), (768, 3, 16))
    return shape[-1], shape[0]


def _positions(info: VisionInfo, down: int, across: int) -> tuple[int, int]:
    """Return how many patches, and the class, a picture has, and the width of each."""
    side, width = _first(info)
    return math.ceil(down / side) * math.ceil(across / side) + 1, width
