"""Models made for inpainting, whose UNet reads mask and masked picture: as diffusers' pipeline, in any batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genkit import Request, TextToImage, generate
from genkit.components import inspect_model
from genkit.components.convert import convert
from genkit.components.families import SCHEDULERS
from genkit.errors import InputError
from tests.components.checkpoints import folder_of
from tests.tiny import SCHEDULER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inpainting")
    convert(inspect_model(folder_of("SD 1", root / "folder", in_channels=9)), root / "model.safetensors")
    (root / "folder" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = json.loads((root / "folder" / "model_index.json").read_text())
    index |= {"_diffusers_version": "0.42.1", "scheduler": ["diffusers", "DDIMScheduler"]}
    (root / "folder" / "model_index.json").write_text(json.dumps(index))
    return root / "folder"


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def mask(left: int = 16) -> Image.Image:
    drawn = Image.new("L", (64, 64), 0)
    drawn.paste(255, (left, 16, 48, 56))
    return drawn


def row(name: str = "a", seed: int = 3, **fields: Any) -> Request:
    given: dict[str, Any] = {"image": picture(), "mask_image": mask(), **fields}
    return Request(id=name, prompt="a fox", seed=seed, num_inference_steps=4, guidance_scale=4.0, **given)


def pixels(model: Path, rows: list[Request]) -> dict[str, np.ndarray]:
    results = list(TextToImage.from_pretrained(model).stream(rows))
    assert all(result.status == "done" for result in results), [result.reason for result in results]
    return {str(result.id): np.asarray(result.pixels).astype(int) for result in results}


@pytest.mark.parametrize(("single", "strength"), [(False, 1.0), (False, 0.5), (True, 1.0)])
def test_equal_to_diffusers(folder: Path, single: bool, strength: float) -> None:
    """The folder's scheduler is DDIM; the file's, PNDM, begins within its plan in another way than diffusers'."""
    from diffusers import PNDMScheduler, StableDiffusionInpaintPipeline

    file = folder.parent / "model.safetensors"
    options: dict[str, Any] = {"local_files_only": True, "safety_checker": None}
    if single:
        pipeline = StableDiffusionInpaintPipeline.from_single_file(str(file), config=str(folder), **options)
    else:
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    if single:
        pipeline.scheduler = PNDMScheduler.from_config(SCHEDULERS["SD 1"])
    made = pipeline(
        "a fox", image=picture(), mask_image=mask(), strength=strength, num_inference_steps=4, guidance_scale=4.0,
        height=64, width=64, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    found = pixels(file if single else folder, [row(strength=strength)])["a"]
    assert np.abs(found - np.asarray(made.images[0]).astype(int)).max() <= 2


@pytest.mark.slow
def test_rows_with_different_masks_share_a_batch(folder: Path) -> None:
    rows = [row("a"), row("b", mask_image=mask(40)), row("c", image=picture(9), strength=0.6), row("d", seed=8)]
    together = pixels(folder, rows)
    for one in rows:
        assert np.abs(together[str(one.id)] - pixels(folder, [one])[str(one.id)]).max() <= 1


def test_rows_without_a_mask_are_refused_before_anything_loads(folder: Path, tmp_path: Path) -> None:
    for bad in (Request(prompt="a fox"), Request(prompt="a fox", image=picture())):
        with pytest.raises(InputError, match="mask_image: is missing: this model is made for inpainting"):
            generate([bad], out=tmp_path / "run", model=str(folder), quiet=True)
    assert not (tmp_path / "run").exists()
