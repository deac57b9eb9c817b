"""The image processors of transformers as tensor code on the device: resize, crop, rescale, normalise.

Resizing gives Pillow's result bit for bit: two passes with 22-bit fixed-point weights, each rounded to 8 bits
(Resample.c). On a CPU Pillow itself does it, four times as fast. OWLv2 differs: its pictures are padded to a square,
blurred and resampled as scipy.ndimage does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.components.rules import ANYTHING, FLAG, TEXT, Key, Rule, check_config, either, many, optional, real, whole
from genkit.errors import InputError, shown
from genkit.files import place, read_json

if TYPE_CHECKING:
    import torch

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BITS = 22  # fractional bits of Pillow's fixed-point weights
RESAMPLES = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclasses.dataclass(frozen=True)
class Processor:
    """The settings of an image processor: resize, centre crop, rescale, normalise.

    size: {"height", "width"}, {"shortest_edge"} or {"shortest_edge", "longest_edge"}, in pixels; None does not resize.
    crop: (height, width) or None. scale: factor for levels 0 to 255. square: pad to a square with black at the right
    and bottom, then resize as scipy does (OWLv2). bgr: BGR channel order (MobileViT). multiple: sides are rounded to
    multiples of it, with the picture's aspect ratio if keep_ratio is set (DPT). pad: zero-pad all sides to multiples of
    it, after normalisation. rounded: round the crop's offset to the nearest pixel (timm) instead of down. mirrored:
    reflection padding; corners: align_corners, on floats (both ZoeDepth). floor: round sides down to multiples of it
    (GLPN).
    """

    size: Mapping[str, int] | None
    resample: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    crop: tuple[int, int] | None = None
    square: bool = False
    bgr: bool = False
    multiple: float | None = None
    keep_ratio: bool = False
    pad: int | None = None
    rounded: bool = False
    mirrored: bool = False
    corners: bool = False
    floor: int | None = None


_SIDE = whole(1, 8192)
_SIZES = Rule(
    "a number of pixels, [height, width], or an object of height and width or of shortest_edge and longest_edge",
    lambda v: (
        _SIDE.holds(v)
        or (isinstance(v, list) and len(v) == 2 and all(map(_SIDE.holds, v)))
        or (
            isinstance(v, dict)
            and v.keys() in ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"})
            and all(map(_SIDE.holds, v.values()))
        )
    ),
)
_KEYS = {
    "size": Key(optional(_SIZES), None),
    "max_size": Key(optional(_SIDE), None),
    "crop_size": Key(optional(_SIZES), None),
    "resample": Key(Rule("1, 2 or 3 (lanczos, bilinear, bicubic)", lambda v: type(v) is int and v in RESAMPLES), None),
    "rescale_factor": Key(optional(real(0, 1, above=True)), None),
    "image_mean": Key(optional(many(real(-10, 10), 3, 3)), None),
    "image_std": Key(optional(many(real(0, 10, above=True), 3, 3)), None),
    "pad_size": Key(Rule("null: pictures of one size", lambda v: v is None), None),
    **{name: Key(optional(FLAG), None) for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")},
    "do_pad": Key(optional(FLAG), None),
    "rescale": Key(optional(either(FLAG, real(0, 1))), None),
}
_DPT_KEYS = {
    **{name: Key(optional(whole(1, 1024)), None) for name in ("ensure_multiple_of", "size_divisor")},
    "keep_aspect_ratio": Key(optional(FLAG), None),
    **{
        name: Key(optional(many(real(-1000, 1000), 3, 3)), None) for name in ("image_mean", "image_std")
    },  # in units of levels 0 to 255
}
_FLOOR_KEYS = {"size_divisor": Key(optional(whole(1, 1024)), None)}
_UNUSED = {
    **dict.fromkeys(("image_processor_type", "feature_extractor_type", "processor_class", "format"), TEXT),
    **dict.fromkeys(("do_convert_rgb", "do_convert_annotations", "pad_and_return_pixel_mask"), ANYTHING),
    **dict.fromkeys(
        ("_valid_processor_keys", "data_format", "device", "input_data_format", "return_tensors"), ANYTHING
    ),
    **dict.fromkeys(("default_to_square", "disable_grouping", "return_segmentation_masks", "masks_path"), ANYTHING),
    **dict.fromkeys(("image_seq_length", "do_reduce_labels"), ANYTHING),
}


def processor_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the path and content of preprocessor_config.json, or of processor_config.json; {} if both are absent."""
    path, together = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.exists():
        return path, read_json(path)
    if not together.exists():
        return path, {}
    content = read_json(together).get("image_processor")
    if not isinstance(content, dict):
        raise InputError(f"{place(together)}: image_processor: {shown(content)} is not an object")
    return together, content


