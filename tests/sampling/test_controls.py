"""ControlNets: diffusers' pictures, and rows with any of them, or none, in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from PIL import Image

from genkit import ImageToImage, Request, TextToImage, Unconditional
from genkit.components import inspect_model, load_components
from genkit.device.memory import LEVELS, RESIDENT, Budget
from genkit.device.residency import Residency
from genkit.errors import InputError
from genkit.rows.controls import USUAL
from genkit.sampling.controls import weights
from tests.tiny import tiny_controlnet, tiny_ddpm, tiny_refiner, tiny_sdxl, tiny_stable_diffusion

SIDES = {"sd": 16, "xl": 32}
STEPS = 8


def picture(side: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "sd" and "xl" of models, and two ControlNets for each: "sd-one", "sd-two", …"""
    folder = tmp_path_factory.mktemp("controls")
    tiny_stable_diffusion(folder / "sd")
    tiny_sdxl(folder / "xl")
    for kind in SIDES:
        for seed, name in enumerate(("one", "two")):
            tiny_controlnet(folder / f"{kind}-{name}", folder / kind, seed)
    return folder


@pytest.fixture(scope="module")
def gen(place: Path) -> TextToImage:
    return TextToImage.from_pretrained(place / "sd", device="cpu")


def control(place: Path, name: str = "sd-one", **fields: Any) -> dict[str, Any]:
    side = SIDES[name[:2]]
    return {"file": str(place / name), "image": picture(side, len(name) + ord(name[-1])), **fields}


def row(name: str = "a", seed: int = 3, **fields: Any) -> Request:
    usual: dict[str, Any] = {"prompt": "a fox", "negative_prompt": "blurry", "num_inference_steps": STEPS}
    return Request(**{"id": name, "seed": seed, "guidance_scale": 5.0, **usual, **fields})


def drawn(gen: TextToImage, *rows: Request, **options: Any) -> dict[str, np.ndarray]:
    results = list(gen.stream(rows, **options))
    assert all(result.status == "done" for result in results), [result.reason for result in results]
    return {str(result.id): np.asarray(result.pixels).astype(int) for result in results}


