"""What a row's settings come to on a model: its own tuned plan where nothing else is asked for."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from genkit import InputError, Request, TextToImage
from genkit.components import inspect_model
from genkit.rows.settings import STRENGTH, assumed, settings
from genkit.schedulers.planning import least_strength
from genkit.scoring.gates import check_row
from genkit.scoring.names import SCORES

EMOJI = inspect_model("emoji")


@pytest.mark.parametrize(
    ("fields", "scheduler", "steps"),
    [
        ({}, "tuned", 12),
        ({"guidance_scale": 5.0}, "tuned", 12),
        ({"negative_prompt": "blurred", "seed": 3}, "tuned", 12),
        ({"guidance_scale": 4.0}, None, 20),
        ({"num_inference_steps": 12}, None, 12),
        ({"scheduler": "ddim"}, "ddim", 20),
        ({"scheduler": "ddim", "num_inference_steps": 8}, "ddim", 8),
        ({"scheduler": "tuned", "num_inference_steps": 8}, "tuned", 8),
        ({"scheduler": "tuned"}, "tuned", 12),
        ({"image": Image.new("RGB", (128, 128))}, None, 20),
        ({"guidance_interval": [0.1, 0.8]}, None, 20),
    ],
)
def test_the_tuned_plan_is_the_default_of_the_embedded_model(
    fields: dict[str, Any], scheduler: str | None, steps: int
) -> None:
    assert EMOJI.geometry is not None
    found = settings(Request(prompt="a red fox", **fields), EMOJI.geometry, EMOJI.defaults)
    assert (found.scheduler, found.steps) == (scheduler, steps)


def test_a_generator_follows_it_until_another_scheduler_is_chosen() -> None:
    gen = TextToImage.from_pretrained("emoji", device="cpu")
    plain = Request(prompt="a red fox")
    assert gen.plan(plain).nfe == 12
    assert gen.plan(Request(prompt="a red fox", scheduler="tuned", num_inference_steps=12)) is gen.plan(plain)
    other = gen.with_scheduler("dpmpp_2m", spacing="karras")
    assert other.plan(plain).nfe == 20 and gen.plan(plain).nfe == 12


@pytest.mark.parametrize(
    ("picture", "drawn"),
    [
        ((128, 96), "128x96"),
        ((256, 256), "256x256"),
        ((4032, 3024), "1176x880"),
        ((3024, 4032), "880x1176"),
        ((260, 250), "256x248"),
    ],
)
def test_a_picture_of_a_phone_is_drawn_smaller(picture: tuple[int, int], drawn: str) -> None:
    assert EMOJI.geometry is not None
    row = Request(prompt="a", image=Image.new("RGB", picture))
    s = settings(row, EMOJI.geometry, EMOJI.defaults)
    assert f"{s.width}x{s.height}" == drawn
    lines = assumed(row, row.filled({"width": s.width, "height": s.height, "strength": STRENGTH}))
    assert len(lines) == (picture[0] > 2000)
    asked = settings(Request(prompt="a", image=row.image, width=512, height=384), EMOJI.geometry, EMOJI.defaults)
    assert (asked.width, asked.height) == (512, 384)


@pytest.mark.parametrize(("steps", "strength"), [(1, 1.0), (2, STRENGTH), (4, STRENGTH)])
def test_few_steps_leave_one_at_least(steps: int, strength: float) -> None:
    assert EMOJI.geometry is not None
    row = Request(prompt="a", image=Image.new("RGB", (128, 128)), num_inference_steps=steps)
    s = settings(row, EMOJI.geometry, EMOJI.defaults)
    assert s.strength == strength and int(steps * s.strength) >= 1
    lines = assumed(row, row.filled({"width": s.width, "height": s.height, "strength": s.strength}))
    assert len(lines) == (strength != STRENGTH)


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 49, 999, 1000])
def test_the_least_strength_leaves_one(steps: int) -> None:
    assert int(steps * least_strength(steps)) >= 1


NO_CHOICE: tuple[list[str], ...] = (["a cat"], ["Cat", "cat"], ["a cat", " a  cat "], ["a_cat", "a cat"], ["a", ""], [])


@pytest.mark.parametrize("labels", NO_CHOICE)
def test_labels_that_are_no_choice(labels: list[str]) -> None:
    with pytest.raises(InputError, match=r"^labels: "):
        check_row(None, None, labels, SCORES.keys())
