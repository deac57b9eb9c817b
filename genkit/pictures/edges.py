"""What a ControlNet reads of a picture: the edges in it, or a drawing in black on white the other way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from genkit.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

LOW, HIGH = 100, 200  # of Canny's hysteresis, as ControlNets were trained with it
NEEDED = "canny needs OpenCV: pip install 'genkit-diffusion[control]'"


def check_preprocess(kind: str | None, field: str = "preprocess") -> None:
    """Raise InputError, for a field of the user's, where what finds the edges is not installed."""
    from importlib.util import find_spec

    if kind == "canny" and find_spec("cv2") is None:
        raise InputError(f"{field}: {NEEDED}")


def canny(picture: Image.Image) -> Image.Image:
    """Return the edges of an RGB picture, white on black (Canny 1986, by OpenCV)."""
    import cv2
    import numpy as np
    from PIL import Image

    return Image.fromarray(cv2.Canny(np.asarray(picture), LOW, HIGH)).convert("RGB")


def invert(picture: Image.Image) -> Image.Image:
    """Return the negative of an RGB picture: white lines on black of a drawing in black on white."""
    from PIL import ImageOps

    return ImageOps.invert(picture)


PREPROCESS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda picture: picture,
    "canny": canny,
    "invert": invert,
}
COMPUTED = tuple(name for name in PREPROCESS if name != "none")  # from a picture, for the training of a ControlNet
# Names of preprocessors in sd-webui-controlnet; the first of a kind is written
PREPROCESSORS = {
    "none": "none", "canny": "canny", "invert (from white bg & black line)": "invert", "invert": "invert",
}  # fmt: skip
