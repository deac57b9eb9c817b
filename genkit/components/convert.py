"""Conversion between a single file and a folder in diffusers' layout, in both directions; weights keep their values."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.components.info import ModelInfo, Part
from genkit.components.loading import load_tokenizer, stored_weights
from genkit.components.original import QKV, backward, openclip_modules, renamed, unet_modules, vae_modules
from genkit.components.single import UNET, VAE
from genkit.components.writing import write_index, write_network
from genkit.durable import disk, sync_folder, sync_tree
from genkit.errors import InputError
from genkit.files import place

if TYPE_CHECKING:
    import torch

MARKS = {"epsilon": "epsilon", "v_prediction": "v"}


def convert(info: ModelInfo, out: Path) -> dict[str, Any]:
    """Write a text-to-image model to `out`: a single file if it ends in .safetensors, else a folder of diffusers.

    Nothing is left half-written. Raises InputError for another kind of model and for an `out` that exists, HostError
    where the disk refuses.
    """
    if info.kind != "text-to-image":
        raise InputError(f"{info.name}: is of kind {info.kind}: only text-to-image models have both layouts")
    if os.path.lexists(out):
        raise InputError(f"{place(out)}: is there already")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{place(out.absolute().parent)}: there is no such folder")
    single = out.suffix == ".safetensors"
    partial = out.with_name(f".{out.name}.partial")
    with disk(out):
        _remove(partial)  # of an earlier start that was killed
        try:
            (_write_single if single else _write_folder)(info, partial)
            sync_tree(partial)
            os.replace(partial, out)
            sync_folder(out.absolute().parent)
        finally:
            _remove(partial)
    bytes_ = out.stat().st_size if single else sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"from": info.name, "to": str(out), "layout": "single file" if single else "diffusers", "bytes": bytes_}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_folder(info: ModelInfo, out: Path) -> None:
    for name, part in info.parts.items():
        write_network(part.kind, part.config, _contiguous(stored_weights(part)), out / name)
    texts = {"tokenizer": info.text_config, "tokenizer_2": info.configs.get("text_encoder_2", {})}
    for name, text in texts.items():
        tokenizer = load_tokenizer(getattr(info, name), text, info.padding.get(name))
        if tokenizer is not None:
            tokenizer.save_pretrained(out / name)
    write_index(out, info.parts, info.scheduler_config, info.zero_empty)


def _write_single(info: ModelInfo, out: Path) -> None:
    from safetensors.torch import save_file

    kind = str(info.scheduler_config.get("prediction_type", "epsilon"))
    if kind not in MARKS:
        raise InputError(f"{info.name}: prediction_type: {kind} has no mark in a single file")
    weights: dict[str, torch.Tensor] = {}
    for name, part in info.parts.items():
        weights |= _original_names(info, name, part)
    metadata = {"format": "pt", "modelspec.prediction_type": MARKS[kind]}
    save_file(_contiguous(weights), out, metadata=metadata)


def _original_names(info: ModelInfo, name: str, part: Part) -> dict[str, torch.Tensor]:
    """Return the weights of a part under the names, and in the shapes, of the original layout."""
    stored, config = stored_weights(part), part.config
    sdxl = "text_encoder_2" in info.parts
    if name in ("unet", "vae"):
        levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
        if name == "unet" and not isinstance(layers, int):
            raise InputError(
                f"{part.where}: layers_per_block: {layers}: the original layout has the same in each block"
            )
        attention = ["CrossAttn" in kind for kind in config["down_block_types"]]
        modules = unet_modules(levels, layers, attention) if name == "unet" else vae_modules(levels, layers)
        found = _renamed(stored, modules, part, UNET if name == "unet" else VAE)
        for key, weight in found.items() if name == "vae" else ():
            if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", key) and weight.dim() == 2:
                found[key] = weight[:, :, None, None]
        return found
    if name == "text_encoder" and (sdxl or config["hidden_act"] == "quick_gelu"):
        prefix = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
        return {f"{prefix}text_model.{key}": weight for key, weight in stored.items()}
    place_of = 0 if info.refines else 1
    prefix = f"conditioner.embedders.{place_of}.model." if sdxl else "cond_stage_model.model."
    return _as_open_clip(stored, part, prefix)


def _as_open_clip(stored: Mapping[str, torch.Tensor], part: Part, prefix: str) -> dict[str, torch.Tensor]:
    import torch

    plain = {key.removeprefix("text_model."): weight for key, weight in stored.items()}
    found: dict[str, torch.Tensor] = {}
    for i in range(part.config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            thirds = [plain.pop(f"encoder.layers.{i}.self_attn.{name}.{kind}") for name in QKV]
            found[f"{prefix}transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(thirds)
    found[f"{prefix}positional_embedding"] = plain.pop("embeddings.position_embedding.weight")
    if "text_projection.weight" in plain:
        found[f"{prefix}text_projection"] = plain.pop("text_projection.weight").T
    return found | _renamed(plain, openclip_modules(part.config["num_hidden_layers"]), part, prefix)


def _renamed(
    stored: Mapping[str, torch.Tensor], modules: Mapping[str, str], part: Part, prefix: str
) -> dict[str, torch.Tensor]:
    back, found = backward(modules), {}
    for key, weight in stored.items():
        name = renamed(key, back)
        if name is None:
            raise InputError(f"{part.where}: {key}: has no name in the original layout")
        found[prefix + name] = weight
    return found


def _contiguous(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.contiguous() for name, weight in weights.items()}
