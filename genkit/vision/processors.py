"""The image processors of classifiers, by the name of transformers' class.

The class is that of preprocessor_config.json; it does not follow from the network's class.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genkit.components.rules import FLAG, Key, optional, real
from genkit.errors import InputError, nearest, shown
from genkit.files import place
from genkit.vision.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Processor,
    processor_config,
    read_processor,
)

HALF = (0.5, 0.5, 0.5)
WARPED = 384  # pixels: from this size on, ConvNeXt's processor resizes to a square without cropping


def _square(side: int, resample: str, mean: tuple[float, ...], std: tuple[float, ...], crop: int = 0) -> Processor:
    return Processor({"height": side, "width": side}, resample, mean, std, crop=(crop, crop) if crop else None)


def _edge(side: int, resample: str, mean: tuple[float, ...], std: tuple[float, ...], crop: int = 0) -> Processor:
    return Processor({"shortest_edge": side}, resample, mean, std, crop=(crop, crop) if crop else None)


# By the name of transformers' class without its suffix; the defaults are those of transformers 5.23.
PROCESSORS: dict[str, Processor] = {
    "ViT": _square(224, "bilinear", HALF, HALF),
    "DeiT": _square(256, "bicubic", HALF, HALF, 224),
    "Beit": _square(224, "bicubic", HALF, HALF),
    "ConvNext": _edge(384, "bicubic", HALF, HALF),
    "Bit": _edge(224, "bicubic", CLIP_MEAN, CLIP_STD, 224),
    "CLIP": _edge(224, "bicubic", CLIP_MEAN, CLIP_STD, 224),
    "Siglip": _square(224, "bicubic", HALF, HALF),
    "Pvt": _square(224, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
    "Segformer": _square(512, "bilinear", IMAGENET_MEAN, IMAGENET_STD),
    "Levit": _edge(224, "bicubic", IMAGENET_MEAN, IMAGENET_STD, 224),
    "PoolFormer": _edge(224, "bicubic", IMAGENET_MEAN, IMAGENET_STD, 224),
    "MobileNetV1": _edge(256, "bilinear", HALF, HALF, 224),
    "MobileNetV2": _edge(256, "bilinear", HALF, HALF, 224),
    "MobileViT": dataclasses.replace(_edge(224, "bicubic", (0.0,) * 3, (1.0,) * 3, 256), bgr=True),
}
_ENDS = re.compile(r"(?:ImageProcessor|FeatureExtractor)(?:Fast|Pil)?$")
_SHARE = Key(optional(real(0, 1, above=True)), None)
_MORE: dict[str, dict[str, Key]] = {
    "ConvNext": {"crop_pct": _SHARE},
    "PoolFormer": {"crop_pct": _SHARE},
    "MobileViT": {"do_flip_channel_order": Key(optional(FLAG), None)},
}


def read_classifier_processor(folder: Path, default: Processor, notes: list[str]) -> Processor:
    """Return the image processor of a classifier. default: of its class, for a folder that names no processor.

    Raises InputError for a processor class that is not among PROCESSORS, and for a value that is not supported.
    """
    path, content = processor_config(folder)
    stated = next((v for key in ("image_processor_type", "feature_extractor_type") if (v := content.get(key))), None)
    if stated is None:
        name = next(n for n, processor in PROCESSORS.items() if processor is default)
    else:
        name = _ENDS.sub("", str(stated))
    if name not in PROCESSORS or (stated is not None and _ENDS.search(str(stated)) is None):
        known = [f"{n}ImageProcessor" for n in PROCESSORS]
        raise InputError(
            f"{place(path)}: image_processor_type: {shown(stated)} is none that genkit prepares pictures of "
            f"classifiers like{nearest(stated, known)}; there are {', '.join(known)}"
        )
    more: dict[str, Any] = {}
    found = read_processor(folder, PROCESSORS[name], notes, _MORE.get(name, {}), more)
    return _FINISH.get(name, _as_it_is)(found, more, place(path))


def _as_it_is(found: Processor, more: Mapping[str, Any], where: str) -> Processor:
    return found


def _convnext(found: Processor, more: Mapping[str, Any], where: str) -> Processor:
    """Below 384 pixels: resize to size / crop_pct and crop; from 384 on: resize to a square, without aspect ratio."""
    if found.size is None:
        return found
    side = found.size.get("shortest_edge")
    if side is None:
        raise InputError(f"{where}: size: {shown(dict(found.size))} has no shortest_edge, which ConvNeXt's needs")
    if side >= WARPED:
        return dataclasses.replace(found, size={"height": side, "width": side})
    return dataclasses.replace(
        found, size={"shortest_edge": int(side / (more["crop_pct"] or 0.875))}, crop=(side, side)
    )


def _poolformer(found: Processor, more: Mapping[str, Any], where: str) -> Processor:
    if found.size is None:
        return found
    sides = set(found.size.values())
    if len(sides) != 1:
        raise InputError(f"{where}: size: {shown(dict(found.size))} is not one edge, which PoolFormer's needs")
    return dataclasses.replace(found, size={"shortest_edge": int(sides.pop() / (more["crop_pct"] or 0.9))})


def _levit(found: Processor, more: Mapping[str, Any], where: str) -> Processor:
    side = (found.size or {}).get("shortest_edge")
    return found if side is None else dataclasses.replace(found, size={"shortest_edge": int((256 / 224) * side)})


def _mobilevit(found: Processor, more: Mapping[str, Any], where: str) -> Processor:
    """Levels from 0 to 1 in BGR order, not normalised."""
    plain = dataclasses.replace(found, mean=(0.0,) * 3, std=(1.0,) * 3)
    return plain if more["do_flip_channel_order"] is not False else dataclasses.replace(plain, bgr=False)


_FINISH: dict[str, Callable[[Processor, Mapping[str, Any], str], Processor]] = {
    "ConvNext": _convnext, "PoolFormer": _poolformer, "Levit": _levit, "MobileViT": _mobilevit,
}  # fmt: skip
