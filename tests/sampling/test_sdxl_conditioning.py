"""SDXL's sizes, crops and second prompts: diffusers' pictures, in tables, on the command line, refused elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from genkit import ImageToImage, InputError, Request, TextToImage, generate
from genkit.rows.prompts import read_prompts
from genkit.rows.request import canonical
from genkit.rows.sdxl import FIELDS, time_ids
from tests.sampling.test_parity import assert_same, seeds
from tests.tiny import tiny_sdxl, tiny_stable_diffusion


def louder(folder: Path) -> Path:
    """Scale the weights that read sizes and prompts, so that the picture shows what they are."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.startswith("add_embedding") or ("attn2" in name and name.endswith("weight")):
            weights[name] *= 4
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return louder(tiny_sdxl(tmp_path_factory.mktemp("sdxl")))


@pytest.fixture(scope="module")
def gen(folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    found = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # a row, and diffusers' arguments
    "prompt_2": ({"prompt_2": "an owl"}, {"prompt_2": "an owl"}),
    "negative_prompt_2": (
        {"negative_prompt": "blurry", "negative_prompt_2": "a pizza"},
        {"negative_prompt": "blurry", "negative_prompt_2": "a pizza"},
    ),
    "sizes": (
        {"original_size": [100, 60], "crop": [7, 30], "target_size": "50x20"},
        {"original_size": (60, 100), "crops_coords_top_left": (30, 7), "target_size": (20, 50)},
    ),
    "negative sizes": (
        {"crop": [7, 30], "negative_original_size": [512, 256], "negative_target_size": [1, 2]},
        {"crops_coords_top_left": (30, 7), "negative_original_size": (256, 512), "negative_target_size": (2, 1)},
    ),
    "all": (
        {"prompt_2": "an owl", "negative_prompt": "blurry", "negative_prompt_2": "a pizza", "original_size": "64x32",
         "crop": "3,4", "target_size": [40, 30], "negative_original_size": [512, 256], "negative_crop": [9, 8],
         "negative_target_size": [1, 2]},
        {"prompt_2": "an owl", "negative_prompt": "blurry", "negative_prompt_2": "a pizza", "original_size": (32, 64),
         "crops_coords_top_left": (4, 3), "target_size": (30, 40), "negative_original_size": (256, 512),
         "negative_crops_coords_top_left": (8, 9), "negative_target_size": (2, 1)},
    ),
}  # fmt: skip


def drawn(gen: TextToImage, **row: Any) -> Image.Image:
    fields = {"prompt": "a red fox", "seed": 3, "num_inference_steps": 6, "guidance_scale": 5.0, **row}
    (result,) = gen.stream([Request(**fields)])
    return result.image


def differs(one: Image.Image, other: Image.Image) -> bool:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max()) > 2


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_diffusers(gen: TextToImage, pipe: Any, case: str) -> None:
    row, theirs = CASES[case]
    made = pipe("a red fox", num_inference_steps=6, guidance_scale=5.0, generator=seeds(3), **theirs).images
    ours = drawn(gen, **row)
    assert_same([ours], made)
    assert differs(ours, drawn(gen)), "the fields say nothing"


