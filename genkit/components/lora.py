"""LoRA weights to files, under the names that others look for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}


def merged_weights(network: torch.nn.Module, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a network's weights with its adapters, if any, worked into what they adapt, in float32.

    stored: weights as their files have them, which the network may hold in less precision; these are what is adapted.
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
    configs: dict[str, Any] = {}
    for name, network in networks.items():
        for key, value in get_peft_model_state_dict(network).items():
            found[f"{name}.{key}"] = value.detach().float().cpu().contiguous()
        plain = network.peft_config["default"].to_dict()
        configs |= {f"{name}.{k}": sorted(v) if isinstance(v, set) else v for k, v in plain.items()}
    folder.mkdir()
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(configs, default=str, sort_keys=True)}
    save_file(found, folder / "pytorch_lora_weights.safetensors", metadata=metadata)
    metadata = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_alpha": str(alpha), **told}
    save_file(kohya_names(found, alpha), folder / "kohya.safetensors", metadata=metadata)


def kohya_names(adapters: Mapping[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """Return adapters named lora_unet_down_blocks_0_…_to_q.lora_down.weight, .lora_up.weight and .alpha."""
    two = any(key.startswith("text_encoder_2.") for key in adapters)
    prefixes = PREFIXES | ({"text_encoder": "lora_te1"} if two else {})
    found = {}
    for key, value in adapters.items():
        part, _, rest = key.partition(".")
        module, _, kind = rest.removesuffix(".weight").rpartition(".")
        inner = module if part == "unet" or module.startswith("text_model.") else f"text_model.{module}"
        name = f"{prefixes[part]}_{inner.replace('.', '_')}"
        found[f"{name}.{KOHYA[kind]}.weight"] = value
        found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found
