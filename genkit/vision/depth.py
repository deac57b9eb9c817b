"""How far or near each pixel is: DPT (Ranftl et al. 2021) and Depth Anything (Yang et al. 2024)."""

from __future__ import annotations

import torch

from genkit.errors import HostError, InputError
from genkit.vision.models import Sense
from genkit.vision.preprocess import read_size

MOST_PIXELS = 2**22  # that the network reads at once, of all pictures in a batch


class Depth(Sense):
    """Maps of depth, in the model's own measure.

    Models of relative depth give nearness: the larger, the nearer. Those of metric depth give metres.
    """

    sense = "depth estimator"

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the depth (B, H, W) of uint8 pictures (B, 3, H, W), float32 on the CPU.

        Raises InputError as `pixels` does, and HostError where the network's result is not a number.
        """
        maps = self.maps(self.pixels(pictures))
        if not bool(maps.isfinite().all()):
            raise HostError(self.not_a_number())
        return resized(maps, (pictures.shape[-2], pictures.shape[-1]))

    def pixels(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return uint8 pictures (B, 3, H, W) as the model reads them: on its device, in its dtype.

        Raises InputError for pictures so narrow that nothing of them, or too many pixels, would be read, and for those
        that would not be read as squares by a network that takes everything for a square.
        """
        height, width = pictures.shape[-2:]
        down, across = read_size(height, width, self.loaded.processor_config)
        least = self._patch()
        if down < least or across < least:
            raise InputError(
                f"{width}x{height} pixels would be read at {across}x{down}, but the model looks at patches of {least}"
            )
        if down != across and self._own_vit():
            raise InputError(
                f"{width}x{height} pixels would be read at {across}x{down}, but a DPT with a ViT of its own reads "
                "squares: set keep_aspect_ratio to false in preprocessor_config.json"
            )
        if down * across > MOST_PIXELS:
            raise InputError(
                f"{width}x{height} pixels would be read at {across}x{down}, more than {MOST_PIXELS}: crop or shrink it"
            )
        return super().pixels(pictures)

    def _patch(self) -> int:
        config = self.model.config
        inner = getattr(config, "backbone_config", None)
        side = getattr(inner, "patch_size", None) or config.patch_size
        return int(max(side) if isinstance(side, list | tuple) else side)

    def _own_vit(self) -> bool:
        config = self.model.config
        return bool(getattr(config, "is_hybrid", False)) or config.backbone_config is None

    def maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the depth (B, h, w), float32 on the CPU, as the network gives it, of what `pixels` prepared."""
        self.batch = min(self.batch, max(1, MOST_PIXELS // (pixels.shape[-2] * pixels.shape[-1])))

        def look(part: slice) -> torch.Tensor:
            found: torch.Tensor = self.model(pixel_values=pixels[part].to(self.device)).predicted_depth
            return found.float().cpu()

        return torch.cat(self.in_batches(len(pixels), look))

    def not_a_number(self) -> str:
        """Return what is said of a picture whose depth is NaN or infinite."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"depth by {self.loaded.info.name} is not a number in {kind}: use --dtype float32"


def resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return maps (B, h, w) at another size, (height, width), by bicubic interpolation between pixel centres."""
    found = torch.nn.functional.interpolate(maps[:, None], size=size, mode="bicubic", align_corners=False)
    return found[:, 0]
