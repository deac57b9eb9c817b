"""LoRA weights to files, under the names that others look for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from genkit.components.original import backward, original_name, unet_modules

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
LEVELS = 4  # of blocks, as many as a UNet may have: their names do not depend on how many it has
KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}


def merged_weights(network: torch.nn.Module, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a network's weights with its adapters, if any, merged into them, in float32.

    stored: the weights as in their files, to which the adapters are added: the network may hold them in less precision.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = {n.replace(".base_layer", ""): w.detach() for n, w in network.state_dict().items() if ".lora_" not in n}
    weights = {name: stored.get(name, weight) for name, weight in own.items()}
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):
            key = f"{name}.weight"
            layer: Any = module
            update = layer.get_delta_weight("default").detach().float()
            weights[key] = weights[key].to(update) + update
    return weights


def write_lora(folder: Path, networks: Mapping[str, Any], alpha: float, told: Mapping[str, str]) -> None:
    """Write the adapters of `networks` twice: pytorch_lora_weights.safetensors, as diffusers and PEFT read them, and
    kohya.safetensors, as kohya's scripts and most interfaces do; told: its metadata besides. Raises OSError.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    found: dict[str, torch.Tensor] = {}
    scaled: dict[str, torch.Tensor] = {}  # by alpha / rank, for readers that ignore alpha
    configs: dict[str, Any] = {}
    for name, network in networks.items():
        plain = network.peft_config["default"].to_dict()
        for key, value in get_peft_model_state_dict(network).items():
            weight = found[f"{name}.{key}"] = value.detach().float().cpu().contiguous()
            scaled[f"{name}.{key}"] = weight * (alpha / plain["r"]) if ".lora_B." in key else weight
        plain["lora_alpha"] = plain["r"]
        configs |= {f"{name}.{k}": sorted(v) if isinstance(v, set) else v for k, v in plain.items()}
    folder.mkdir()
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(configs, default=str, sort_keys=True)}
    save_file(scaled, folder / "pytorch_lora_weights.safetensors", metadata=metadata)
    config = networks["unet"].config if "unet" in networks else None
    metadata = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_alpha": str(alpha), **told}
    metadata |= base_version(config, told.get("modelspec.prediction_type") == "v")
    save_file(kohya_names(found, alpha, config), folder / "kohya.safetensors", metadata=metadata)


def base_version(unet: Any, velocity: bool) -> dict[str, str]:
    """Return what kohya's scripts write of the base model; nothing for one that they do not know."""
    if unet is None:
        return {}
    if getattr(unet, "addition_embed_type", None) == "text_time":
        names = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif unet.cross_attention_dim == 768:
        names = "sd_v1", "stable-diffusion-v1"
    elif unet.cross_attention_dim == 1024:
        names = ("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512")
    else:
        return {}
    return {"ss_base_model_version": names[0], "modelspec.architecture": f"{names[1]}/lora"}


def kohya_names(adapters: Mapping[str, torch.Tensor], alpha: float, unet: Any = None) -> dict[str, torch.Tensor]:
    """Return adapters named lora_unet_down_blocks_0_…_to_q.lora_down.weight, .lora_up.weight and .alpha.

    unet: its config; SDXL's blocks have the names of its first code there: lora_unet_input_blocks_4_1_….
    """
    two = getattr(unet, "addition_embed_type", None) == "text_time"  # SDXL
    prefixes = PREFIXES | ({"text_encoder": "lora_te1"} if two else {})
    found = {}
    for key, value in adapters.items():
        part, _, rest = key.partition(".")
        module, _, kind = rest.removesuffix(".weight").rpartition(".")
        inner = module if part == "unet" or module.startswith("text_model.") else f"text_model.{module}"
        inner = sgm_name(inner, unet.layers_per_block) if part == "unet" and two else inner
        name = f"{prefixes[part]}_{inner.replace('.', '_')}"
        found[f"{name}.{KOHYA[kind]}.weight"] = value
        found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found


def sgm_name(module: str, layers: int) -> str:
    """Return a module of SDXL's UNet as its first code (sgm) calls it: down_blocks.1.attentions.0 is input_blocks.4.1.

    layers: of each block, before what halves or doubles the size.
    """
    if "_block" not in module:
        return module
    return original_name(module, backward(unet_modules(LEVELS, layers, [True] * LEVELS))) or module