def read_processor(
    folder: Path, default: Processor, notes: list[str] | None = None, more: Mapping[str, Key] | None = None,
    found_more: dict[str, Any] | None = None,
) -> Processor:  # fmt: skip
    """Return the image processor of preprocessor_config.json or processor_config.json; absent keys are `default`'s.

    more: further keys, which this class of processor has; their values are put into `found_more`. Raises InputError
    for a value that is not supported.
    """
    path, content = processor_config(folder)
    if not path.exists() and notes is not None:
        notes.append(f"{place(path)}: is absent: pictures are prepared as transformers does it by default")
    stated = {key: value for key, value in content.items() if value is not None}
    own = _DPT_KEYS if default.multiple is not None else _FLOOR_KEYS if default.floor is not None else {}
    keys = {**_KEYS, **own, **(more or {})}
    found = check_config(stated, keys, place(path), _UNUSED, notes)
    if found_more is not None:
        found_more |= {name: found[name] for name in more or ()}
    if default.square and found["do_pad"] is False:
        raise InputError(f"{place(path)}: do_pad: false: OWLv2 reads squares, and boxes would lie elsewhere")
    size = default.size if found["size"] is None else _size(found["size"], found["max_size"], default)
    crop = None
    if default.crop is not None if found["do_center_crop"] is None else found["do_center_crop"]:
        stated_crop = found["crop_size"] or (list(default.crop) if default.crop else size)
        side = _size(stated_crop, None, dataclasses.replace(default, size={"height": 1, "width": 1}))
        crop = side.get("height", 0), side.get("width", 0)
        if 0 in crop:
            raise InputError(f"{place(path)}: crop_size: {shown(found['crop_size'])} is not a height and a width")
    normal, scaled = found["do_normalize"] is not False, found["do_rescale"] is not False
    if default.floor is not None:  # GLPN's processor normalises only if told to, and always resizes
        normal, size = bool(found["do_normalize"]), None
    return Processor(
        size=None if found["do_resize"] is False else size,
        resample=default.resample if found["resample"] is None else RESAMPLES[found["resample"]],
        mean=tuple(found["image_mean"] or default.mean) if normal else (0.0, 0.0, 0.0),
        std=tuple(found["image_std"] or default.std) if normal else (1.0, 1.0, 1.0),
        scale=(found["rescale_factor"] or default.scale) if scaled else 1.0,
        crop=crop, square=default.square, bgr=default.bgr,
        **({} if default.multiple is None else _dpt(found, size, default, place(path))),
        floor=default.floor and (found["size_divisor"] or default.floor),
    )  # fmt: skip


def _dpt(
    found: Mapping[str, Any], size: Mapping[str, int] | None, default: Processor, where: str
) -> dict[str, Any]:  # fmt: skip
    """Return the settings that only DPT and ZoeDepth have. Raises InputError for values that are not supported."""
    if found["do_center_crop"] or (size is not None and "height" not in size):
        raise InputError(f"{where}: size: depth is read of pictures of a height and width, which are not cropped")
    if found["image_std"] and 0 in found["image_std"]:
        raise InputError(f"{where}: image_std: {shown(found['image_std'])} holds a 0")
    if default.mirrored and RESAMPLES.get(found["resample"]) == "lanczos":
        raise InputError(f"{where}: resample: 1 is not 2 or 3 (bilinear, bicubic), which ZoeDepth's processor knows")
    keep = found["keep_aspect_ratio"]
    return {
        "multiple": found["ensure_multiple_of"] or default.multiple,
        "keep_ratio": default.keep_ratio if keep is None else bool(keep),
        "pad": found["size_divisor"] if found["do_pad"] and not default.mirrored else None,
        "mirrored": default.mirrored and found["do_pad"] is not False,
        "corners": default.corners,
    }


