"""Names of weights in the original layout of Stable Diffusion, one file for all networks, and in diffusers' layout.

Each table lists modules: original name -> diffusers' name. A key is renamed by the longest module that it begins with,
in either direction. Sources of the original names: CompVis/latent-diffusion (ldm/modules/diffusionmodules),
Stability-AI/generative-models (sgm) and mlfoundations/open_clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
VAE_RESNET = {"nin_shortcut": "conv_shortcut", **{name: name for name in ("norm1", "conv1", "norm2", "conv2")}}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")  # the thirds of open_clip's attn.in_proj, in order


def unet_modules(levels: int, layers: int, attention: Iterable[bool] = ()) -> dict[str, str]:
    """Return the modules of a UNet with `levels` resolutions and `layers` residual blocks in each.

    attention: whether each level, from the full resolution down, has attention. Only a conversion back to original
    names needs it: an upsampler is numbered after the attention of its block, if there is any.
    """
    attends = list(attention) or [True] * levels
    found = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
        **_inside("middle_block.0", "mid_block.resnets.0", RESNET),
        **_inside("middle_block.2", "mid_block.resnets.1", RESNET),
    }  # fmt: skip
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for i in range(layers):
            found |= _inside(f"input_blocks.{first + i}.0", f"down_blocks.{level}.resnets.{i}", RESNET)
            found[f"input_blocks.{first + i}.1"] = f"down_blocks.{level}.attentions.{i}"
        if level < levels - 1:
            found[f"input_blocks.{first + layers}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        first = level * (layers + 1)
        for i in range(layers + 1):
            found |= _inside(f"output_blocks.{first + i}.0", f"up_blocks.{level}.resnets.{i}", RESNET)
            found[f"output_blocks.{first + i}.1"] = f"up_blocks.{level}.attentions.{i}"
        if level < levels - 1:
            places = [2, 1] if attends[levels - 1 - level] else [1, 2]  # the first one is what `backward` finds
            for place in places[: 1 if attention else 2]:
                found[f"output_blocks.{first + layers}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return found


def control_modules(levels: int, layers: int, hints: int) -> dict[str, str]:
    """Return the modules of a ControlNet with `levels` resolutions, `layers` residual blocks in each, `hints` widths.

    The original is lllyasviel/ControlNet's cldm: between the convolutions of its input_hint_block are activations.
    """
    found = {name: other for name, other in unet_modules(levels, layers).items() if not name.startswith("out")}
    found["middle_block_out.0"] = "controlnet_mid_block"
    found |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(levels * (layers + 1))}
    convolutions = 2 * (hints - 1)
    found["input_hint_block.0"] = "controlnet_cond_embedding.conv_in"
    found |= {f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in range(convolutions)}
    found[f"input_hint_block.{2 * convolutions + 2}"] = "controlnet_cond_embedding.conv_out"
    return found


def vae_modules(levels: int, layers: int) -> dict[str, str]:
    """Return the modules of a VAE with `levels` resolutions and `layers` residual blocks in each of the encoder's."""
    found = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        found |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        found[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        found |= _inside(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", VAE_ATTENTION)
        for i in (0, 1):
            found |= _inside(f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}", VAE_RESNET)
    for level in range(levels):
        up = levels - 1 - level  # the original counts the decoder's levels from the full resolution
        for i in range(layers):
            found |= _inside(f"encoder.down.{level}.block.{i}", f"encoder.down_blocks.{level}.resnets.{i}", VAE_RESNET)
        for i in range(layers + 1):
            found |= _inside(f"decoder.up.{level}.block.{i}", f"decoder.up_blocks.{up}.resnets.{i}", VAE_RESNET)
        if level < levels - 1:
            found[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        if level > 0:
            found[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    return found


def openclip_modules(layers: int) -> dict[str, str]:
    """Return the modules of open_clip's text model with `layers` layers, but for attn.in_proj, which is split."""
    found = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    for i in range(layers):
        found |= _inside(f"transformer.resblocks.{i}", f"encoder.layers.{i}", CLIP_LAYER)
    return found


def renamed(key: str, modules: Mapping[str, str]) -> str | None:
    """Return a key under its other name, by the longest of `modules` that it begins with; None if there is none."""
    parts = key.split(".")
    for count in range(len(parts) - 1, 0, -1):
        other = modules.get(".".join(parts[:count]))
        if other is not None:
            return ".".join([other, *parts[count:]])
    return None


def original_name(module: str, back: Mapping[str, str]) -> str | None:
    """Return the original name of a whole module, or None. back: of `backward`."""
    found = renamed(f"{module}.", back)
    return None if found is None else found.removesuffix(".")


def backward(modules: Mapping[str, str]) -> dict[str, str]:
    """Return {diffusers' name: original name}."""
    found: dict[str, str] = {}
    for original, name in modules.items():
        found.setdefault(name, original)
    return found


def _inside(original: str, name: str, inner: Mapping[str, str]) -> dict[str, str]:
    return {f"{original}.{one}": f"{name}.{other}" for one, other in inner.items()}
