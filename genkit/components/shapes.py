"""Checks of config keys that depend on each other, and the shapes of some weights that a config implies (landmarks).

Landmarks cover every width and depth in a config. A config whose landmarks are all in the weight file describes a
network of about the file's size, so that building it takes no unexpected memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from genkit.errors import InputError

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]
# Keys whose value, if it is a list, has an entry for each block.
PER_BLOCK = (
    "down_block_types", "up_block_types", "layers_per_block", "only_cross_attention", "transformer_layers_per_block",
    "attention_head_dim",
)  # fmt: skip


def check_blocks(config: Config, where: str) -> None:
    """Check that lists have an entry for each block, and that norm_num_groups divides every width."""
    blocks = len(config["block_out_channels"])
    for key in PER_BLOCK:
        value = config.get(key)
        if isinstance(value, list) and len(value) != blocks:
            raise InputError(f"{where}: {key}: has {len(value)} entries, but block_out_channels has {blocks}")
    groups = config["norm_num_groups"]
    for width in config["block_out_channels"]:
        if groups is not None and width % groups:
            raise InputError(f"{where}: norm_num_groups: {groups} does not divide block_out_channels' {width}")


def check_unet(config: Config, where: str) -> None:
    """Check a UNet2DConditionModel, whose `attention_head_dim` is the number of heads: diffusers keeps the misnomer."""
    _check_unet(config, where)
    text_time = config["addition_embed_type"] is not None  # SDXL's embedding of sizes and pooled text
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if (config[key] is not None) != text_time:
            verb = "is" if text_time else "is not"
            raise InputError(f"{where}: {key}: {config[key]}, but addition_embed_type {verb} 'text_time'")
    heads = per_block(config["attention_head_dim"], config)
    for kind, width, count in zip(config["down_block_types"], config["block_out_channels"], heads, strict=True):
        if "CrossAttn" in kind and width % count:
            raise InputError(f"{where}: attention_head_dim: {count} heads do not divide block_out_channels' {width}")


def check_unet2d(config: Config, where: str) -> None:
    """Check a UNet2DModel, whose `attention_head_dim` is the width of a head; null means one head."""
    _check_unet(config, where)
    width = config["attention_head_dim"]
    attends = ["Attn" in kind for kind in config["down_block_types"]]
    attends[-1] |= config["add_attention"] and config["mid_block_type"] is not None  # the middle block's width
    for channels, attention in zip(config["block_out_channels"], attends, strict=True):
        if width is not None and attention and channels % width:
            raise InputError(f"{where}: attention_head_dim: {width} does not divide block_out_channels' {channels}")
    if config["time_embedding_type"] == "learned" and config["num_train_timesteps"] is None:
        raise InputError(f"{where}: num_train_timesteps: null, but time_embedding_type is 'learned'")


def _check_unet(config: Config, where: str) -> None:
    check_blocks(config, where)
    inpaints = "cross_attention_dim" in config and config["in_channels"] == 2 * config["out_channels"] + 1
    if config["out_channels"] != config["in_channels"] and not inpaints:
        raise InputError(
            f"{where}: out_channels: {config['out_channels']}, but in_channels is {config['in_channels']}: networks "
            "that take a picture as well (but for inpainting), or that predict a variance, are not supported"
        )


def head_widths(unet: Config) -> set[int]:
    """Return the widths of the attention heads of a UNet, those that it may not use among them."""
    channels, heads = unet["block_out_channels"], per_block(unet["attention_head_dim"], unet)
    if unet.get("cross_attention_dim") is not None:  # where the key is the number of heads
        return {width // count for width, count in zip(channels, heads, strict=True)}
    return {head or width for width, head in zip(channels, heads, strict=True)}


def check_clip(config: Config, where: str) -> None:
    """Check that the number of heads divides hidden_size, and that a patch is no larger than the picture."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if width % heads:
        raise InputError(f"{where}: num_attention_heads: {heads} do not divide hidden_size {width}")
    if "patch_size" in config and config["patch_size"] > config["image_size"]:
        raise InputError(f"{where}: patch_size: {config['patch_size']} is more than image_size {config['image_size']}")