def _size(stated: Any, most: int | None, default: Processor) -> dict[str, int]:
    """Return a size as an object; a single number is a square if the default size has a height, else shortest_edge."""
    if isinstance(stated, dict):
        return {**stated, **({"longest_edge": most} if most and "shortest_edge" in stated else {})}
    if isinstance(stated, list):
        return {"height": stated[0], "width": stated[1]}
    if "height" in (default.size or {}):
        return {"height": stated, "width": stated}
    longest = most or (default.size or {}).get("longest_edge")
    return {"shortest_edge": stated, **({"longest_edge": longest} if longest else {})}


def target_size(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """Return the (height, width) that a picture is resized to, rounded as in transformers."""
    if "height" in size:
        return size["height"], size["width"]
    short, long = min(height, width), max(height, width)
    edge: float = size["shortest_edge"]
    raw = edge
    if "longest_edge" in size and long / short * edge > size["longest_edge"]:
        raw = size["longest_edge"] * short / long
        edge = round(raw)
    edge = int(edge)
    if short == edge:
        return height, width
    return (int(raw * height / width), edge) if width < height else (edge, int(raw * width / height))


def fitted_size(height: int, width: int, processor: Processor) -> tuple[int, int]:
    """Return the (height, width) of DPT's processor for a picture; 0 if a side is too short for `multiple`."""
    assert processor.size is not None
    scales = [processor.size["height"] / height, processor.size["width"] / width]
    if processor.keep_ratio:  # the scale that is closer to 1
        scales = [scales[1]] * 2 if abs(1 - scales[1]) < abs(1 - scales[0]) else [scales[0]] * 2
    multiple = processor.multiple or 1
    down, across = (
        int(round(scale * side / multiple) * multiple) for scale, side in zip(scales, (height, width), strict=True)
    )
    return down, across


def mirrored_edge(side: int) -> int:
    """Return the pixels of ZoeDepth's reflection padding at either end of a side."""
    return int(math.sqrt(side / 2) * 3)


def read_size(height: int, width: int, processor: Processor) -> tuple[int, int]:
    """Return the (height, width) of a prepared picture."""
    if processor.mirrored:
        height, width = (side + 2 * mirrored_edge(side) for side in (height, width))
    if processor.floor is not None:
        height, width = (side // processor.floor * processor.floor for side in (height, width))
    if processor.size is not None and processor.multiple is not None:
        height, width = fitted_size(height, width, processor)
    elif processor.size is not None:
        height, width = target_size(height, width, processor.size)
    if processor.crop is not None:
        height, width = processor.crop
    pad = processor.pad or 1
    return math.ceil(height / pad) * pad, math.ceil(width / pad) * pad


def prepare(pictures: torch.Tensor, processor: Processor) -> torch.Tensor:
    """Return uint8 pictures (B, 3, H, W) resized, cropped and normalised: (B, 3, h, w) float32, on their device.

    Equal to the processor of transformers to 1e-4.
    """
    import torch

    height, width = pictures.shape[-2:]
    if processor.square:
        home = pictures.cpu() if pictures.device.type == "mps" else pictures  # MPS has no float64
        x = _resize_square(home.double() * processor.scale, processor)
    elif processor.corners:
        x = _resize_corners(pictures.float() * processor.scale, processor)
    else:
        x = pictures
        if processor.size is not None or processor.floor is not None:
            plain = dataclasses.replace(processor, crop=None, pad=None)
            x = (_by_pillow if x.device.type == "cpu" else _by_torch)(
                x, read_size(height, width, plain), processor.resample
            )
        if processor.crop is not None:
            x = _cropped(x, processor.crop, processor.rounded)
        x = x.float().mul_(processor.scale)
    x = (x.flip(1) if processor.bgr else x).float().to(pictures.device)
    mean, std = (
        torch.tensor(v, dtype=x.dtype, device=x.device).view(1, 3, 1, 1) for v in (processor.mean, processor.std)
    )
    x = x.sub_(mean).div_(std).contiguous()
    if processor.pad is None:
        return x
    down, across = (-side % processor.pad for side in x.shape[-2:])
    return torch.nn.functional.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))


