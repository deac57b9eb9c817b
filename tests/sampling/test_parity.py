"""Same seed and settings, float32 on the CPU: diffusers' pipelines' pictures, within 2 of 255 everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from genkit import ImageToImage, Request, TextToImage, Unconditional
from tests.grids import thinned
from tests.tiny import tiny_ddpm, tiny_latent_unconditional, tiny_stable_diffusion

EMOJI = Path(__file__).parents[2] / "genkit" / "components" / "embedded" / "emoji"
STEPS = 6


@pytest.fixture(scope="module")
def gen() -> TextToImage:
    return TextToImage.from_pretrained("emoji", device="cpu")


@pytest.fixture(scope="module")
def pipe() -> Iterator[Any]:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(EMOJI, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    yield pipe


@pytest.fixture(scope="module")
def picture(gen: TextToImage) -> Image.Image:
    return gen("a red fox", seed=7, num_inference_steps=STEPS).images[0]


def assert_same(ours: list[Image.Image], theirs: list[Image.Image]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.size == b.size
        difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b.convert("RGB"), dtype=int))
        assert difference.max() <= 2, f"differs by {difference.max()} of 255"
        assert np.asarray(a).std() > 10, "a picture of nothing proves nothing"


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(n) for n in numbers]


SOLVERS: list[tuple[str, dict, Any, dict]] = [
    ("ddim", {}, diffusers.DDIMScheduler, {}),
    ("euler", {}, diffusers.EulerDiscreteScheduler, {}),
    ("dpmpp_2m", {}, diffusers.DPMSolverMultistepScheduler, {}),
    ("euler_ancestral", {}, diffusers.EulerAncestralDiscreteScheduler, {}),
    ("sde-dpmpp_2m", {}, diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
]


@pytest.mark.parametrize(
    ("solver", "options", "theirs", "config"), thinned(SOLVERS, 3, unpack=True), ids=[s[0] for s in SOLVERS]
)
def test_text_to_image(gen: TextToImage, pipe: Any, solver: str, options: dict, theirs: Any, config: dict) -> None:
    pipe.scheduler = theirs.from_config(diffusers.DDIMScheduler.load_config(EMOJI / "scheduler"), **config)
    made = pipe(["a red fox"] * 2, negative_prompt=["blurry"] * 2, num_inference_steps=STEPS, guidance_scale=5.0,
                generator=seeds(3, 4)).images  # fmt: skip
    ours = gen.with_scheduler(solver, **options)(
        "a red fox", negative_prompt="blurry", num_images=2, seed=3, num_inference_steps=STEPS, guidance_scale=5
    )
    assert_same(ours.images, made)
    assert [r.seed for r in ours.results] == [3, 4]


def test_a_seed_gives_the_same_picture_alone_and_in_a_batch_of_others(gen: TextToImage) -> None:
    alone = gen("a green apple", seed=11, num_inference_steps=STEPS).images[0]
    rows = [Request(id=str(k), prompt=p, seed=s, num_inference_steps=n) for k, (p, s, n) in enumerate(
        [("a red fox", 1, 4), ("a green apple", 11, STEPS), ("a sunflower", 2, 9)])]  # fmt: skip
    mixed = {r.id: r.image for r in gen.stream(rows)}
    assert_same([mixed["1"]], [alone])


def test_other_sizes(gen: TextToImage, pipe: Any) -> None:
    pipe.scheduler = diffusers.DDIMScheduler.from_pretrained(EMOJI / "scheduler")
    made = pipe("a pizza", num_inference_steps=4, guidance_scale=4.0, width=160, height=104, generator=seeds(5)).images
    assert_same(gen("a pizza", seed=5, num_inference_steps=4, guidance_scale=4, width=160, height=104).images, made)


def test_guidance_one_is_no_guidance(gen: TextToImage, pipe: Any) -> None:
    pipe.scheduler = diffusers.DDIMScheduler.from_pretrained(EMOJI / "scheduler")
    made = pipe("a pizza", num_inference_steps=4, guidance_scale=1.0, generator=seeds(5)).images
    ours = gen("a pizza", seed=5, num_inference_steps=4, guidance_scale=1)
    assert_same(ours.images, made)
    assert ours.results[0].nfe == 4


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image(gen: TextToImage, pipe: Any, picture: Image.Image, strength: float) -> None:
    other: Any = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    other.scheduler = diffusers.DDIMScheduler.from_pretrained(EMOJI / "scheduler")
    made = other("a blue fox", image=picture, strength=strength, num_inference_steps=10, guidance_scale=5.0,
                 generator=seeds(9)).images  # fmt: skip
    ours = ImageToImage.from_generator(gen)(
        "a blue fox", image=picture, strength=strength, seed=9, num_inference_steps=10, guidance_scale=5
    )
    assert_same(ours.images, made)


def test_a_mask_keeps_what_is_black(tmp_path: Path, picture: Image.Image) -> None:
    tiny_stable_diffusion(tmp_path)  # diffusers' pipeline takes 4 channels of latents only, emoji has 8
    small = picture.resize((32, 32))
    mask = Image.new("L", small.size, 0)
    mask.paste(255, (16, 0, 32, 32))
    other = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path, safety_checker=None)
    other.set_progress_bar_config(disable=True)
    made = other("a blue fox", image=small, mask_image=mask, strength=0.7, num_inference_steps=10, guidance_scale=5.0,
                 width=32, height=32, generator=seeds(9)).images  # fmt: skip
    ours = ImageToImage.from_pretrained(tmp_path, device="cpu")(
        "a blue fox", image=small, mask_image=mask, strength=0.7, seed=9, num_inference_steps=10, guidance_scale=5
    )
    assert_same(ours.images, made)
    elsewhere = ImageToImage.from_pretrained(tmp_path, device="cpu")(
        "a blue fox", image=small, strength=0.7, seed=9, num_inference_steps=10, guidance_scale=5
    )
    with pytest.raises(AssertionError):
        assert_same(elsewhere.images, made)


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
def test_unconditional_pixels(tmp_path: Path, name: str) -> None:
    tiny_ddpm(tmp_path, scheduler=name.replace("Pipeline", "Scheduler"))
    other = getattr(diffusers, name).from_pretrained(tmp_path)
    other.set_progress_bar_config(disable=True)
    steps = 1000 if name == "DDPMPipeline" else 20
    made = other(
        batch_size=1, generator=torch.Generator("cpu").manual_seed(2), num_inference_steps=min(steps, 50)
    ).images
    ours = Unconditional.from_pretrained(tmp_path, device="cpu")(seed=2, num_inference_steps=min(steps, 50))
    assert_same(ours.images, made)


def test_unconditional_latent(tmp_path: Path) -> None:
    tiny_latent_unconditional(tmp_path)
    images = Unconditional.from_pretrained(tmp_path, device="cpu")(num_images=3, seed=2, num_inference_steps=5).images
    again = Unconditional.from_pretrained(tmp_path, device="cpu")(num_images=1, seed=4, num_inference_steps=5).images
    assert_same(images[2:], again)


def test_parts_compose_and_are_shared(gen: TextToImage, pipe: Any) -> None:
    ours = TextToImage(unet=pipe.unet, vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer,
                       scheduler=diffusers.DDIMScheduler.from_pretrained(EMOJI / "scheduler"))  # fmt: skip
    other = ours.with_scheduler("dpmpp_2m", spacing="karras")
    assert other.unet is ours.unet and other.vae is ours.vae and other.scheduler != ours.scheduler
    assert ImageToImage.from_generator(ours).unet is pipe.unet
    kwargs: dict[str, Any] = {"seed": 3, "num_inference_steps": STEPS, "guidance_scale": 5}
    assert_same(ours("a red fox", **kwargs).images, gen("a red fox", **kwargs).images)
