"""The configs that a single file's weights imply: widths and depths by their shapes, the rest by its family.

Values that no shape shows are those of the configs that Stability AI and RunwayML published with their weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from genkit.errors import InputError

Shape = tuple[int, ...]
HEAD = 64  # width of an attention head of every CLIP text model and of the UNets since SD 2
# The width of the text embeddings that a UNet reads
FAMILIES = {768: "SD 1", 1024: "SD 2", 2048: "SDXL", 1280: "SDXL refiner"}
SIDES = {"SD 1": 64, "SD 2": 64, "SDXL": 128, "SDXL refiner": 128}
VELOCITY_SIDE = 96  # of SD 2's latents where the UNet predicts velocity: trained at 768x768
CLIP_IDS = {"pad_token_id": 1, "bos_token_id": 49406, "eos_token_id": 49407}
_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
    "set_alpha_to_one": False, "skip_prk_steps": True,  # for other classes, which rows may name
}  # fmt: skip
SCHEDULERS: dict[str, dict[str, Any]] = {
    "SD 1": {"_class_name": "PNDMScheduler", **_SCHEDULE},
    "SD 2": {"_class_name": "DDIMScheduler", **_SCHEDULE},
    "SDXL": {"_class_name": "EulerDiscreteScheduler", **_SCHEDULE, "timestep_spacing": "leading"},
    "SDXL refiner": {"_class_name": "EulerDiscreteScheduler", **_SCHEDULE, "timestep_spacing": "leading"},
}


def unet_config(shapes: Mapping[str, Shape], where: str) -> dict[str, Any]:
    """Return the config of a UNet2DConditionModel, given the shapes of its weights under their original names.

    Its addition_time_embed_dim, where it has one, is that of SDXL. Raises InputError for what is no such UNet.
    """
    levels = 1 + sum(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", key) is not None for key in shapes)
    layers = (count(shapes, r"input_blocks\.(\d+)\.") - levels) // levels
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    resnets = [shapes.get(f"input_blocks.{n}.0.in_layers.2.weight") for n in firsts]
    start, end = shapes.get("input_blocks.0.0.weight"), shapes.get("out.2.weight")
    if layers < 1 or start is None or end is None or len(start) != 4 or None in resnets:
        raise InputError(f"{where}: is no UNet of Stable Diffusion: its input_blocks are not {levels} levels of blocks")
    depths = [count(shapes, rf"input_blocks\.{n}\.1\.transformer_blocks\.(\d+)\.") for n in firsts]
    middle = count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    if not middle:
        raise InputError(f"{where}: its middle block has no attention, which UNets of Stable Diffusion have")
    attention = next(key for key in shapes if key.endswith("attn2.to_k.weight"))
    context = shapes[attention][-1]
    projection = next(key for key in shapes if key.endswith(".1.proj_in.weight"))
    linear = len(shapes[projection]) == 2
    widths = [shape[0] for shape in resnets if shape is not None]
    per_level = [depth or 1 for depth in depths[:-1]] + [depths[-1] or middle]
    label = shapes.get("label_emb.0.0.weight")
    return {
        "sample_size": 64,
        "in_channels": start[1],
        "out_channels": end[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": 1 if set(per_level) == {1} else per_level,
        "attention_head_dim": [max(1, width // HEAD) for width in widths] if linear else 8,
        "use_linear_projection": linear,
        "cross_attention_dim": context,
        **({"addition_embed_type": "text_time", "addition_time_embed_dim": 256} if label else {}),
        **({"projection_class_embeddings_input_dim": label[1]} if label else {}),
    }


def vae_config(shapes: Mapping[str, Shape], family: str, where: str) -> dict[str, Any]:
    """Return the config of an AutoencoderKL, given the shapes of its weights under their original names."""
    levels = count(shapes, r"encoder\.down\.(\d+)\.")
    layers = count(shapes, r"encoder\.down\.0\.block\.(\d+)\.")
    widths = [shapes.get(f"encoder.down.{level}.block.0.conv2.weight") for level in range(levels)]
    latent, pixels = shapes.get("decoder.conv_in.weight"), shapes.get("encoder.conv_in.weight")
    if not layers or None in widths or latent is None or pixels is None or len(latent) < 2 or len(pixels) < 2:
        raise InputError(f"{where}: is no VAE of Stable Diffusion: encoder.down or decoder.conv_in is incomplete")
    large = family.startswith("SDXL")
    return {
        "in_channels": pixels[1],
        "out_channels": pixels[1],
        "latent_channels": latent[1],
        "block_out_channels": [width[0] for width in widths if width is not None],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": SIDES.get(family, 64) * 2 ** (levels - 1),
        "scaling_factor": 0.13025 if large else 0.18215,
        "force_upcast": large,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip_config(shapes: Mapping[str, Shape], act: str, where: str, projection: int | None = None) -> dict[str, Any]:
    """Return the config of a CLIP text model, given the shapes of its weights under transformers' names."""
    table = shapes.get("embeddings.token_embedding.weight")
    positions = shapes.get("embeddings.position_embedding.weight")
    inner = shapes.get("encoder.layers.0.mlp.fc1.weight")
    if table is None or positions is None or inner is None or len(table) != 2:
        raise InputError(f"{where}: is no CLIP text model: embeddings or its first layer are not there")
    return {
        "vocab_size": table[0],
        "hidden_size": table[1],
        "intermediate_size": inner[0],
        "num_hidden_layers": count(shapes, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, table[1] // HEAD),
        "max_position_embeddings": positions[0],
        "hidden_act": act,
        "projection_dim": projection or table[1],
        **CLIP_IDS,
    }


def count(shapes: Mapping[str, Any], pattern: str) -> int:
    """Return one more than the highest number that the pattern finds at the start of a key, or 0."""
    found = (re.match(pattern, key) for key in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)