def check_clip_pair(config: Config, where: str) -> None:
    """Check the text and the vision config of a CLIPModel."""
    check_clip(config["text_config"], f"{where}: text_config")
    check_clip(config["vision_config"], f"{where}: vision_config")


def check_siglip(config: Config, where: str) -> None:
    """Check the text and the vision config of a SiglipModel, whose embeddings have the width of its vision network."""
    check_clip_pair(config, where)
    text, vision = config["text_config"], config["vision_config"]
    width = text["projection_size"] or text["hidden_size"]
    if width != vision["hidden_size"]:
        raise InputError(
            f"{where}: text_config: projection_size: {width}, but vision_config has hidden_size {vision['hidden_size']}"
        )


def unet(config: Config) -> Shapes:
    """Landmarks of UNet2DModel and UNet2DConditionModel."""
    widths = config["block_out_channels"]
    layers = per_block(config["layers_per_block"], config)
    depths = per_block(config.get("transformer_layers_per_block", 1), config)
    k_in, k_out = config.get("conv_in_kernel", 3), config.get("conv_out_kernel", 3)
    found: Shapes = {
        "conv_in.weight": (widths[0], config["in_channels"], k_in, k_in),
        "conv_out.weight": (config["out_channels"], widths[0], k_out, k_out),
    }
    if config["time_embedding_dim"]:
        found["time_embedding.linear_2.bias"] = (config["time_embedding_dim"],)
    if config.get("time_cond_proj_dim"):  # of the guidance scale
        found["time_embedding.cond_proj.weight"] = (widths[0], config["time_cond_proj_dim"])
    if config.get("addition_embed_type"):
        found["add_embedding.linear_1.weight"] = (4 * widths[0], config["projection_class_embeddings_input_dim"])
    for i, (kind, width, count, depth) in enumerate(
        zip(config["down_block_types"], widths, layers, depths, strict=True)
    ):
        found[f"down_blocks.{i}.resnets.{count - 1}.conv2.weight"] = (width, width, 3, 3)
        found[f"up_blocks.{len(widths) - 1 - i}.resnets.{count}.conv2.weight"] = (width, width, 3, 3)
        if kind == "CrossAttnDownBlock2D":
            block = f"down_blocks.{i}.attentions.{count - 1}.transformer_blocks.{depth - 1}"
            found[f"{block}.attn2.to_k.weight"] = (width, config["cross_attention_dim"])
    return found


def check_control(config: Config, where: str) -> None:
    """Check a ControlNetModel, which is built like the first half of a UNet2DConditionModel."""
    check_unet({**config, "out_channels": config["in_channels"]}, where)


def control(config: Config) -> Shapes:
    """Landmarks of ControlNetModel."""
    widths, hints = config["block_out_channels"], config["conditioning_embedding_out_channels"]
    depths = per_block(config["transformer_layers_per_block"], config)
    last = (config["layers_per_block"] + 1) * len(widths) - 1  # the input, and each level's blocks and downsampler
    found: Shapes = {
        "conv_in.weight": (widths[0], config["in_channels"], 3, 3),
        "controlnet_cond_embedding.conv_in.weight": (hints[0], config["conditioning_channels"], 3, 3),
        "controlnet_cond_embedding.conv_out.weight": (widths[0], hints[-1], 3, 3),
        f"controlnet_down_blocks.{last}.weight": (widths[-1], widths[-1], 1, 1),
        "controlnet_mid_block.weight": (widths[-1], widths[-1], 1, 1),
    }
    for i, (one, other) in enumerate(itertools.pairwise(hints)):
        found[f"controlnet_cond_embedding.blocks.{2 * i + 1}.weight"] = (other, one, 3, 3)
    if config["addition_embed_type"]:
        found["add_embedding.linear_1.weight"] = (4 * widths[0], config["projection_class_embeddings_input_dim"])
    for i, (kind, width, depth) in enumerate(zip(config["down_block_types"], widths, depths, strict=True)):
        found[f"down_blocks.{i}.resnets.{config['layers_per_block'] - 1}.conv2.weight"] = (width, width, 3, 3)
        if kind == "CrossAttnDownBlock2D":
            block = f"down_blocks.{i}.attentions.{config['layers_per_block'] - 1}.transformer_blocks.{depth - 1}"
            found[f"{block}.attn2.to_k.weight"] = (width, config["cross_attention_dim"])
    return found


