"""Small pictures of unfinished latents: a linear map to colours, never the VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from genkit.sampling.codec import Codec

PATCHES, SIDE = 8, 16  # latents that a map is fitted to, and their sides
# By scaling factor, of VAEs with 4 channels at an eighth of the picture's sides: the maps of Stable Diffusion 1 and 2
# and of SDXL to red, green and blue from -1 to 1, (channels, 3), and what is added; as ComfyUI has them
# (comfy/latent_formats.py).
KNOWN = {
    0.18215: (
        [[0.3512, 0.2297, 0.3227], [0.3250, 0.4974, 0.2350], [-0.2829, 0.1762, 0.2721], [-0.2120, -0.2616, -0.7177]],
        [0.0, 0.0, 0.0],
    ),
    0.13025: (
        [[0.3651, 0.4232, 0.4341], [-0.2533, -0.0042, 0.1068], [0.1076, 0.1111, -0.0362], [-0.3165, -0.2492, -0.2188]],
        [0.1084, -0.0175, -0.0011],
    ),
}


class Preview:
    """The map of a model's latents. Its call returns (h, w, 3) uint8 for a latent (C, h, w)."""

    def __init__(self, codec: Codec, channels: int, device: torch.device) -> None:
        known = KNOWN.get(round(codec.scale, 5)) if channels == 4 and codec.pixels == 64 else None
        if codec.vae is None:
            factors = torch.eye(channels)[:, :3] if channels >= 3 else torch.ones(channels, 3)
            self.factors, self.bias = factors.to(device), torch.zeros(3, device=device)
        elif known is not None:
            self.factors, self.bias = (torch.tensor(part, device=device) for part in known)
        else:
            self.factors, self.bias = fitted(codec, channels, device)

    @torch.inference_mode()
    def __call__(self, latent: torch.Tensor) -> Any:
        colours = torch.tensordot(latent.float(), self.factors, dims=([0], [0])) + self.bias
        return (colours.nan_to_num() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()


@torch.inference_mode()
def fitted(codec: Codec, channels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (channels, 3) matrix and the (3,) constants with the least squares of errors over random latents.

    They are patches of four positions a side with some noise on top: latents of pictures are smooth.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    patches = torch.randn((PATCHES, channels, SIDE // 4, SIDE // 4), generator=generator)
    latents = torch.nn.functional.interpolate(patches, scale_factor=4.0)
    latents = latents + 0.2 * torch.randn(latents.shape, generator=generator)
    pictures = codec.decode(latents.to(device)).float().clamp(-1, 1)
    small = torch.nn.functional.adaptive_avg_pool2d(pictures, (SIDE, SIDE)).expand(-1, 3, -1, -1)
    points = latents.permute(0, 2, 3, 1).reshape(-1, channels).numpy().astype(np.float64)
    colours = small.permute(0, 2, 3, 1).reshape(-1, 3).cpu().numpy().astype(np.float64)
    found = np.linalg.lstsq(np.c_[points, np.ones(len(points))], colours, rcond=None)[0]
    whole = torch.from_numpy(found.astype(np.float32)).to(device)
    return whole[:-1], whole[-1]
