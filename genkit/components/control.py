"""ControlNets (Zhang et al. 2023): a folder, a hub id or a single file, checked against the UNet that they steer."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.components.families import FAMILIES, count, unet_config
from genkit.components.folder import inspect_network, locate
from genkit.components.hub import fetch_weights
from genkit.components.info import Part
from genkit.components.original import backward, control_modules, renamed
from genkit.components.registry import BESIDE, NETWORKS
from genkit.components.single import STEERS, kind_of, named, network_part
from genkit.components.weights import PICKLES, Tensor, hash_once, read_file, wanted_weights
from genkit.device.memory import CONTROL
from genkit.errors import HostError, InputError, shown
from genkit.files import place, read_json, user_path

PREFIX = "control_model."  # of its keys where a file holds more than the ControlNet
HINT = "controlnet_cond_embedding.conv_in.weight"
# What must be as in the UNet, whose activations it adds to
_EQUAL = (
    "cross_attention_dim", "block_out_channels", "layers_per_block", "down_block_types", "addition_embed_type",
    "projection_class_embeddings_input_dim",
)  # fmt: skip
_HINTS = "conditioning_embedding_out_channels"
# Other networks that steer a UNet, by a key that one of them has
OTHERS = {
    r"model\.diffusion_model\.": "a model: give it with --model",
    "task_embedding": "a ControlNet for several kinds of pictures (Union), which genkit does not have",
    r"lllite_unet": "a ControlNet-LLLite, which genkit does not have",
    r"lora_controlnet": "a Control-LoRA, which genkit does not have; the ControlNet that it was made from is taken",
    r"(adapter\.)?body\.\d": "a T2I-Adapter, which genkit does not have",
    r"image_proj|ip_adapter": "an IP-Adapter, which genkit does not have",
}


def read_control(name: str | Path, variant: str | None = None) -> Part:
    """Return a ControlNet by the name of its folder, its hub id, or its .safetensors file; of weights, headers alone.

    A file may have diffusers' names or the original ones. variant: of weights, where the folder has it; one that has
    weights in half precision alone is read, too. Raises InputError, naming file, key and value, for anything that is
    missing, malformed or another kind of network.
    """
    path = user_path(name)
    return _read(str(name), variant, _state(path))


@functools.lru_cache(64)
def _read(name: str, variant: str | None, _state: tuple[Any, ...]) -> Part:
    path = user_path(name)
    if path.is_file() and path.suffix not in PICKLES:
        return _read_file(path)
    folder, on_hub = locate(name, [])
    if not (folder / "config.json").exists() and (folder / CONTROL / "config.json").exists():  # of a whole pipeline
        folder = folder / CONTROL
    stem = NETWORKS["ControlNetModel"].stem
    if on_hub:
        fetch_weights(str(name), folder, (file.name for file in wanted_weights(folder, stem, None)))
        return inspect_network(folder, CONTROL)
    there = [v for v in (variant, None, "fp16") if all(file.exists() for file in wanted_weights(folder, stem, v))]
    return inspect_network(folder, CONTROL, there[0] if there else None)


def is_control(folder: Path) -> bool:
    """Whether a folder is that of a ControlNet alone."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("_class_name") in BESIDE[CONTROL][1]


def control_in(name: str) -> Part | None:
    """Return the ControlNet that a folder or file of this name is; None for anything else."""
    path = user_path(name)
    if path.is_dir():
        return read_control(name) if is_control(path) else None
    steers = path.suffix == ".safetensors" and path.is_file() and kind_of({t.key: t for t in read_file(path)[0]})
    return read_control(name) if steers == f"is {STEERS}" else None


def facts(part: Part) -> dict[str, Any]:
    """Return what `genkit inspect` and `genkit models` print of a ControlNet, as JSON values."""
    family = FAMILIES.get(part.config["cross_attention_dim"])
    known = {} if family is None else {"family": family}
    return {"kind": CONTROL, **known, "parameters": part.parameters, "dtype": part.dtype}


