"""A training run goes on where its data and model lie now; LoRA files that every reader takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from genkit import InputError
from genkit.components.lora import sgm_name
from genkit.training.loop import train
from genkit.training.recipe import read_recipe
from tests.colours import colour_folder
from tests.tiny import tiny_sdxl, tiny_stable_diffusion


def recipe(data: str, model: str, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "task": "text-to-image", "model": model, "data": {"path": data, "validation": 0.0, "resolution": 16},
        "train": {"steps": steps, "batch_size": 2}, "evaluate": {"every": 0}, "save": {"every": 1}, **more,
    }  # fmt: skip


def run(out: Path, given: dict[str, Any]) -> None:
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(given))
    train(read_recipe(path), out, device="cpu", quiet=True)


def test_data_and_model_that_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    colour_folder(tmp_path / "set", 6)
    tiny_stable_diffusion(tmp_path / "sd")
    out = tmp_path / "run"
    run(out, recipe("set", "sd", 1))
    run(out, recipe(str(tmp_path / "set"), "./sd/", 2))
    shutil.move("set", "disk2")
    shutil.move("sd", "models")
    run(out, recipe("~/disk2", str(tmp_path / "models"), 3))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line][-1] == 3
    next((tmp_path / "disk2").glob("*.txt")).write_text("another caption")
    with pytest.raises(InputError, match=r"run.json: data: was "):
        run(out, recipe("disk2", "models", 4))


def test_a_network_for_other_pictures_is_one_line(tmp_path: Path) -> None:
    colour_folder(tmp_path / "set", 4)
    unet = {
        "_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1, "sample_size": 16,
        "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    given = recipe(str(tmp_path / "set"), "", 1)
    del given["model"]
    given |= {"task": "unconditional", "networks": {"unet": unet}, "scheduler": {"_class_name": "DDPMScheduler"}}
    with pytest.raises(InputError, match=r"networks.unet.in_channels: 1, but pictures are trained on in 3 \(RGB\)"):
        run(tmp_path / "run", given)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_lora_of_sdxl_as_every_reader_takes_it(alpha: float, tmp_path: Path) -> None:
    """Both files, also without their metadata, are the same change in diffusers' pipeline."""
    import diffusers

    colour_folder(tmp_path / "set", 4)
    tiny_sdxl(tmp_path / "xl")
    lora = {"rank": 4, "alpha": alpha}
    given = recipe(str(tmp_path / "set"), str(tmp_path / "xl"), 2, lora=lora)
    run(tmp_path / "run", {**given, "task": "lora", "train": {"steps": 2, "batch_size": 2, "learning_rate": 0.05}})
    folder = tmp_path / "run" / "lora"
    with safe_open(folder / "kohya.safetensors", "pt") as file:
        told, names = file.metadata(), list(file.keys())
    assert told["ss_base_model_version"] == "sdxl_base_v1-0"
    assert any(name.startswith("lora_unet_input_blocks_") for name in names)
    assert not any("down_blocks" in name or "up_blocks" in name or "mid_block" in name for name in names)
    merged = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    plain = load_file(tmp_path / "xl" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.allclose(merged[name], plain[name], atol=1e-4) for name in plain)
    for name in ("pytorch_lora_weights", "kohya"):
        bare = {k: v for k, v in load_file(folder / f"{name}.safetensors").items()}
        pipe: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl")
        pipe.load_lora_weights(bare)  # without metadata
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        found = pipe.unet.state_dict()
        worst = max(float((found[key] - merged[key]).abs().max()) for key in merged)
        assert worst < 1e-5, (name, worst)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        ),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.resnets.1.conv1", "input_blocks.5.0.in_layers.2"),
        ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.attentions.2.transformer_blocks.1.ff.net.2", "output_blocks.2.1.transformer_blocks.1.ff.net.2"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.2.resnets.0.conv_shortcut", "output_blocks.6.0.skip_connection"),
        ("conv_in", "conv_in"),
    ],
)
def test_names_of_sdxls_first_code(module: str, name: str) -> None:
    assert sgm_name(module, 2) == name
