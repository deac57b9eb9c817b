"""What diffusers' pipelines correct in old folders: the same pictures, within 2 of 255, and a note of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from genkit import ImageToImage, TextToImage, Unconditional
from genkit.components import inspect_model
from tests.tiny import tiny_ddpm, tiny_sdxl, tiny_stable_diffusion

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
OLD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "DDIM that clips": (
        {"_class_name": "DDIMScheduler", "clip_sample": True, "set_alpha_to_one": False, "steps_offset": 1},
        ["clip_sample: True is taken as False"],
    ),
    "DDIM that does not say": (
        {"_class_name": "DDIMScheduler", "set_alpha_to_one": False},
        ["steps_offset: 0 is taken as 1", "clip_sample: True is taken as False"],
    ),
    "PNDM without offset": (
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
        ["steps_offset: 0 is taken as 1"],
    ),
    "Euler, leading": (
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 0},
        ["steps_offset: 0 is taken as 1"],
    ),
    "DDPM": (
        {"_class_name": "DDPMScheduler", "timestep_spacing": "leading", "variance_type": "fixed_small"},
        ["steps_offset: 0 is taken as 1", "clip_sample: True is taken as False"],
    ),
    "LMS, as it should be": ({"_class_name": "LMSDiscreteScheduler", "steps_offset": 1}, []),
    "DPM++": (
        {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "leading"},
        ["steps_offset: 0 is taken"],
    ),
}  # fmt: skip


def difference(ours: Image.Image, theirs: Image.Image) -> int:
    assert ours.size == theirs.size
    return int(np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs.convert("RGB"), dtype=int)).max())


def folder_with(folder: Path, scheduler: dict[str, Any], pipeline: str = "StableDiffusionPipeline") -> Path:
    tiny_stable_diffusion(folder)
    config = {**NOISE, "_diffusers_version": "0.2.4", **scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": pipeline, "scheduler": ["diffusers", scheduler["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def pipe_of(folder: Path, cls: Any = diffusers.StableDiffusionPipeline) -> Any:
    pipe = cls.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_picture(folder: Path) -> None:
    theirs = pipe_of(folder)("a red fox", num_inference_steps=6, guidance_scale=5.0, generator=seeded(3)).images[0]
    model = TextToImage.from_pretrained(folder, device="cpu")
    assert difference(model("a red fox", seed=3, num_inference_steps=6, guidance_scale=5).images[0], theirs) <= 2


def seeded(number: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(number)


@pytest.mark.parametrize("name", OLD)
def test_old_schedulers(name: str, tmp_path: Path) -> None:
    config, said = OLD[name]
    folder = folder_with(tmp_path, config)
    notes = inspect_model(folder).notes
    assert len(notes) == len(said) and all(words in note for words, note in zip(said, notes, strict=True))
    theirs = pipe_of(folder)("a red fox", num_inference_steps=6, guidance_scale=5.0, generator=seeded(3)).images[0]
    ours = TextToImage.from_pretrained(folder, device="cpu")(
        "a red fox", seed=3, num_inference_steps=6, guidance_scale=5
    )
    assert difference(ours.images[0], theirs) <= 2


def test_the_size_of_the_first_converter(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1})
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    assert inspect_model(folder).configs["unet"]["sample_size"] == 8, "written by today's diffusers"
    path.write_text(json.dumps({**config, "_diffusers_version": "0.2.4"}))
    found = inspect_model(folder)
    assert found.geometry is not None and "sample_size: 8 is taken as 64" in found.notes[0]
    assert pipe_of(folder).unet.config.sample_size * 2 == found.geometry.width


def test_the_inpainting_pipeline_corrects_other_keys(tmp_path: Path) -> None:
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": False}
    found = inspect_model(folder_with(tmp_path, config, "StableDiffusionInpaintPipeline"))
    assert [note.split(": ", 1)[1].split(",")[0] for note in found.notes] == [
        "steps_offset: 0 is taken as 1", "skip_prk_steps: False is taken as True",
    ]  # fmt: skip


def test_sdxl_is_not_corrected(tmp_path: Path) -> None:
    tiny_sdxl(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text()), "timestep_spacing": "leading", "steps_offset": 0}
    path.write_text(json.dumps(config))
    found = inspect_model(tmp_path)
    assert not found.notes and found.scheduler_config["steps_offset"] == 0


@pytest.mark.parametrize("stated", ["DDPMScheduler", "DDIMScheduler"])
def test_a_ddim_pipeline_makes_ddim_of_any_scheduler(stated: str, tmp_path: Path) -> None:
    tiny_ddpm(tmp_path, scheduler=stated)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["_class_name"] = "DDIMPipeline"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe: Any = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(batch_size=1, generator=seeded(2), num_inference_steps=20).images[0]
    ours = Unconditional.from_pretrained(tmp_path, device="cpu")(seed=2, num_inference_steps=20).images[0]
    assert difference(ours, theirs) <= 2
    assert len(inspect_model(tmp_path).notes) == (stated != "DDIMScheduler")


def test_the_index_names_the_class_of_the_scheduler(tmp_path: Path) -> None:
    """As where someone replaced the config and not the index: diffusers makes the index's class of it."""
    folder = folder_with(tmp_path, {"_class_name": "EulerAncestralDiscreteScheduler", "steps_offset": 1})
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    theirs = pipe_of(folder)("a red fox", num_inference_steps=6, guidance_scale=5.0, generator=seeded(3)).images[0]
    ours = TextToImage.from_pretrained(folder, device="cpu")(
        "a red fox", seed=3, num_inference_steps=6, guidance_scale=5
    )
    assert difference(ours.images[0], theirs) <= 2
    assert "EulerAncestralDiscreteScheduler is taken as EulerDiscreteScheduler" in inspect_model(folder).notes[0]


def test_keys_of_nobody_in_a_scheduler(tmp_path: Path) -> None:
    config = {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1, "timestep_values": None}
    assert not inspect_model(folder_with(tmp_path, config)).notes
    (note,) = inspect_model(folder_with(tmp_path, {**config, "beta_stat": 0.1})).notes
    assert "scheduler_config.json: not used" in note and "beta_stat" in note


@pytest.mark.parametrize("solver", ["ddim", "euler_ancestral", "sde-dpmpp_2m"])
@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_inpainting_draws_what_the_pipeline_draws(solver: str, strength: float, sdxl: bool, tmp_path: Path) -> None:
    (tiny_sdxl if sdxl else tiny_stable_diffusion)(tmp_path)
    cls = diffusers.StableDiffusionXLInpaintPipeline if sdxl else diffusers.StableDiffusionInpaintPipeline
    pipe: Any = cls.from_pretrained(tmp_path, **({} if sdxl else {"safety_checker": None}))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = {
        "ddim": diffusers.DDIMScheduler.from_config(pipe.scheduler.config),
        "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config),
        "sde-dpmpp_2m": diffusers.DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="sde-dpmsolver++"
        ),
    }[solver]
    picture = Image.new("RGB", (32, 32), (20, 160, 60))
    picture.paste((255, 255, 255), (16, 0, 32, 32))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    given: dict[str, Any] = {"strength": strength, "num_inference_steps": 10, "guidance_scale": 5.0}
    theirs = pipe("a fox", image=picture, mask_image=mask, generator=seeded(9), width=32, height=32, **given).images[0]
    model = ImageToImage.from_pretrained(tmp_path, device="cpu").with_scheduler(solver)
    ours = model("a fox", image=picture, mask_image=mask, seed=9, **given).images[0]
    assert difference(ours, theirs) <= 2