def difference(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


RANGES = [
    ([1.0, 0.5], [0.0, 0.0], [1.0, 1.0]),
    ([1.2, -0.7], [0.2, 0.0], [1.0, 0.5]),
]


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("told", RANGES, ids=["throughout", "ranges"])
def test_text_to_image_is_that_of_diffusers(place: Path, kind: str, told: Any) -> None:
    scales, starts, ends = told
    names = [f"{kind}-one", f"{kind}-two"]
    cls = {"sd": diffusers.StableDiffusionControlNetPipeline, "xl": diffusers.StableDiffusionXLControlNetPipeline}
    nets = [ControlNetModel.from_pretrained(place / name) for name in names]
    options: dict[str, Any] = {} if kind == "xl" else {"safety_checker": None}
    pipe = cls[kind].from_pretrained(place / kind, controlnet=nets, **options)
    pipe.set_progress_bar_config(disable=True)
    controls = [
        control(place, name, weight=w, start=s, end=e)
        for name, w, s, e in zip(names, scales, starts, ends, strict=True)
    ]
    theirs = pipe(
        "a fox", negative_prompt="blurry", image=[c["image"] for c in controls], num_inference_steps=STEPS,
        guidance_scale=5.0, controlnet_conditioning_scale=scales, control_guidance_start=starts,
        control_guidance_end=ends, generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    mine = TextToImage.from_pretrained(place / kind, device="cpu")
    found = drawn(mine, row(controls=controls), row("plain"))
    assert difference(found["a"], theirs) <= 1
    assert difference(found["a"], found["plain"]) > 10, "it steers"


def test_image_to_image_and_inpainting_are_those_of_diffusers(place: Path) -> None:
    net = ControlNetModel.from_pretrained(place / "sd-one")
    half = np.array([[0] * 8 + [255] * 8], dtype=np.uint8)
    start, mask = picture(16, 5), Image.fromarray(np.repeat(half, 16, axis=0))
    one = control(place, weight=0.8)
    common: dict[str, Any] = {
        "negative_prompt": "blurry", "image": start, "control_image": one["image"], "strength": 0.6,
        "num_inference_steps": STEPS, "guidance_scale": 5.0, "controlnet_conditioning_scale": 0.8,
    }  # fmt: skip
    gen = ImageToImage.from_pretrained(place / "sd", device="cpu")
    for cls, masked in (
        (diffusers.StableDiffusionControlNetImg2ImgPipeline, False),
        (diffusers.StableDiffusionControlNetInpaintPipeline, True),
    ):
        more: dict[str, Any] = {"mask_image": mask} if masked else {}
        pipe = cls.from_pretrained(place / "sd", controlnet=net, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe("a fox", **common, **more, generator=torch.Generator().manual_seed(3)).images[0]
        ours = gen(
            "a fox", start, negative_prompt="blurry", strength=0.6, num_inference_steps=STEPS, guidance_scale=5,
            seed=3, controls=[one], **more,
        )  # fmt: skip
        assert difference(ours.images[0], theirs) <= 1, cls


def test_rows_with_different_controls_share_a_batch(place: Path, gen: TextToImage) -> None:
    one, two = control(place), control(place, "sd-two")
    rows = [
        row("none"),
        row("one", controls=[one]),
        row("both", controls=[one, {**two, "weight": 0.4, "end": 0.5}], scheduler="heun"),
        row("two", controls=[two], guidance_scale=1.0, num_inference_steps=5),
        row("late", controls=[{**one, "start": 0.6}], scheduler="euler_ancestral"),
        row("twice", controls=[{**one, "weight": 0.5}, {**one, "weight": 0.5}]),
        row("composed", prompt="a fox AND a cat :0.5", syntax="a1111", controls=[one]),
        row("part", controls=[one], guidance_interval=[0.2, 0.7]),
        row("empty", controls=[]),
    ]
    together = drawn(gen, *rows)
    for each in rows:
        assert difference(together[str(each.id)], drawn(gen, each)[str(each.id)]) <= 1, each.id
    assert difference(together["none"], together["empty"]) == 0
    assert difference(together["one"], together["twice"]) <= 1, "weights of one network add up"
    alike = row("zero", controls=[{**one, "weight": 0.0}])
    assert difference(drawn(gen, alike)["zero"], together["none"]) <= 1


def test_calls_in_parts_and_in_float32_are_steered_too(place: Path, gen: TextToImage) -> None:
    rows = [row("a", controls=[control(place)]), row("b"), row("c", controls=[control(place, "sd-two")])]
    whole = drawn(gen, *rows)
    gen.denoiser.limit = 1
    try:
        parts = drawn(gen, *rows)
    finally:
        gen.denoiser.limit = None
    assert max(difference(parts[key], whole[key]) for key in whole) <= 1
    half = TextToImage.from_pretrained(place / "sd", device="cpu", dtype="bfloat16")
    network = half.controls.add(str(place / "sd-one"))
    with half.denoiser.in_float32():
        assert network.dtype == half.unet.dtype == torch.float32
    assert network.dtype == half.unet.dtype == torch.bfloat16
    assert difference(drawn(half, rows[0])["a"], whole["a"]) < 40, "bfloat16 is coarse"


def test_every_memory_level_draws_the_same_pictures(place: Path) -> None:
    rows = [row("a", controls=[control(place)]), row("b")]
    found = {}
    for level in LEVELS:
        parts = load_components(inspect_model(place / "sd"), device="cpu", dtype=torch.float32)
        gen = TextToImage(
            unet=parts.unet, vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer,
            scheduler=parts.scheduler, residency=Residency(torch.device("cpu"), level),
            budget=Budget(level, 2, 1e6, 0, 0),
        )  # fmt: skip
        found[level] = drawn(gen, *rows)
        gen.unload()
        assert all(p.device.type == "meta" for net in gen.controls.networks.values() for p in net.parameters())
    for level in LEVELS[1:]:
        assert max(difference(found[level][key], found[RESIDENT][key]) for key in "ab") <= 1, level


def test_the_refiner_goes_on_without_them(place: Path, tmp_path: Path) -> None:
    """The range of steps is that of the base, as where two pipelines of diffusers follow each other."""
    tiny_refiner(tmp_path / "refiner")
    gen = TextToImage.from_pretrained(place / "xl", device="cpu", refiner=tmp_path / "refiner", refiner_start=0.5)
    one = control(place, "xl-one")
    rows = [row("a", controls=[one]), row("b"), row("late", controls=[{**one, "start": 0.99}])]
    found = drawn(gen, *rows)
    assert difference(found["a"], found["b"]) > 3
    assert difference(found["late"], found["b"]) <= 1, "no call of the base is within its range"


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.25, 0.75), (0.5, 1.0), (0.0, 0.1), (0.9, 1.0)])
@pytest.mark.parametrize("calls", [1, 4, 7, 20])
def test_ranges_are_those_of_diffusers(start: float, end: float, calls: int) -> None:
    theirs = [1.0 - float(i / calls < start or (i + 1) / calls > end) for i in range(calls)]
    assert weights({**USUAL, "start": start, "end": end, "weight": 0.5}, calls).tolist() == [0.5 * w for w in theirs]


def test_what_is_drawn_follows_the_size_and_bytes_of_the_picture(place: Path, gen: TextToImage) -> None:
    wide = picture(16, 9).resize((32, 16))
    image = gen("a fox", num_inference_steps=1, seed=0, controls=[control(place, image=wide)]).images[0]
    assert image.size == (32, 16), "that of its picture"
    given = row(controls=[control(place, image=np.asarray(wide))], width=16, height=16)
    assert drawn(gen, given)["a"].shape == (16, 16, 3)
    one, other = row(controls=[control(place)]), row(controls=[control(place, image=picture(16, 1))])
    assert one.fingerprint() != other.fingerprint() != row().fingerprint()
    assert one.fingerprint() == row(controls=[control(place, weight=1, preprocess="none")]).fingerprint()


def test_what_does_not_fit_is_refused_before_it_is_drawn(place: Path, gen: TextToImage, tmp_path: Path) -> None:
    pixel = tiny_ddpm(tmp_path / "ddpm")
    for model, controls, message in (
        (gen, [control(place, "xl-one")], "cross_attention_dim: 40, but the model's UNet has 16"),
        (gen, [{"file": str(place / "sd-one")}], "has no picture"),
        (gen, [{"image": picture(16)}], "names no network"),
        (gen, [control(place, file="nowhere")], "there is no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            list(model.stream([row(controls=controls)]))
    with pytest.raises(InputError, match="reads no prompt"):
        list(Unconditional.from_pretrained(pixel).stream([Request(controls=[control(place)])]))
