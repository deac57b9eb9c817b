"""ControlNets as people have them: folders, hub ids, files with diffusers' names or the original ones; other kinds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from genkit import cli
from genkit.components import inspect_model
from genkit.components.checks import check_network
from genkit.components.control import _config, check_fit, control_in, network_hash, read_control
from genkit.components.loading import load_network
from genkit.components.original import backward, control_modules, renamed
from genkit.components.weights import Tensor
from genkit.errors import InputError
from tests.components.checkpoints import folder_of
from tests.tiny import tiny_controlnet, tiny_stable_diffusion

CPU = torch.device("cpu")
FAMILIES = ("SD 1", "SD 2", "SDXL")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a model and of a ControlNet for it, of each family."""
    at = tmp_path_factory.mktemp("families")
    for number, family in enumerate(FAMILIES):
        embedded = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + 96}
        folder_of(family, at / f"model{number}", **(embedded if family == "SDXL" else {}))
        tiny_controlnet(at / f"net{number}", at / f"model{number}")
    return {family: at / f"net{number}" for number, family in enumerate(FAMILIES)}


def original(weights: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the weights under the names of lllyasviel/ControlNet."""
    back = backward(control_modules(2, 1, 2))
    names = {name: renamed(name, back) for name in weights}
    assert None not in names.values() and len(set(names.values())) == len(names)
    return {f"{prefix}{names[name]}": weight for name, weight in weights.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["diffusers", "original", "whole"])
def test_a_file_is_its_folder(made: dict[str, Path], tmp_path: Path, family: str, layout: str) -> None:
    """whole: as in control_v11p_sd15_canny.safetensors, whose keys begin with control_model."""
    folder = made[family]
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    if layout != "diffusers":
        weights = original(weights, "control_model." * (layout == "whole"))
    save_file(weights, tmp_path / "net.safetensors")
    one, other = read_control(folder), read_control(tmp_path / "net.safetensors")
    unet = inspect_model(folder.parent / folder.name.replace("net", "model"))
    check_fit(other, unet.configs["unet"], unet.configs["vae"])
    networks = [load_network(part, device=CPU, dtype=torch.float32) for part in (one, other)]
    width = unet.configs["unet"]["cross_attention_dim"]
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, width)
    added = {"text_embeds": torch.randn(2, 96), "time_ids": torch.rand(2, 6)} if family == "SDXL" else None
    given: dict[str, Any] = {"controlnet_cond": torch.rand(2, 3, 16, 16), "added_cond_kwargs": added}
    with torch.inference_mode():
        outputs = [network(x, t, cond, **given, return_dict=False) for network in networks]
    for mine, theirs in zip(outputs[1][0], outputs[0][0], strict=True):
        assert torch.equal(mine, theirs) and float(mine.abs().max()) > 0


def test_the_original_names_are_those_that_diffusers_converts(tmp_path: Path) -> None:
    """Of Stable Diffusion 1's depth, whose zero convolutions and hint block are numbered furthest."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    unet = UNet2DConditionModel(block_out_channels=(32, 32, 64, 64), cross_attention_dim=32, layers_per_block=2)
    network = ControlNetModel.from_unet(unet)
    back = backward(control_modules(4, 2, 4))
    weights = {f"control_model.{renamed(name, back)}": weight for name, weight in network.state_dict().items()}
    converted = convert_controlnet_checkpoint(weights, dict(network.config))
    assert converted.keys() == network.state_dict().keys()
    assert all(torch.equal(converted[name], weight) for name, weight in network.state_dict().items())
    save_file(weights, tmp_path / "net.safetensors")
    part = read_control(tmp_path / "net.safetensors")
    expected = {**network.config, "attention_head_dim": 8}
    assert {key: part.config[key] for key in part.config} == {
        key: list(expected[key]) if isinstance(expected[key], tuple) else expected[key] for key in part.config
    }


def test_folders_of_a_pipeline_variants_and_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_stable_diffusion(tmp_path / "model")
    tiny_controlnet(model / "controlnet", model)
    assert read_control(model).parameters == read_control(model / "controlnet").parameters
    index = json.loads((model / "model_index.json").read_text())
    pair = {"_class_name": "StableDiffusionControlNetPipeline", "controlnet": ["diffusers", "ControlNetModel"]}
    (model / "model_index.json").write_text(json.dumps({**index, **pair}))
    assert [note for note in inspect_model(model).notes if note.endswith("rows name it: give it with --control")]
    both = tmp_path / "both"
    tiny_controlnet(both, model)
    tiny_controlnet(both, model, variant="fp16")
    assert [file.name for file in read_control(both, "fp16").files] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert read_control(model / "controlnet", "fp16").files[0].name == "diffusion_pytorch_model.safetensors"
    half = tiny_controlnet(tmp_path / "half", model, variant="fp16")
    assert read_control(half).files[0].name == "diffusion_pytorch_model.fp16.safetensors"
    snapshot = tmp_path / "hub" / "models--someone--canny" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(both, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read_control("someone/canny").parameters == read_control(both).parameters
    assert network_hash("someone/canny") == network_hash(str(both))
    assert network_hash(str(both)) != network_hash(str(tiny_controlnet(tmp_path / "other", model, seed=9)))
    assert network_hash("someone/absent") == "someone/absent"


OTHERS = {
    "a LoRA": ("lora_unet_down.lora_up.weight", "is a LoRA"),
    "a Union": ("task_embedding", "several kinds of pictures"),
    "LLLite": ("lllite_unet_input_blocks.down.0.weight", "ControlNet-LLLite"),
    "a Control-LoRA": ("lora_controlnet", "Control-LoRA"),
    "a T2I-Adapter": ("body.0.block1.weight", "T2I-Adapter"),
    "an IP-Adapter": ("image_proj.norm.weight", "IP-Adapter"),
    "a checkpoint": ("model.diffusion_model.input_blocks.0.0.weight", "is a model: give it with --model"),
    "a UNet": ("down_blocks.0.resnets.0.conv1.weight", "one network in diffusers' layout"),
    "something": ("x", "no model that genkit knows"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_files_are_named(tmp_path: Path, kind: str) -> None:
    key, message = OTHERS[kind]
    save_file({key: torch.zeros(2, 2, 2)}, tmp_path / "file.safetensors")
    with pytest.raises(InputError, match=rf"file\.safetensors: .*{message}.*--control takes a ControlNet"):
        read_control(tmp_path / "file.safetensors")


def test_damaged_and_foreign_folders_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_stable_diffusion(tmp_path / "model")
    folder = tiny_controlnet(tmp_path / "net", model)
    with pytest.raises(InputError, match=r"class 'UNet2DConditionModel' is no controlnet: ControlNetModel"):
        read_control(model / "unet")
    (tmp_path / "old.pth").write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match=r"old\.pth: is refused"):
        read_control(tmp_path / "old.pth")
    config = json.loads((folder / "config.json").read_text())
    for key, value in (("global_pool_conditions", True), ("conditioning_channels", 4), ("auto_map", {"a": "b"})):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(InputError, match=key):
            read_control(folder)
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: w for name, w in weights.items() if "controlnet_mid" not in name}, path)
    with pytest.raises(InputError, match=r"controlnet_mid_block"):
        read_control(folder)
    name = "controlnet_mid_block.bias"
    save_file({**weights, name: torch.full_like(weights[name], np.nan)}, path)
    with pytest.raises(InputError, match="holds a NaN"):
        load_network(read_control(folder), device=CPU, dtype=torch.float32)


def test_what_is_said_of_them(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, model = made["SDXL"], made["SDXL"].parent / "model2"
    assert cli.run(["inspect", str(net), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["parameters"]) == ("controlnet", read_control(net).parameters)
    shutil.copy(net / "diffusion_pytorch_model.safetensors", tmp_path / "net.safetensors")
    assert cli.run(["inspect", str(tmp_path / "net.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == found["parameters"]
    for name in (net, tmp_path / "net.safetensors"):
        with pytest.raises(InputError, match="is a ControlNet: give it with --control"):
            inspect_model(name)
    assert cli.run(["models", str(net.parent)]) == 0
    assert "net2: controlnet, 3 million parameters" in capsys.readouterr().out
    assert control_in(str(model)) is None and control_in("emoji") is None


def test_a_control_net_of_another_model_is_refused(made: dict[str, Path]) -> None:
    model = inspect_model(made["SD 1"].parent / "model0")
    part = read_control(made["SDXL"])
    with pytest.raises(InputError, match="cross_attention_dim: 192, but the model's UNet has 64"):
        check_fit(part, model.configs["unet"], model.configs["vae"])
    with pytest.raises(InputError, match="2 times smaller, the model's VAE 1 times"):
        check_fit(read_control(made["SD 1"]), model.configs["unet"], None)
    real = {"cross_attention_dim": 768, "out_channels": 4}
    with pytest.raises(InputError, match=r"another kind of model \(it is of SDXL\)"):
        check_fit(dataclasses.replace(part, config={**part.config, "cross_attention_dim": 2048}), real, None)


# What the configs say that people have: of lllyasviel/sd-controlnet-canny, thibaud/controlnet-sd21-canny-diffusers and
# diffusers/controlnet-canny-sdxl-1.0; keys at their defaults left out.
_THREE = ["CrossAttnDownBlock2D"] * 3
PUBLISHED: dict[str, dict[str, Any]] = {
    "SD 1": {
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
        "down_block_types": [*_THREE, "DownBlock2D"],
    },
    "SD 2": {
        "attention_head_dim": [5, 10, 20, 20], "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024, "down_block_types": [*_THREE, "DownBlock2D"], "use_linear_projection": True,
    },
    "SDXL": {
        "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", *_THREE[1:]], "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "transformer_layers_per_block": [1, 2, 10],
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_config_of_a_published_one_is_read_off_its_weights(family: str) -> None:
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in PUBLISHED[family].items()}
    with torch.device("meta"):
        network = ControlNetModel(**told)
    modules = control_modules(len(told["block_out_channels"]), 2, 4)
    back = backward(modules)
    assert all(renamed(name, back) for name in network.state_dict())
    tensors = {
        name: Tensor(Path("x"), name, "F16", tuple(weight.shape)) for name, weight in network.state_dict().items()
    }
    checked = check_network("ControlNetModel", _config(tensors, modules, 4, "x"), "x")
    assert checked == check_network("ControlNetModel", PUBLISHED[family], "x")
