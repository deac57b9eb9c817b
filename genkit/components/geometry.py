"""The picture sizes that a model's networks allow, read off their configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# The numbers in the size conditioning (time_ids) of SDXL's UNet, in order, and in that of its refiner
TIME_IDS = ("original height", "original width", "crop top", "crop left", "target height", "target width")
REFINER_IDS = (*TIME_IDS[:4], "aesthetic score")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The picture sizes that a model's networks allow.

    channels: of a latent; scale: pixels a side of one latent; multiple: width and height must be multiples of
    it; width, height: the size it was trained at, in pixels; text: whether it takes a prompt; inpaints:
    whether its UNet reads beside the latent a mask and the latent of the picture without what it masks; sized: whether
    its UNet reads sizes and a pooled embedding of the prompt, as SDXL's; guidance_width: of the embedded guidance scale
    that its UNet reads, as latent consistency models do, in place of a second prediction; 0: it reads none;
    refines: whether it is SDXL's refiner, which finishes pictures; scored: whether aesthetic scores are read, by it or
    by the refiner beside it.
    """

    channels: int
    scale: int
    multiple: int
    width: int
    height: int
    text: bool
    inpaints: bool = False
    sized: bool = False
    guidance_width: int = 0
    refines: bool = False
    scored: bool = False

    @classmethod
    def of(cls, unet: Mapping[str, Any], vae: Mapping[str, Any] | None, refines: bool = False) -> Geometry:
        """Read it off the configs of the UNet and of the VAE (None for a network that works on pixels).

        refines: whether the model has SDXL's second text encoder alone, as its refiner.
        """
        scale = 1 if vae is None else 2 ** (len(vae["block_out_channels"]) - 1)
        text = unet.get("cross_attention_dim") is not None
        # UNet2DConditionModel carries skip sizes upwards and takes any latent; UNet2DModel doubles what it halved.
        halvings = 0 if text else len(unet["block_out_channels"]) - 1
        side = unet.get("sample_size") or (64 if text else 32)
        height, width = side if isinstance(side, list | tuple) else (side, side)
        channels = int(unet["in_channels"])
        inpaints = text and vae is not None and channels == 2 * vae["latent_channels"] + 1
        channels = int(vae["latent_channels"]) if vae is not None and inpaints else channels
        sized = unet.get("addition_embed_type") == "text_time"
        guidance = int(unet.get("time_cond_proj_dim") or 0)
        size = width * scale, height * scale
        return cls(channels, scale, scale * 2**halvings, *size, text, inpaints, sized, guidance, refines, refines)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (channels, rows, columns) of the latent of a width x height picture."""
        return self.channels, height // self.scale, width // self.scale