def test_what_starts_from_a_picture_reads_them_too(folder: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((32, 32))
    other = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    other.set_progress_bar_config(disable=True)
    made = other(
        "a blue fox", "an owl", image=picture, strength=0.7, num_inference_steps=10, guidance_scale=5.0,
        original_size=(60, 100), crops_coords_top_left=(30, 7), target_size=(20, 50),
        negative_original_size=(256, 512), generator=seeds(9),
    ).images  # fmt: skip
    gen = ImageToImage.from_pretrained(folder, device="cpu")
    row = Request(
        prompt="a blue fox", prompt_2="an owl", image=picture, strength=0.7, num_inference_steps=10, seed=9,
        guidance_scale=5.0, original_size=[100, 60], crop=[7, 30], target_size=[50, 20],
        negative_original_size=[512, 256],
    )  # fmt: skip
    (ours,) = gen.stream([row])
    assert_same([ours.image], made)
    again = gen("a blue fox", picture, prompt_2="an owl", strength=0.7, num_inference_steps=10, seed=9)
    assert differs(again.images[0], ours.image)


def test_rows_of_different_conditioning_share_a_batch(gen: TextToImage) -> None:
    rows = [
        Request(id=str(k), prompt="a red fox", seed=k, num_inference_steps=3 + k, guidance_scale=1.0 + 2 * k, **row)
        for k, (row, _) in enumerate(CASES.values())
    ]
    mixed = {r.id: r for r in gen.stream(rows, slots=4)}
    for row in rows:
        (alone,) = gen.stream([row])
        assert_same([mixed[str(row.id)].image], [alone.image])


def test_in_python(gen: TextToImage) -> None:
    plain: dict[str, Any] = {"seed": 3, "num_inference_steps": 6, "guidance_scale": 5.0}
    ours = gen("a red fox", prompt_2="an owl", original_size=(100, 60), crop=(7, 30), target_size=(50, 20), **plain)
    row = drawn(gen, prompt_2="an owl", original_size=[100, 60], crop=[7, 30], target_size=[50, 20])
    assert_same(ours.images, [row])


def test_what_is_not_stated_is_the_pictures_size() -> None:
    assert time_ids(Request(prompt="a"), 64, 32) == ([32, 64, 0, 0, 32, 64],) * 2
    positive, negative = time_ids(Request(prompt="a", crop=[1, 2]), 64, 32)
    assert positive == negative == [32, 64, 2, 1, 32, 64]
    _, negative = time_ids(Request(prompt="a", crop=[1, 2], negative_crop=[0, 0]), 64, 32)
    assert negative == [32, 64, 0, 0, 32, 64]


def test_spellings_and_the_fingerprint() -> None:
    found = [
        Request(prompt="a", original_size=value) for value in ([64, 32], (64.0, 32), "64x32", "64,32", " [64, 32] ")
    ]
    assert {tuple(row.original_size) for row in found} == {(64, 32)}
    assert len({row.fingerprint() for row in (*found, Request(prompt="a", prompt_2=""))}) == 2
    kinds: dict[str, Any] = {f: "x" if "prompt" in f else 5 if "score" in f else [8, 8] for f in FIELDS}
    assert len({Request(prompt="a", **{f: v}).fingerprint() for f, v in kinds.items()}) == len(FIELDS)
    assert len({Request(prompt="a", **{f: v}).drawing() for f, v in kinds.items()}) == len(FIELDS)
    assert Request(prompt="a").fingerprint() == "5fe023af1ecc3c1f"  # as before these fields
    row = Request(prompt="a", **kinds)
    assert Request(**json.loads(json.dumps(row.to_json()))) == row


def test_names_of_other_tools_and_tables(tmp_path: Path) -> None:
    assert canonical({"crops_coords_top_left": [30, 7], "Negative crops coords top left": (1, 2)}) == {
        "crop": [7, 30], "negative_crop": [2, 1],
    }  # fmt: skip
    assert canonical({"positive_style_prompt": "x", "negative style prompt": "y"}) == {
        "prompt_2": "x", "negative_prompt_2": "y",
    }  # fmt: skip
    (tmp_path / "rows.csv").write_text(
        'prompt,prompt_2,original_size,crop,aesthetic_score\na,an owl,64x32,"3,4",6.5\nb,,"[64, 32]",,\n'
    )
    (tmp_path / "rows.yaml").write_text(
        "defaults: {target_size: 40x30}\nrequests:\n"
        "  - {prompt: a, prompt_2: an owl, original_size: [64, 32], crop: [3, 4], aesthetic_score: 6.5}\n"
        "  - {prompt: b, original_size: 64x32}\n"
    )
    csv, yaml = read_prompts(tmp_path / "rows.csv", {"target_size": [40, 30]}), read_prompts(tmp_path / "rows.yaml")
    assert csv == yaml and csv[0].crop == [3, 4] and csv[1].prompt_2 is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"original_size": "64"}, "original_size: '64' must be two whole numbers from 1 to 65536: width and height"),
    ({"target_size": [0, 8]}, "target_size: [0, 8] must be two whole numbers from 1"),
    ({"crop": [-1, 0]}, "crop: [-1, 0] must be two whole numbers from 0"),
    ({"crop": [1, 2, 3]}, "crop: [1, 2, 3] must be two whole numbers"),
    ({"negative_crop": [1.5, 2]}, "negative_crop: [1.5, 2] must be two whole numbers"),
    ({"original_size": True}, "original_size: True must be"),
    ({"aesthetic_score": 11}, "aesthetic_score: 11 must be at most 10"),
    ({"prompt_2": 3}, "prompt_2: 3 must be text"),
    ({"prompt_2": "a\x00"}, "prompt_2: 'a\\x00' holds a NUL"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_bad_values_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        Request(prompt="a", **fields)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_crops_of_diffusers_that_are_none() -> None:
    with pytest.raises(InputError, match="crops_coords_top_left: 'x' must be two whole numbers"):
        canonical({"crops_coords_top_left": "x"})


def test_a_run_records_them_and_goes_on(folder: Path, tmp_path: Path) -> None:
    rows: Callable[[], list[Request]] = lambda: [  # noqa: E731
        Request(id="a", prompt="a fox", prompt_2="an owl", crop=[3, 4], seed=1, num_images=2, num_inference_steps=2)
    ]
    run: dict[str, Any] = {"model": str(folder), "quiet": True, "device": "cpu"}
    assert generate(rows(), tmp_path / "run", **run).new == 2
    whole = (tmp_path / "run" / "images" / "a-01.png").read_bytes()
    (tmp_path / "run" / "images" / "a-01.png").unlink()
    assert generate(rows(), tmp_path / "run", **run).new == 1
    assert (tmp_path / "run" / "images" / "a-01.png").read_bytes() == whole
    with Image.open(tmp_path / "run" / "images" / "a-01.png") as picture:
        request = json.loads(picture.info["genkit"])["request"]
    assert (request["prompt_2"], request["crop"]) == ("an owl", [3, 4])


@pytest.mark.parametrize("field", FIELDS)
def test_models_that_do_not_read_a_field_refuse_it(tmp_path: Path, folder: Path, field: str) -> None:
    value: Any = "x" if "prompt" in field else 5 if "score" in field else [8, 8]
    model = folder if "score" in field else tiny_stable_diffusion(tmp_path / "sd")
    reader = "SDXL's refiner" if "score" in field else "SDXL"
    with pytest.raises(InputError, match=rf"request 0: {field}: .*: only {reader} reads it, and this model is none"):
        generate([Request(prompt="a", **{field: value})], tmp_path / "run", model=str(model), quiet=True)
    assert not (tmp_path / "run").exists()