def vae(config: Config) -> Shapes:
    """Landmarks of AutoencoderKL."""
    widths, latent, layers = config["block_out_channels"], config["latent_channels"], config["layers_per_block"]
    found: Shapes = {
        "encoder.conv_in.weight": (widths[0], config["in_channels"], 3, 3),
        "encoder.conv_out.weight": (2 * latent, widths[-1], 3, 3),
        "decoder.conv_in.weight": (widths[-1], latent, 3, 3),
        "decoder.conv_out.weight": (config["out_channels"], widths[0], 3, 3),
    }
    for i, width in enumerate(widths):
        found[f"encoder.down_blocks.{i}.resnets.{layers - 1}.conv2.weight"] = (width, width, 3, 3)
        found[f"decoder.up_blocks.{len(widths) - 1 - i}.resnets.{layers}.conv2.weight"] = (width, width, 3, 3)
    return found


def clip_text(config: Config, prefix: str = "") -> Shapes:
    """Landmarks of CLIPTextModel."""
    width = config["hidden_size"]
    return {
        f"{prefix}embeddings.token_embedding.weight": (config["vocab_size"], width),
        f"{prefix}embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
        **_clip_layers(config, prefix),
    }


def clip_text_projected(config: Config) -> Shapes:
    """Landmarks of CLIPTextModelWithProjection."""
    projection = {"text_projection.weight": (config["projection_dim"], config["hidden_size"])}
    return {**clip_text(config, "text_model."), **projection}


def clip(config: Config) -> Shapes:
    """Landmarks of CLIPModel."""
    text, vision, projected = config["text_config"], config["vision_config"], config["projection_dim"]
    width, side, patch = vision["hidden_size"], vision["image_size"], vision["patch_size"]
    return {
        **clip_text(text, "text_model."),
        "vision_model.embeddings.patch_embedding.weight": (width, vision["num_channels"], patch, patch),
        "vision_model.embeddings.position_embedding.weight": ((side // patch) ** 2 + 1, width),
        **_clip_layers(vision, "vision_model."),
        "text_projection.weight": (projected, text["hidden_size"]),
        "visual_projection.weight": (projected, width),
    }


def siglip(config: Config) -> Shapes:
    """Landmarks of SiglipModel, which has no class token and pools the patches by attention."""
    text, vision = config["text_config"], config["vision_config"]
    width, side, patch = vision["hidden_size"], vision["image_size"], vision["patch_size"]
    return {
        **clip_text(text, "text_model."),
        "text_model.head.weight": (width, text["hidden_size"]),
        "vision_model.embeddings.patch_embedding.weight": (width, vision["num_channels"], patch, patch),
        "vision_model.embeddings.position_embedding.weight": ((side // patch) ** 2, width),
        **_clip_layers(vision, "vision_model."),
        "vision_model.head.probe": (1, 1, width),
        "logit_scale": (1,),
        "logit_bias": (1,),
    }


def _clip_layers(config: Config, prefix: str) -> Shapes:
    last = f"{prefix}encoder.layers.{config['num_hidden_layers'] - 1}"
    return {f"{last}.mlp.fc1.weight": (config["intermediate_size"], config["hidden_size"])}


def per_block(value: Any, config: Config) -> list[Any]:
    """Return a config value as a list with an entry for each block."""
    return list(value) if isinstance(value, list | tuple) else [value] * len(config["block_out_channels"])
