"""Checkpoints for few steps, by their published scheduler configs and LoRAs: diffusers' pictures, within 2 of 255."""

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
from genkit.components import inspect_model
from genkit.components.families import SCHEDULERS
from genkit.job.plan import plan_job
from genkit.options import Options
from genkit.sampling.guidance import embedded_guidance
from genkit.sampling.tuning import tune_model
from genkit.schedulers import Scheduler
from genkit.training.loop import train
from genkit.training.recipe import make_recipe
from tests.sampling.test_parity import assert_same, seeds
from tests.tiny import tiny_sdxl, tiny_stable_diffusion

COMMON: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "trained_betas": None, "clip_sample": False, "prediction_type": "epsilon", "sample_max_value": 1.0,
}  # fmt: skip
OLD = {**COMMON, "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True, "interpolation_type": "linear"}
CONFIGS: dict[str, dict[str, Any]] = {
    # stabilityai/stable-diffusion-xl-base-1.0, which the LoRAs are for
    "base": {"_class_name": "EulerDiscreteScheduler", **OLD, "timestep_spacing": "leading", "use_karras_sigmas": False},
    # stabilityai/sdxl-turbo, stabilityai/sd-turbo
    "turbo": {"_class_name": "EulerAncestralDiscreteScheduler", **OLD, "timestep_spacing": "trailing"},
    "sd-turbo": {
        "_class_name": "EulerDiscreteScheduler", **OLD, "timestep_spacing": "trailing", "sigma_max": None,
        "sigma_min": None, "timestep_type": "discrete", "use_karras_sigmas": False,
    },
    # SimianLuo/LCM_Dreamshaper_v7
    "lcm": {
        "_class_name": "LCMScheduler", **COMMON, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995,
        "original_inference_steps": 50, "rescale_betas_zero_snr": False, "set_alpha_to_one": True, "steps_offset": 0,
        "thresholding": False, "timestep_scaling": 10.0, "timestep_spacing": "leading",
    },
}  # fmt: skip


def reads_guidance(folder: Path, width: int) -> Path:
    """Give a folder's UNet a guidance embedding of `width`, with weights that are heard."""
    unet = folder / "unet"
    stated = {**json.loads((unet / "config.json").read_text()), "time_cond_proj_dim": width}
    weights = load_file(unet / "diffusion_pytorch_model.safetensors")
    network: Any = diffusers.UNet2DConditionModel.from_config(stated)
    torch.manual_seed(0)
    weights["time_embedding.cond_proj.weight"] = torch.randn(network.time_embedding.cond_proj.weight.shape)
    network.load_state_dict(weights)
    network.save_pretrained(unet)
    return folder


def named(folder: Path, key: str, value: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def xl(folder: Path, config: str) -> Path:
    tiny_sdxl(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(CONFIGS[config]))
    named(folder, "scheduler", ["diffusers", CONFIGS[config]["_class_name"]])
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("few")
    found = {name: xl(root / name, name) for name in ("base", "turbo")}
    found["sd-turbo"] = tiny_stable_diffusion(root / "sd-turbo", CONFIGS["sd-turbo"])
    found["lcm-xl"] = reads_guidance(xl(root / "lcm-xl", "lcm"), 32)
    found["lcm"] = reads_guidance(tiny_stable_diffusion(root / "lcm", CONFIGS["lcm"]), 31)
    named(found["lcm"], "_class_name", "LatentConsistencyModelPipeline")
    return found


@pytest.fixture(scope="module")
def generators(folders: dict[str, Path]) -> dict[str, TextToImage]:
    return {name: TextToImage.from_pretrained(folder, device="cpu") for name, folder in folders.items()}


def pipeline(folder: Path, scheduler: Callable[[Any], Any] | None = None, **options: Any) -> Any:
    options |= {} if (folder / "text_encoder_2").is_dir() else {"safety_checker": None}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler(pipe.scheduler.config)
    return pipe


def drawn(gen: TextToImage, **row: Any) -> Image.Image:
    (result,) = gen.stream([Request(prompt="a red fox", seed=3, **row)])
    assert result.status == "done", result.reason
    return result.image


def compare(gen: TextToImage, pipe: Any, row: dict[str, Any], **theirs: Any) -> Image.Image:
    same = {k: v for k, v in row.items() if k != "scheduler"}
    ours = drawn(gen, **row)
    assert_same([ours], pipe("a red fox", generator=seeds(3), **same, **theirs).images)
    return ours


@pytest.mark.parametrize("name", ["turbo", "sd-turbo"])
def test_turbo_folders(folders: dict[str, Path], generators: dict[str, TextToImage], name: str) -> None:
    pipe = pipeline(folders[name])
    for steps in (1, 2, 4):
        compare(generators[name], pipe, {"num_inference_steps": steps, "guidance_scale": 0.0})


@pytest.mark.parametrize("name", ["turbo", "lcm"])
def test_from_a_picture(folders: dict[str, Path], generators: dict[str, TextToImage], name: str) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((32, 32))
    cls = diffusers.StableDiffusionXLImg2ImgPipeline if name == "turbo" else diffusers.StableDiffusionImg2ImgPipeline
    extra = {"requires_aesthetics_score": False} if name == "turbo" else {"requires_safety_checker": False}
    given = {k: v for k, v in pipeline(folders[name]).components.items() if k != "image_encoder" or name == "turbo"}
    pipe: Any = cls(**given, **extra)
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {
        "strength": 0.5,
        "num_inference_steps": 4,
        "guidance_scale": 0.0 if name == "turbo" else 3.0,
    }
    made = pipe("a red fox", image=picture, generator=seeds(3), **settings).images
    ours = ImageToImage.from_generator(generators[name])("a red fox", picture, seed=3, **settings)
    assert_same(ours.images, made)
    assert ours.results[0].nfe == 2


TRAILING = {"timestep_spacing": "trailing"}
SOLVERS: dict[str, tuple[Any, Callable[[Any], Any], dict[str, Any], list[float]]] = {
    "lightning": ("euler_trailing", lambda c: diffusers.EulerDiscreteScheduler.from_config(c, **TRAILING), {}, [0.0]),
    "lcm": ("lcm", diffusers.LCMScheduler.from_config, {}, [0.0, 1.0, 1.5, 2.0]),
    "hyper": ("ddim_trailing", lambda c: diffusers.DDIMScheduler.from_config(c, **TRAILING), {}, [0.0]),
    "tcd": ({"solver": "tcd", "eta": 0.3}, diffusers.TCDScheduler.from_config, {"eta": 0.3}, [0.0]),
    "tcd, all noise": ({"solver": "tcd", "eta": 1.0}, diffusers.TCDScheduler.from_config, {"eta": 1.0}, [0.0, 1.5]),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_schedulers_of_the_loras(folders: dict[str, Path], generators: dict[str, TextToImage], name: str) -> None:
    ours, theirs, options, guidances = SOLVERS[name]
    pipe = pipeline(folders["base"], theirs)
    for guidance in guidances:
        for steps in (1, 4):
            row = {"num_inference_steps": steps, "guidance_scale": guidance, "scheduler": ours}
            compare(generators["base"], pipe, row, **options)


@pytest.mark.parametrize("solver", ["lcm", "tcd"])
def test_one_step_at_800(folders: dict[str, Path], generators: dict[str, TextToImage], solver: str) -> None:
    theirs = diffusers.LCMScheduler if solver == "lcm" else diffusers.TCDScheduler
    eta = {"eta": 1.0} if solver == "tcd" else {}
    row = {"guidance_scale": 0.0, "scheduler": {"solver": solver, "timesteps": [800], **eta}}
    ours = compare(generators["base"], pipeline(folders["base"], theirs.from_config), row, timesteps=[800], **eta)
    other = drawn(generators["base"], guidance_scale=0.0, num_inference_steps=1, scheduler={"solver": solver, **eta})
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(other)).max() > 2


def test_one_step_that_predicts_the_picture(folders: dict[str, Path]) -> None:
    def sample(config: Any) -> Any:
        return diffusers.EulerDiscreteScheduler.from_config(config, prediction_type="sample", **TRAILING)

    gen = TextToImage.from_pretrained(folders["base"], device="cpu", prediction="sample")
    row = {"num_inference_steps": 1, "guidance_scale": 0.0, "scheduler": "euler_trailing"}
    compare(gen, pipeline(folders["base"], sample), row)


# What latent-consistency/lcm-lora-sdxl adapts
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


def lcm_lora(folder: Path, out: Path) -> Path:
    """Write a LoRA of all layers that LCM-LoRA adapts, in its names."""
    drawn = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for key, weight in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        layer = key.removesuffix(".weight")
        if key.endswith(".weight") and layer.endswith(TARGETS):
            name, rest = f"lora_unet_{layer.replace('.', '_')}", [1] * (weight.dim() - 2)
            down = torch.randn((2, *weight.shape[1:]), generator=drawn)
            up = torch.randn((weight.shape[0], 2, *rest), generator=drawn)
            found |= {f"{name}.lora_down.weight": 0.3 * down, f"{name}.lora_up.weight": 0.3 * up}
            found[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(found, out)
    return out


def test_lcm_lora(folders: dict[str, Path], tmp_path: Path) -> None:
    file = lcm_lora(folders["base"], tmp_path / "pytorch_lora_weights.safetensors")
    pipe = pipeline(folders["base"], diffusers.LCMScheduler.from_config)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    gen = TextToImage.from_pretrained(folders["base"], device="cpu")
    lora = [{"file": str(file), "weight": 1.0}]
    for guidance in (1.0, 1.5):
        row = {"num_inference_steps": 4, "guidance_scale": guidance, "scheduler": "lcm"}
        ours = drawn(gen, **row, loras=lora)
        made = pipe("a red fox", generator=seeds(3), num_inference_steps=4, guidance_scale=guidance).images
        assert_same([ours], made)
        assert np.abs(np.asarray(ours, dtype=int) - np.asarray(drawn(gen, **row))).max() > 2


@pytest.mark.parametrize("name", ["lcm", "lcm-xl"])
def test_networks_that_read_the_guidance(
    folders: dict[str, Path], generators: dict[str, TextToImage], name: str
) -> None:
    gen, pipe = generators[name], pipeline(folders[name])
    pictures = []
    for guidance in (0.0, 1.0, 8.5):
        ours = compare(gen, pipe, {"num_inference_steps": 4, "guidance_scale": guidance})
        pictures.append(np.asarray(ours, dtype=int))
    assert np.abs(pictures[0] - pictures[2]).max() > 2, "the guidance says nothing"
    rows = [
        Request(id=str(k), prompt="a fox", seed=k, guidance_scale=1.0 + k, num_inference_steps=2 + k) for k in (0, 1, 2)
    ]
    mixed = {r.id: r for r in gen.stream(rows, slots=4)}
    assert [mixed[str(k)].nfe for k in (0, 1, 2)] == [2, 3, 4]
    for row in rows:
        (alone,) = gen.stream([row])
        assert_same([mixed[str(row.id)].image], [alone.image])


@pytest.mark.parametrize("width", [2 * 8, 2 * 8 + 1, 256])
def test_the_embedding_of_the_guidance(width: int) -> None:
    pipe: Any = diffusers.StableDiffusionXLPipeline
    for scale in (0.0, 1.0, 1.5, 8.5):
        theirs = pipe.get_guidance_scale_embedding(None, torch.tensor([scale - 1]), embedding_dim=width)[0]
        assert torch.equal(embedded_guidance(scale, width), theirs)


def test_defaults_that_the_files_show(folders: dict[str, Path], tmp_path: Path) -> None:
    def of(folder: Path) -> tuple[Any, Any]:
        found = inspect_model(folder).defaults
        return found.get("num_inference_steps"), found.get("guidance_scale")

    assert of(folders["lcm"]) == of(folders["lcm-xl"]) == (4, 8.5)
    assert of(xl(tmp_path / "merged", "lcm")) == (4, 1.0)
    assert of(folders["turbo"]) == (None, 5.0), "trailing is also what networks of velocity have"
    job = plan_job([Request(prompt="a")], Options(model=str(folders["lcm"]), quiet=True), {})
    assert (job.rows[0].num_inference_steps, job.rows[0].guidance_scale, job.calls) == (4, 8.5, 4)


def test_a_negative_prompt_without_guidance_is_noted(folders: dict[str, Path]) -> None:
    for name, guidance in (("turbo", 0.0), ("lcm", 8.5)):
        rows = [Request(prompt="a", negative_prompt="b", guidance_scale=guidance), Request(prompt="a")]
        job = plan_job(rows, Options(model=str(folders[name])), {})
        assert "negative_prompt: has no effect without guidance, in 1 rows" in job.notes
    quiet = plan_job([Request(prompt="a", negative_prompt="b")], Options(model=str(folders["turbo"])), {})
    assert not any("negative_prompt" in note for note in quiet.notes)


def test_what_such_networks_cannot_do_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    row = Request(prompt="a", guidance_interval=[0.0, 0.5])
    with pytest.raises(InputError, match="guidance_interval: this model reads the guidance scale itself"):
        generate([row], tmp_path / "run", model=str(folders["lcm"]), quiet=True)
    with pytest.raises(InputError, match="reads the guidance scale itself: nothing to tune"):
        tune_model(str(folders["lcm"]), 4, out=tmp_path)
    recipe = make_recipe(
        {"task": "lora", "model": str(folders["lcm"]), "data": {"path": str(tmp_path)}, "lora": {"rank": 2}}
    )
    with pytest.raises(InputError, match="reads the guidance scale is not trained here"):
        train(recipe, tmp_path / "trained", device="cpu", quiet=True)
    with pytest.raises(InputError, match="num_inference_steps: 51 is more than the 50 of original_inference_steps"):
        generate([Request(prompt="a", num_inference_steps=51)], tmp_path / "run", model=str(folders["lcm"]), quiet=True)
    path = folders["lcm"] / "unet" / "config.json"
    before = path.read_text()
    path.write_text(before.replace('"time_cond_proj_dim": 31', '"time_cond_proj_dim": 30'))
    try:
        with pytest.raises(InputError, match=r"cond_proj\.weight"):
            inspect_model(folders["lcm"])
    finally:
        path.write_text(before)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    row = Request(id="a", prompt="a fox", seed=1, num_images=2)
    run: dict[str, Any] = {"model": str(folders["lcm"]), "quiet": True, "device": "cpu"}
    assert generate([row], tmp_path, **run).new == 2
    whole = (tmp_path / "images" / "a-01.png").read_bytes()
    (tmp_path / "images" / "a-01.png").unlink()
    assert generate([row], tmp_path, **run).new == 1
    assert (tmp_path / "images" / "a-01.png").read_bytes() == whole


@pytest.mark.parametrize("family", SCHEDULERS)
def test_other_solvers_on_single_files_clip_nothing(family: str) -> None:
    own = Scheduler.from_config({**SCHEDULERS[family], "prediction_type": "epsilon"})
    for solver in ("ddim", "ddpm", "lcm", "tcd", "pndm", "euler_ancestral"):
        assert own.with_options(solver=solver).clip is None
