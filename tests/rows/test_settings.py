"""What a row's settings come to on a model: its own tuned plan where nothing else is asked for."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from genkit import Request, TextToImage
from genkit.components import inspect_model
from genkit.rows.settings import settings

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
