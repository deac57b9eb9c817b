"""ControlNets as a part of a model that one is trained for (Zhang et al. 2023, section 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from genkit.components import Components, ModelInfo
from genkit.components.checks import check_network
from genkit.components.compose import compose_model
from genkit.components.control import check_fit, read_control
from genkit.components.info import Part
from genkit.components.loading import construct
from genkit.components.registry import NETWORKS
from genkit.device.memory import CONTROL
from genkit.training.recipe import Recipe

HINTS = (16, 32, 96, 256)  # widths of the layers that make pictures as small as latents, by diffusers' default


def model_of(recipe: Recipe, kind: str) -> ModelInfo:
    """Return the model of a recipe, with the ControlNet that is trained for it.

    Raises InputError as `compose_model`, and for a ControlNet of another kind of model.
    """
    networks = {name: value for name, value in recipe.networks.items() if name != CONTROL}
    info = compose_model(kind, recipe.model, networks, recipe.scheduler)
    if recipe.task != "controlnet":
        return info
    stored, vae = recipe.networks.get("controlnet"), info.configs.get("vae")
    part = new_control(info.parts["unet"], vae) if stored is None else read_control(str(stored))
    check_fit(part, info.configs["unet"], vae)
    return dataclasses.replace(info, parts={**info.parts, CONTROL: part})


def new_control(unet: Part, vae: Any) -> Part:
    """Return a ControlNet without files, for a UNet and the config of its VAE, as `ControlNetModel.from_unet` does."""
    levels = 1 if vae is None else len(vae["block_out_channels"])
    config = {key: value for key, value in unet.config.items() if key in NETWORKS["ControlNetModel"].table}
    config["conditioning_embedding_out_channels"] = [HINTS[min(level, len(HINTS) - 1)] for level in range(levels)]
    where = f"networks.{CONTROL}"
    return dataclasses.replace(
        unet, name=CONTROL, kind="ControlNetModel", config=check_network("ControlNetModel", config, where),
        files=(), tensors={}, left_out={}, origin=where,
    )  # fmt: skip


def copy_first_half(parts: Components) -> None:
    """Give a new ControlNet the weights of the UNet's first half, in their precision.

    Its convolutions that lead into the UNet are zero, so that it changes nothing at first.
    """
    if parts.controlnet is not None and not parts.info.parts[CONTROL].files:
        own, first = parts.controlnet.state_dict(), parts.unet.state_dict()
        parts.controlnet.load_state_dict({name: first.get(name, weight) for name, weight in own.items()})


def trained_control(recipe: Recipe, parts: Components) -> dict[str, torch.nn.Module]:
    """Return the ControlNet, to be trained in float32."""
    return {CONTROL: parts.controlnet.float().requires_grad_(True)}


def drawing_control(parts: Components) -> Any:
    """Return the ControlNet as the generators use it: in the precision of the UNet, which may not be its own."""
    if parts.controlnet.dtype == parts.unet.dtype:
        return parts.controlnet
    network = construct(parts.info.parts[CONTROL]).to(parts.device, parts.unet.dtype).eval().requires_grad_(False)
    network.load_state_dict(parts.controlnet.state_dict())
    return network


def residuals(
    network: Any, x: torch.Tensor, t: torch.Tensor, conditioning: torch.Tensor, told: dict[str, Any]
) -> dict[str, Any]:
    """Return what the ControlNet adds to the activations of a UNet, as its keyword arguments, in the dtype of x.

    x: noised latents (B, C, h, w); conditioning: (B, 3, H, W) uint8; told: the UNet's conditioning. The ControlNet
    reads float32, as its weights are, also where the frozen UNet is in half precision.
    """
    added = told.get("added_cond_kwargs")
    down, middle = network(
        x.float(),
        t,
        encoder_hidden_states=told["encoder_hidden_states"].float(),
        controlnet_cond=conditioning.float() / 255,
        added_cond_kwargs=None if added is None else {**added, "text_embeds": added["text_embeds"].float()},
        return_dict=False,
    )
    return {
        "down_block_additional_residuals": tuple(part.to(x.dtype) for part in down),
        "mid_block_additional_residual": middle.to(x.dtype),
    }