def _cropped(x: torch.Tensor, size: tuple[int, int], rounded: bool) -> torch.Tensor:
    """Return the centre (h, w) of pictures (B, 3, H, W); smaller ones are padded with black, as transformers does."""
    import torch

    lack = [max(0, b - a) for a, b in zip(x.shape[-2:], size, strict=True)]
    if any(lack):
        (above, below), (before, behind) = (((n + 1) // 2, n // 2) for n in lack)
        x = torch.nn.functional.pad(x, (before, behind, above, below))
    beside = [a - b for a, b in zip(x.shape[-2:], size, strict=True)]
    top, left = (round(n / 2) if rounded else n // 2 for n in beside)
    return x[..., top : top + size[0], left : left + size[1]]


def _by_torch(x: torch.Tensor, size: tuple[int, int], resample: str) -> torch.Tensor:
    return resize(x.int(), size, resample)


def _by_pillow(x: torch.Tensor, size: tuple[int, int], resample: str) -> torch.Tensor:
    """Return uint8 pictures (B, 3, H, W) on the CPU resized to (h, w), uint8."""
    import torch
    from PIL import Image

    code = next(number for number, name in RESAMPLES.items() if name == resample)
    found = torch.empty(len(x), 3, *size, dtype=torch.uint8)
    for picture, place_of in zip(x, found, strict=True):  # channels-last pictures, as they are read, are not copied
        resized = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).resize(size[::-1], code)
        place_of.copy_(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    return found


def resize(x: torch.Tensor, size: tuple[int, int], resample: str) -> torch.Tensor:
    """Return levels (..., H, W) int32 resized to (h, w), with the result of Pillow's `resize`."""
    before = int(x.shape[-2]), int(x.shape[-1])
    return _passes(x, size, resample, _rows_first(before, size, resample))


def _passes(x: torch.Tensor, size: tuple[int, int], resample: str, rows_first: bool) -> torch.Tensor:
    import torch

    for axis in (-1, -2) if rows_first else (-2, -1):
        before, after = x.shape[axis], size[axis]
        if before == after:
            continue
        places, weights = (torch.from_numpy(found).to(x.device) for found in _pil_weights(before, after, resample))
        x = x.mT.contiguous() if axis == -1 else x  # adding contiguous rows is much faster than gathering pixels
        total = torch.full((*x.shape[:-2], after, x.shape[-1]), 2 ** (BITS - 1), dtype=torch.int32, device=x.device)
        for taken, weight in zip(places, weights, strict=True):
            total += x.index_select(-2, taken).mul_(weight[:, None])
        x = (total >> BITS).clamp_(0, 255)
        x = x.mT if axis == -1 else x
    return x


@functools.lru_cache(64)
def _rows_first(before: tuple[int, int], after: tuple[int, int], resample: str) -> bool:
    """Return whether Pillow resizes horizontally first, as it always did before version 13.

    The order of the two passes changes the rounding. Version 13 chooses it by the sizes, by rules of its own, so both
    orders are compared with its result for noise of this size.
    """
    import torch
    from PIL import Image

    if before[0] == after[0] or before[1] == after[1]:
        return True
    noise = np.random.default_rng(0).integers(0, 256, before, dtype=np.uint8)
    code = next(number for number, name in RESAMPLES.items() if name == resample)
    wanted = torch.from_numpy(np.array(Image.fromarray(noise).resize(after[::-1], code)))
    x = torch.from_numpy(noise).int()
    far = [float((_passes(x, after, resample, first) - wanted).abs().sum()) for first in (True, False)]
    return far[0] <= far[1]


def _resize_square(x: torch.Tensor, processor: Processor) -> torch.Tensor:
    import torch

    height, width = x.shape[-2:]
    side = max(height, width)
    x = torch.nn.functional.pad(x, (0, side - width, 0, side - height))
    if processor.size is None:
        return x
    low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
    down, across = (_on_device(_scipy_weights(side, processor.size[k]), x.device) for k in ("height", "width"))
    return (down @ x @ across.T).minimum(high).maximum(low)


def _resize_corners(x: torch.Tensor, processor: Processor) -> torch.Tensor:
    import torch

    height, width = x.shape[-2:]
    if processor.mirrored:
        down, across = mirrored_edge(height), mirrored_edge(width)
        x = torch.nn.functional.pad(x, (across, across, down, down), mode="reflect")
    if processor.size is None:
        return x
    size = fitted_size(x.shape[-2], x.shape[-1], processor)
    return torch.nn.functional.interpolate(x, size=size, mode=processor.resample, align_corners=True)


def _on_device(weights: np.ndarray, device: torch.device) -> torch.Tensor:
    import torch

    return torch.from_numpy(weights).to(device)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Return the cubic convolution kernel of Keys with a = -0.5."""
    x = abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))


FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {  # kernel, and half of its width
    "bilinear": (lambda x: np.maximum(0.0, 1 - abs(x)), 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (lambda x: np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0), 3.0),
}


@functools.lru_cache(16)
def _pil_weights(before: int, after: int, resample: str) -> tuple[np.ndarray, np.ndarray]:
    """Return source pixels and weights (in units of 2^-22) of Pillow's resize along one axis, (taps, after) each."""
    function, half = FILTERS[resample]
    scale = before / after
    stretch = max(scale, 1.0)  # antialiasing
    taps = math.ceil(half * stretch) * 2 + 1
    places, weights = np.zeros((taps, after), dtype=np.int64), np.zeros((taps, after), dtype=np.int32)
    for n in range(after):
        centre = (n + 0.5) * scale
        first = max(0, int(centre - half * stretch + 0.5))
        last = min(before, int(centre + half * stretch + 0.5))
        found = function((np.arange(first, last) - centre + 0.5) / stretch)
        found = found / found.sum()
        places[: last - first, n] = np.arange(first, last)
        weights[: last - first, n] = np.trunc(found * 2**BITS + np.where(found < 0, -0.5, 0.5))
    return places, weights


@functools.lru_cache(16)
def _scipy_weights(before: int, after: int) -> np.ndarray:
    """Return scipy's gaussian_filter, then zoom (order 1, grid_mode), mode "mirror", as a matrix (after, before)."""
    factor = before / after
    blur = np.eye(before)
    sigma = max(0.0, (factor - 1) / 2)
    if sigma > 1e-15:
        reach = int(4 * sigma + 0.5)
        offsets = np.arange(-reach, reach + 1)
        kernel = np.exp(-0.5 / sigma**2 * offsets**2)
        blur = np.zeros((before, before))
        for row in range(before):
            np.add.at(blur[row], _mirrored(row + offsets, before), kernel / kernel.sum())
    zoom = np.zeros((after, before))
    for row in range(after):
        at = (row + 0.5) * factor - 0.5
        if at < 0 or at > before - 1:  # outside: reflected
            at = abs(at) if at < 0 else 2 * (before - 1) - at
        low = min(math.floor(at), before - 1)
        np.add.at(zoom[row], _mirrored(np.array([low, low + 1]), before), [1 - (at - low), at - low])
    return zoom @ blur


def _mirrored(places: np.ndarray, count: int) -> np.ndarray:
    """Return indices reflected at the first and last of `count` pixels, without repeating them (mode "mirror")."""
    if count == 1:
        return np.zeros_like(places)
    places = abs(places) % (2 * (count - 1))
    return np.minimum(places, 2 * (count - 1) - places)
