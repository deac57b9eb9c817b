"""Checks of a network's config, and that the networks of a model fit together, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genkit.components.geometry import REFINER_IDS, TIME_IDS, Geometry
from genkit.components.info import Part
from genkit.components.registry import NETWORKS
from genkit.components.rules import check_config
from genkit.errors import InputError


def check_network(
    cls: str, config: Mapping[str, Any], where: str, inner: str = ": ", notes: list[str] | None = None
) -> dict[str, Any]:
    """Return the config of a network of class `cls` with defaults filled in.

    inner: joins `where` and the name of a config inside the config, for messages. notes, and InputError: as with
    `check_config`.
    """
    network = NETWORKS[cls]
    checked = check_config(config, network.table, where, network.unused, notes)
    for key, (table, unused) in network.nested.items():
        new, old = (
            check_config(checked[name] or {}, table, f"{where}{inner}{name}", unused, notes)
            for name in (key, f"{key}_dict")
        )
        checked[key] = new if checked.pop(f"{key}_dict") is None else old  # transformers prefers the old name
    network.check(checked, where)
    return checked


def check_together(kind: str, parts: Mapping[str, Part]) -> None:
    """Raise InputError unless the UNet reads the latents of the VAE and the embeddings of the text encoders."""
    unet = parts["unet"]
    if (unet.kind == "UNet2DConditionModel") != (kind == "text-to-image"):
        raise InputError(f"{unet.where}: _class_name: {unet.kind} does not belong in a model that is {kind}")
    if kind == "text-to-image":
        _check_conditioning(parts)
    channels = unet.config["in_channels"]
    if "vae" in parts:
        if not Geometry.of(unet.config, parts["vae"].config).inpaints:
            _check_equal(unet, "in_channels", parts["vae"], "latent_channels")
    elif channels not in (1, 3):
        raise InputError(f"{unet.where}: in_channels: {channels} is not 1 or 3, and there is no vae to decode it")


def _check_conditioning(parts: Mapping[str, Part]) -> None:
    """Check that the UNet reads the embeddings of its text encoder, or of both of SDXL's (Podell et al. 2023)."""
    unet, text, second = parts["unet"], parts.get("text_encoder"), parts.get("text_encoder_2")
    added = unet.config["addition_embed_type"]
    if (added is None) != (second is None):
        verb = "has no use for" if added is None else "needs"
        raise InputError(f"{unet.where}: addition_embed_type: {added!r} {verb} a text_encoder_2")
    if second is None:
        assert text is not None
        _check_equal(unet, "cross_attention_dim", text, "hidden_size")
        return
    if text is None:
        _check_equal(unet, "cross_attention_dim", second, "hidden_size")
    else:
        _check_widths(unet, text, second)
    projection = second.config["projection_dim"]
    if projection is None:
        raise InputError(f"{second.where}: projection_dim: None is no width, which SDXL needs")
    count = len(TIME_IDS if text is not None else REFINER_IDS)
    inputs = unet.config["projection_class_embeddings_input_dim"]  # of the sizes and the pooled embedding
    if inputs != count * unet.config["addition_time_embed_dim"] + projection:
        raise InputError(
            f"{unet.where}: projection_class_embeddings_input_dim: {inputs}, but {count} times addition_time_embed_dim "
            f"and projection_dim of {second.where} are {count * unet.config['addition_time_embed_dim'] + projection}"
        )


def _check_widths(unet: Part, text: Part, second: Part) -> None:
    width, widths = unet.config["cross_attention_dim"], [part.config["hidden_size"] for part in (text, second)]
    if width != sum(widths):
        raise InputError(
            f"{unet.where}: cross_attention_dim: {width}, but {text.where} and {second.where} have hidden_size "
            f"{widths[0]} and {widths[1]}"
        )


def _check_equal(one: Part, key: str, other: Part, other_key: str) -> None:
    value, needed = one.config[key], other.config[other_key]
    if value != needed:
        raise InputError(f"{one.where}: {key}: {value}, but {other.where} has {other_key} {needed}")
