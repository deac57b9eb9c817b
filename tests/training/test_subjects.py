"""The embedded model is taught a thing of its own, a teal disc, in each way that there is to teach one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from genkit import TextToImage
from genkit.training.loop import train
from genkit.training.recipe import make_recipe

SIDE, TEAL = 64, (0, 150, 140)
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("a sks thing", {"lora": {"rank": 8}}, {"steps": 24, "learning_rate": 6e-3}),
    "dreambooth": (
        "a sks thing", {"prior": {"prompt": "a red apple", "count": 2}}, {"steps": 16, "learning_rate": 4e-4},
    ),
    "textual-inversion": (
        "<disc>", {"token": {"placeholder": "<disc>", "initializer": "thing"}}, {"steps": 40, "learning_rate": 6e-2},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, lot = tmp_path_factory.mktemp("discs"), random.Random(0)
    for n in range(8):
        picture, at, radius = Image.new("RGB", (SIDE, SIDE), "white"), 32 + lot.randint(-3, 3), lot.randint(20, 25)
        colour = tuple(max(0, level + lot.randint(-10, 10)) for level in TEAL)
        ImageDraw.Draw(picture).ellipse((at - radius, at - radius, at + radius, at + radius), fill=colour)
        picture.save(folder / f"{n}.png")
    return folder


def middles(model: str, prompt: str) -> np.ndarray:
    """The mean colour of the middle of each of three pictures, (3, 3)."""
    images = TextToImage.from_pretrained(model, device="cpu")(
        prompt, num_images=3, seed=1, num_inference_steps=6, guidance_scale=3.0, width=SIDE, height=SIDE
    ).images
    return np.array([np.asarray(i, dtype=float)[20:44, 20:44].mean(axis=(0, 1)) for i in images])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_thing_is_drawn_as_it_was_shown(discs: Path, tmp_path: Path, way: str) -> None:
    word, section, told = WAYS[way]
    data = {"path": str(discs), "captions": [word], "missing_captions": "empty", "resolution": SIDE, "validation": 0.0}
    plan = {"batch_size": 4, "weight_decay": 0.0, **told}
    values = {"task": way, "model": "emoji", "data": data, "train": plan, "evaluate": {"every": 0}, **section}
    train(make_recipe(values), tmp_path / "run", device="cpu", quiet=True)
    before = np.abs(middles("emoji", word.replace("<disc>", "thing")) - TEAL).mean()
    after = np.abs(middles(str(tmp_path / "run"), word) - TEAL).mean()
    assert after < 0.6 * before, (before, after)
    if way == "dreambooth":  # what the class was is kept by its own pictures
        red, green, _ = middles(str(tmp_path / "run"), "a red apple").mean(axis=0)
        assert red > green + 40
