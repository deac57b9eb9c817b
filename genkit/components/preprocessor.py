"""How pictures are resized, cropped and normalised for CLIP, from preprocessor_config.json or processor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.components.rules import (
    ANYTHING,
    FLAG,
    TEXT,
    Key,
    Rule,
    check_config,
    choice,
    either,
    many,
    real,
    whole,
)
from genkit.errors import InputError, shown
from genkit.files import place, read_json

_SIDE = whole(1, 8192)


def _sides(*names: str) -> Rule:
    """An object with these keys, each a number of pixels."""
    text = ", ".join(f'"{name}"' for name in names)
    return Rule(
        f"{{{text}}}", lambda v: isinstance(v, dict) and v.keys() == set(names) and all(map(_SIDE.holds, v.values()))
    )


_EXACT = _sides("height", "width")

KEYS = {
    "size": Key(either(_SIDE, _sides("shortest_edge"), _EXACT), {"shortest_edge": 224}),
    "crop_size": Key(either(_SIDE, _EXACT), {"height": 224, "width": 224}),
    "do_center_crop": Key(FLAG, True),
    "resample": Key(choice(2, 3), 3),  # PIL's bilinear (SigLIP 2) and bicubic
    "use_square_size": Key(FLAG, False),
    "image_mean": Key(many(real(-10, 10), 3, 3), [0.48145466, 0.4578275, 0.40821073]),
    "image_std": Key(many(real(0, 10, above=True), 3, 3), [0.26862954, 0.26130258, 0.27577711]),
}
# By class of network: SigLIP's pictures are squeezed into a square.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "CLIPModel": {},
    "SiglipModel": {
        "size": {"height": 224, "width": 224}, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    },
}  # fmt: skip
_UNUSED = {
    "do_resize": choice(True),
    "do_normalize": choice(True),
    "do_rescale": choice(True),
    "rescale_factor": real(1 / 255 - 1e-6, 1 / 255 + 1e-6),
    "do_convert_rgb": choice(True, False, None),
    **dict.fromkeys(("image_processor_type", "feature_extractor_type", "processor_class"), TEXT),
    **dict.fromkeys(
        ("_valid_processor_keys", "data_format", "device", "input_data_format", "return_tensors"), ANYTHING
    ),
}


def read_preprocessor(
    folder: Path, image_size: int, notes: list[str] | None = None, cls: str = "CLIPModel"
) -> dict[str, Any]:
    """Return size, crop_size, do_center_crop, resample, image_mean and image_std of a model of class `cls`.

    transformers 5 writes them into processor_config.json, under "image_processor". image_size: pixels a side that its
    network reads. Raises InputError for a key or value that the scorer does not support, and where the prepared picture
    has another size.
    """
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    content: Any = None
    if not path.exists() and whole.exists():
        path, content = whole, read_json(whole).get("image_processor")
        if not isinstance(content, dict):
            raise InputError(f"{place(path)}: image_processor: {shown(content)} is not an object")
    # As in transformers a null is the class's default
    stated = {k: v for k, v in (read_json(path) if content is None else content).items() if v is not None}
    config = check_config({**_DEFAULTS[cls], **stated}, KEYS, place(path), _UNUSED, notes)
    if config.pop("use_square_size"):
        side = config["size"].get("shortest_edge") if isinstance(config["size"], dict) else config["size"]
        config["size"] = {"height": side, "width": side} if side else config["size"]
    key = "crop_size" if config["do_center_crop"] else "size"
    side = config[key]
    if side != {"height": image_size, "width": image_size} and not (key == "crop_size" and side == image_size):
        raise InputError(f"{place(path)}: {key}: {shown(side)}, but config.json has image_size {image_size}")
    return config
