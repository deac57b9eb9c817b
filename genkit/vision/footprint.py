"""Estimate the device memory of a vision model from the headers of its weights and its image processor."""

from __future__ import annotations

import math
from collections.abc import Mapping

from genkit.device.memory import Look
from genkit.vision.models import VisionInfo
from genkit.vision.preprocess import read_size

# Numbers that are in memory at the peak of a forward pass, for each position of the first convolution's output:
PATCH = 14  # times its channels, for a ViT: residual stream, norm, attention and MLP
STEM = (5, 400)  # times its channels, and at least so many, for a convolutional network (stride 2)
PIXELS = 6  # numbers for each pixel: the prepared and the normalised picture
WAITING = 32 * 2  # prepared pictures in the queue of a segmenter, and the batch that they are copied into
MAPS = 32  # (picture, text) pairs that a segmenter decodes at once
DEFORMABLE = 250  # numbers for each pixel in Grounding DINO's encoder: values sampled at four feature levels


def looks(infos: Mapping[str, VisionInfo], dtype: str, device: str, largest: tuple[int, int]) -> dict[str, Look]:
    """Return the memory of each model for pictures of up to `largest` (width, height), by its name.

    dtype: "float32", "float16", "bfloat16", or "int8", for which they use the device's usual precision.
    """
    item = 4 if dtype == "float32" or (dtype == "int8" and device == "cpu") else 2
    width, height = largest
    return {name: Look(item * info.part.parameters, item * row(info, height, width)) for name, info in infos.items()}


def mask_look(info: VisionInfo, texts: int) -> Look:
    """Return the memory of a segmenter that looks for up to `texts` texts in a picture; it computes in float32."""
    down, across = read_size(352, 352, info.processor)
    positions, width = _positions(info, down, across)
    layers = (info.part.config.get("vision_config") or {}).get("num_hidden_layers", 12)
    read = len(info.part.config.get("extract_layers") or (3, 6, 9))
    wide = 2 * (info.part.config.get("decoder_intermediate_size") or 2048)  # the MLP before and after its activation
    states = (layers + 1) * positions * width  # the hidden states of all layers are kept
    maps = min(texts, MAPS) * (positions * (read * width + wide) + 2 * down * across)
    picture = states + max(row(info, down, across), maps)
    return Look(4 * (info.part.parameters + WAITING * 3 * down * across), 4 * picture)


def row(info: VisionInfo, height: int, width: int) -> int:
    """Return an estimate of the numbers in memory at the peak of the forward pass of one picture of this size.

    It is proportional to the positions of the first convolution's output, as most activations are.
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
    """Return the kernel size and the output channels of the first convolution."""
    shape = next((t.shape for t in info.part.tensors.values() if len(t.shape) == 4 and t.shape[1] == 3), (768, 3, 16))
    return shape[-1], shape[0]


def _positions(info: VisionInfo, down: int, across: int) -> tuple[int, int]:
    """Return the number of a picture's tokens, patches and the class token, and their width."""
    side, width = _first(info)
    return math.ceil(down / side) * math.ceil(across / side) + 1, width
