"""What ControlNets read of a picture."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image, ImageDraw

from genkit.errors import InputError
from genkit.pictures.edges import HIGH, LOW, PREPROCESS, PREPROCESSORS, check_preprocess

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


def drawing() -> Image.Image:
    picture = Image.new("RGB", (64, 48), "white")
    ImageDraw.Draw(picture).rectangle((16, 12, 48, 36), fill="black")
    return picture


def test_canny_is_opencvs_and_finds_the_outline() -> None:
    found = np.asarray(PREPROCESS["canny"](drawing()))
    assert found.shape == (48, 64, 3)
    assert np.array_equal(found[..., 0], cv2.Canny(np.asarray(drawing()), LOW, HIGH))
    rows, columns = np.nonzero(found[..., 0])
    assert (abs(rows.min() - 12), abs(rows.max() - 36), abs(columns.min() - 16), abs(columns.max() - 48)) <= (1,) * 4
    assert not found[20:28, 24:40].any(), "nothing inside"


def test_invert_and_none() -> None:
    plain = np.asarray(drawing())
    assert np.array_equal(np.asarray(PREPROCESS["invert"](drawing())), 255 - plain)
    assert np.array_equal(np.asarray(PREPROCESS["none"](drawing())), plain)
    assert set(PREPROCESSORS.values()) == set(PREPROCESS)


def test_without_opencv_canny_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"canny needs OpenCV: pip install 'genkit-diffusion\[control\]'"):
        check_preprocess("canny")
    check_preprocess("invert")