def check_fit(part: Part, unet: Mapping[str, Any], vae: Mapping[str, Any] | None) -> None:
    """Raise InputError unless a ControlNet was made for UNets and VAEs with these configs."""
    if "cross_attention_dim" not in unet:
        raise InputError(f"{part.where}: is a ControlNet, and this model, which reads no prompt, takes none")
    stated = {**part.config, "out_channels": part.config["in_channels"]}
    for key in ("out_channels", *_EQUAL):  # a UNet for inpainting reads more channels than it predicts
        if _plain(stated[key]) != _plain(unet[key]):
            families = [FAMILIES.get(config["cross_attention_dim"]) for config in (stated, unet)]
            kinds = "" if None in families or families[0] == families[1] else f" (it is of {families[0]})"
            raise InputError(
                f"{part.where}: {key}: {shown(stated[key])}, but the model's UNet has {shown(unet[key])}: "
                f"it is a ControlNet for another kind of model{kinds}"
            )

    halved, levels = len(part.config[_HINTS]), 1 if vae is None else len(vae["block_out_channels"])
    if halved != levels:
        raise InputError(
            f"{part.where}: {_HINTS}: makes pictures {2 ** (halved - 1)} times smaller, the model's VAE "
            f"{2 ** (levels - 1)} times"
        )


def network_hash(name: str) -> str:
    """Return a hash over the weights and the config of a ControlNet; its name where it is not there."""
    try:
        part = read_control(name)
    except (InputError, HostError):
        return name
    told = [*(hash_once(file) for file in part.files), sorted(part.config.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _state(path: Path) -> tuple[Any, ...]:
    """Return what changes when files of a ControlNet do."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    except OSError:
        return ()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_file(path: Path) -> Part:
    where = place(path)
    found = {tensor.key: tensor for tensor in read_file(path)[0]}
    own = {key[len(PREFIX) :]: tensor for key, tensor in found.items() if key.startswith(PREFIX)} or found
    if HINT in own:
        levels, layers = count(own, r"down_blocks\.(\d+)\."), count(own, r"down_blocks\.0\.resnets\.(\d+)\.")
        hints = 1 + count(own, r"controlnet_cond_embedding\.blocks\.(\d+)\.") // 2
    elif "input_hint_block.0.weight" in own:
        levels = 1 + sum(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", key) is not None for key in own)
        layers = count(own, r"zero_convs\.(\d+)\.") // levels - 1
        hints = 1 + (count(own, r"input_hint_block\.(\d+)\.") - 3) // 4
    else:
        kind = next((kind for pattern, kind in OTHERS.items() if any(re.match(pattern, key) for key in found)), None)
        raise InputError(f"{where}: {kind_of(found) if kind is None else f'is {kind}'}; --control takes a ControlNet")
    modules = control_modules(levels, layers, hints)
    tensors = named(own, modules, where, "")
    return network_part(CONTROL, "ControlNetModel", _config(tensors, modules, hints, where), tensors, where)


def _config(tensors: Mapping[str, Tensor], modules: Mapping[str, str], hints: int, where: str) -> dict[str, Any]:
    """Return the config that the weights' shapes imply: that of a UNet, whose first half it is, and its own keys."""
    back = backward(modules)
    shapes = {renamed(name, back) or name: tensor.shape for name, tensor in tensors.items()}
    channels = shapes["input_blocks.0.0.weight"][1:2]
    config = unet_config({**shapes, "out.2.weight": channels}, f"{where}: {CONTROL}")
    table = NETWORKS["ControlNetModel"].table
    embedding = "controlnet_cond_embedding"
    widths = [tensors[HINT].shape[0]]
    widths += [tensors[f"{embedding}.blocks.{2 * i + 1}.weight"].shape[0] for i in range(hints - 1)]
    return {
        **{key: value for key, value in config.items() if key in table},
        "conditioning_channels": tensors[HINT].shape[1],
        "conditioning_embedding_out_channels": widths,
    }
