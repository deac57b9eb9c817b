"""The settings of a row on a given model: sizes, steps, guidance and strength, checked before it is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.components.geometry import Geometry
from genkit.errors import InputError
from genkit.rows.plans import TUNED
from genkit.rows.request import Request
from genkit.rows.sdxl import check_conditioning
from genkit.rows.syntax import composed
from genkit.schedulers.planning import least_strength

STEPS, GUIDANCE, STRENGTH = 30, 7.5, 0.8  # for a model that does not name its own
REFINED = 0.3  # strength of SDXL's refiner, as in diffusers
# An initial picture keeps its size up to LARGE times the pixels of the model's own size, or LEAST_LARGE pixels
LARGE, LEAST_LARGE = 4.0, 1024 * 1024
STRETCHED = 0.05  # change of the aspect of a ControlNet's picture that is said
_PICTURES = ("image", "mask_image")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Resolved settings: steps, guidance (1: none), width and height in pixels, strength (1: from pure noise).

    scheduler: of the request, or "tuned" where the model's own tuned plan is the default. embedded: whether the network
    reads the guidance scale itself.
    """

    steps: int
    guidance: float
    width: int
    height: int
    strength: float
    scheduler: str | dict[str, Any] | None = None
    embedded: bool = False

    @property
    def guided(self) -> float:
        """The scale of classifier-free guidance; with 1 or less there is no unconditional prediction."""
        return 1.0 if self.embedded else self.guidance


def settings(request: Request, geometry: Geometry, defaults: Mapping[str, Any]) -> Settings:
    """Return the settings of `request`; raises InputError for a row that the model cannot draw.

    defaults: the model's num_inference_steps, guidance_scale and tuned_steps. Without width and height the size is that
    of the initial picture, or else of the first ControlNet's, rounded down to what the networks allow and made smaller
    if it is LARGE, or the model's own.
    """
    g = geometry
    if g.text and not request.prompt:
        raise InputError("prompt: missing, and this model draws from a prompt")
    if not g.text and (request.prompt or request.negative_prompt):
        raise InputError("prompt: this model is unconditional and reads none")
    check_conditioning(request, g)
    if g.refines and request.image is None:
        raise InputError("image: is missing: this model is SDXL's refiner, which finishes pictures")
    if request.image is not None and g.scale == 1:
        raise InputError("image: this model works on pixels without a VAE and starts from noise only")
    sizes = []
    for side, number, own in zip(("width", "height"), _drawn_at(request, g), (g.width, g.height), strict=True):
        asked = getattr(request, side)
        value = asked or (own if number is None else number - number % g.multiple)
        if value % g.multiple or value < g.multiple:
            fits = max(g.multiple, round(value / g.multiple) * g.multiple)
            source = "" if asked else f", from `{'controls' if request.image is None else 'image'}` with {number}"
            raise InputError(f"{side}: {value}{source} is not a multiple of {g.multiple} (nearest: {fits})")
        sizes.append(value)
    guidance = defaults.get("guidance_scale", GUIDANCE) if request.guidance_scale is None else request.guidance_scale
    if g.inpaints and request.mask_image is None and request.mask is None:
        raise InputError(
            "mask_image: is missing: this model is made for inpainting, and needs `image` and `mask_image`, or `mask`"
        )
    if g.guidance_width and request.guidance_interval is not None:
        raise InputError("guidance_interval: this model reads the guidance scale itself, at every step")
    tuned = defaults.get("tuned_steps") if _tuned(request, guidance == defaults.get("guidance_scale")) else None
    steps = request.num_inference_steps or _given(request) or tuned or defaults.get("num_inference_steps", STEPS)
    return Settings(
        steps=steps,
        guidance=float(guidance) if g.text else 1.0,
        width=sizes[0],
        height=sizes[1],
        strength=1.0 if request.image is None else request.strength or _usual(steps, g),
        scheduler=TUNED if tuned else request.scheduler,
        embedded=g.guidance_width > 0,
    )


