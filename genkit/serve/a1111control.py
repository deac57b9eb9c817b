"""sd-webui-controlnet, AUTOMATIC1111's extension: its units as ControlNets of a row, and what /controlnet lists."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import AliasChoices, BaseModel, Field
from starlette.concurrency import run_in_threadpool

from genkit.errors import InputError, nearest, shown
from genkit.pictures.edges import HIGH, LOW, PREPROCESS, PREPROCESSORS, check_preprocess
from genkit.pictures.encoders import encoding
from genkit.serve.calls import Serving, bad, encoded
from genkit.serve.limits import STATUSES
from genkit.serve.rows import inline, number_of

VERSION = 2  # of the extension's API, which clients ask for
MOST = 8  # pictures of a call of detect
IMAGE = "controlnet: image"

NUMBERS = {"weight": "weight", "guidance_start": "start", "guidance_end": "end"}
NOTHING: tuple[Any, ...] = (None, "", "None", "none", -1, 0, False, [], {})
# Parameters of a unit that genkit has one value of, or lacks, each with the values besides NOTHING that ask for that
FIXED: dict[str, tuple[Any, ...]] = {
    "control_mode": ("Balanced", "ControlMode.BALANCED"), "union_control_type": ("Unknown",),
    "pulid_mode": ("Fidelity",),
    **dict.fromkeys(
        ("mask", "mask_image", "effective_region_mask", "ipadapter_input", "advanced_weighting", "animatediff_batch",
         "batch_images", "guess_mode", "guessmode", "loopback", "batch_mask_dir", "batch_image_dir"), (),
    ),
}  # fmt: skip
# Parameters without an effect here: the picture is read at the size that is drawn
IDLE = (
    "enabled", "enable", "low_vram", "lowvram", "pixel_perfect", "processor_res", "hr_option", "save_detected_map",
    "inpaint_crop_input_image", "input_mode", "use_preview_as_input", "is_ui", "output_dir", "generated_image",
    "batch_keyframe_idx", "batch_mask_gallery", "batch_modifiers", "batch_input_gallery",
)  # fmt: skip
READ = ("image", "input_image", "module", "model", "threshold_a", "threshold_b", "resize_mode", *NUMBERS)
THRESHOLDS = {"threshold_a": LOW, "threshold_b": HIGH}
# Spellings of how a picture of another aspect is brought to that of the drawn one
STRETCH = ("Just Resize", "ResizeMode.RESIZE", 0)
CROP = ("Crop and Resize", "Scale to Fit (Inner Fit)", "ResizeMode.INNER_FIT", 1)


def control_of(unit: Mapping[str, Any], size: tuple[int, int], start: Any = None) -> dict[str, Any]:
    """Return a ControlNet of a row, its network by name.

    size: (width, height) of the drawn picture. start: the initial picture, for a unit that has none. Raises InputError
    naming the parameter.
    """
    for name, value in unit.items():
        if name in FIXED and value not in (*NOTHING, *FIXED[name]):
            raise InputError(f"controlnet: {name}: {shown(value)}: genkit has no such thing; leave it out")
        if name not in (*FIXED, *IDLE, *READ):
            raise InputError(f"controlnet: {shown(name)}: unknown parameter{nearest(name, (*READ, *FIXED))}")
    kind = _kind(unit.get("module"))
    for name in THRESHOLDS:
        _check_threshold(kind, name, unit.get(name))
    model = re.sub(r" \[[0-9a-f]{8,12}\]\Z", "", str(unit.get("model") or "None"))
    found: dict[str, Any] = {"name": model.removesuffix(".safetensors"), "preprocess": kind}
    for name, field in NUMBERS.items():
        if unit.get(name) is not None:
            found[field] = number_of(f"controlnet: {name}", unit[name])
    image = unit.get("image") or unit.get("input_image")
    image = image.get("image") if isinstance(image, Mapping) else image
    if not image and start is None:
        raise InputError("controlnet: image: is missing; send it in base64")
    found["image"] = _fitting(inline(IMAGE, image) if image else start, size, unit.get("resize_mode"))
    return found


def _fitting(image: Any, size: tuple[int, int], mode: Any) -> Any:
    """Return a picture of the aspect of `size`, its middle where that is cut out; it is resized when it is drawn."""
    width, height = image.size
    mode = CROP[0] if mode is None else mode
    if mode in STRETCH or width * size[1] == height * size[0]:
        return image
    if mode not in CROP:
        raise InputError(f"controlnet: resize_mode: {shown(mode)}: there are {STRETCH[0]} and {CROP[0]}")
    wide, high = min(width, height * size[0] / size[1]), min(height, width * size[1] / size[0])
    left, top = round((width - wide) / 2), round((height - high) / 2)
    return image.crop((left, top, left + max(1, round(wide)), top + max(1, round(high))))


def _kind(module: Any) -> str:
    """Return the preprocessor of a name there. Raises InputError."""
    kind = PREPROCESSORS.get(str(module or "none").lower())
    if kind is None:
        there = ", ".join(PREPROCESSORS)
        raise InputError(f"controlnet: module: {shown(module)}: there are {there}; send what it makes of the picture")
    check_preprocess(kind)
    return kind


def _check_threshold(kind: str, name: str, value: Any) -> None:
    usual = THRESHOLDS[name]
    if kind == "canny" and value not in (None, -1, usual):
        raise InputError(f"controlnet: {name}: {shown(value)}: canny has {usual} here; send that, or -1")


class Detect(BaseModel):
    """Pictures that a preprocessor is to read."""

    controlnet_module: str = "none"
    controlnet_input_images: list[str] = Field(
        description="In base64.",
        validation_alias=AliasChoices("controlnet_input_images", "controlnet_images"),  # the latter is webuiapi's
    )
    controlnet_threshold_a: float | None = None
    controlnet_threshold_b: float | None = None


def _made(kind: str, image: str, most: int) -> Any:
    """Return what a preprocessor makes of a picture, (h, w, 3) uint8. Raises InputError for more than `most` pixels."""
    found = inline(IMAGE, image).convert("RGB")
    if found.width * found.height > most:
        size = f"{found.width}x{found.height}"
        raise InputError(f"controlnet_input_images: {size} has more than the {most} pixels of this server")
    return np.asarray(PREPROCESS[kind](found))


def router(serving: Serving) -> APIRouter:
    """Return the routes that clients of the extension ask for."""
    routes = APIRouter(prefix="/controlnet", tags=["AUTOMATIC1111"], responses={400: STATUSES[400]})

    @routes.get("/version")
    async def version() -> Response:
        """Return the version of the extension's API."""
        return JSONResponse({"version": VERSION})

    @routes.get("/model_list")
    async def models() -> Response:
        """List the ControlNets that units may name."""
        return JSONResponse({"model_list": sorted(serving.intake.controls)})

    @routes.get("/module_list")
    async def modules() -> Response:
        """List the preprocessors."""
        return JSONResponse({"module_list": list(PREPROCESSORS), "module_detail": {}})

    @routes.post("/detect", responses={422: STATUSES[422]})
    async def detect(body: Detect) -> Response:
        """Return what a preprocessor makes of pictures, in base64."""
        try:
            kind, images = _kind(body.controlnet_module), body.controlnet_input_images
            if not 0 < len(images) <= MOST:
                raise InputError(f"controlnet_input_images: {len(images)} pictures; send 1 to {MOST}")
            _check_threshold(kind, "threshold_a", body.controlnet_threshold_a)
            _check_threshold(kind, "threshold_b", body.controlnet_threshold_b)
            files = [
                await encoded(encoding("png"), await run_in_threadpool(_made, kind, image, serving.most.pixels))
                for image in images
            ]
        except InputError as wrong:
            raise bad(str(wrong), 422) from None
        return JSONResponse({"images": [base64.b64encode(file).decode() for file in files], "info": "Success"})

    return routes