def cost(
    row: Request, g: Geometry, size: tuple[int, int] | None = None, usual_steps: int | None = None
) -> float:  # fmt: skip
    """Return how many slots an image takes: its pixels relative to the model's own picture size.

    Prompts joined by AND take a half more each. size: (width, height) of a row that is not planned. usual_steps: the
    model's own number of steps; with it the cost is that of the whole picture, in pictures of its own size and steps.
    """
    prompts = len(composed(row.prompt or "")) if row.syntax == "a1111" else 1
    width, height = size or (row.width or g.width, row.height or g.height)
    slots = (prompts + 1) / 2 * width * height / (g.width * g.height)
    return slots if usual_steps is None else slots * (row.num_inference_steps or usual_steps) / usual_steps


def assumed(stated: Request, filled: Request) -> list[str]:
    """Return a line for each assumption about the pictures of a row that a user may not expect."""
    found = []
    steps = filled.num_inference_steps or 1
    usual = stated.image is not None and stated.strength is None
    if usual and filled.strength == usual_strength(steps) != STRENGTH:
        found.append(f"strength: {STRENGTH} of {steps} steps leaves none: {filled.strength:g} is used")
    drawn = filled.width or 1, filled.height or 1
    at = f"{drawn[0]}x{drawn[1]}"
    width, height = _picture_size(stated) or (0, 0)
    if not (stated.width or stated.height) and width * height > 1.2 * drawn[0] * drawn[1]:
        field = "controls" if stated.image is None else "image"
        found.append(f"{field}: {width}x{height} is drawn at {at}; state width and height for another size")
    for width, height in _control_sizes(filled):
        if abs(width * drawn[1] / (height * drawn[0]) - 1) > STRETCHED:
            found.append(f"controls: a picture of {width}x{height} is stretched to {at}")
    return found


def _usual(steps: int, g: Geometry) -> float:
    if g.inpaints:  # the masked part is drawn from noise, as in diffusers' pipeline
        return 1.0
    return usual_strength(steps, REFINED if g.refines else STRENGTH)


def usual_strength(steps: int, usual: float = STRENGTH) -> float:
    """Return the default strength; if that leaves none of the steps, the least strength that leaves one."""
    return usual if int(steps * usual) else least_strength(steps)


def _tuned(request: Request, usual: bool) -> bool:
    """Whether a request without steps takes the model's tuned plan: for its usual guidance, from pure noise."""
    if request.num_inference_steps is not None:
        return False
    if request.scheduler is not None:
        return request.scheduler == TUNED
    return usual and request.image is None and request.guidance_interval is None


def _given(request: Request) -> int | None:
    """Return the number of timesteps or sigmas that the row's scheduler lists, if any."""
    options = request.scheduler if isinstance(request.scheduler, dict) else {}
    levels = options.get("timesteps") or options.get("sigmas")
    return len(levels) if isinstance(levels, list | tuple) else None


def _drawn_at(request: Request, g: Geometry) -> tuple[int, int] | tuple[None, None]:
    """Return the size of the row's picture; one much larger than the model's own, as of a phone, is made smaller."""
    size = _picture_size(request)
    if size is None or request.width or request.height:
        return size or (None, None)
    most = max(LARGE * g.width * g.height, LEAST_LARGE)
    factor = min(1.0, math.sqrt(most / (size[0] * size[1])))
    return int(size[0] * factor), int(size[1] * factor)


def _picture_size(request: Request) -> tuple[int, int] | None:
    """Return the size of the initial picture, else of that of the first ControlNet. Opens every picture of the row."""
    sizes = [_size_of(getattr(request, name), name) for name in _PICTURES if getattr(request, name) is not None]
    return next(iter([*sizes, *_control_sizes(request)]), None)


def _control_sizes(request: Request) -> list[tuple[int, int]]:
    """Return the sizes of the pictures of ControlNets."""
    controls = [control for control in request.controls or () if "image" in control]
    return [_size_of(control["image"], "controls: image") for control in controls]


def _size_of(picture: Any, field: str) -> tuple[int, int]:
    from genkit.pictures.images import check_image, read_image, read_mask

    try:
        if isinstance(picture, str | Path):
            return check_image(picture, mask=field == "mask_image")
        return (read_mask if field == "mask_image" else read_image)(picture).size
    except InputError as error:
        raise InputError(f"{field}: {error}") from None
