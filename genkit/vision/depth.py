"""How far or near each pixel is: DPT (Ranftl et al. 2021), Depth Anything (Yang et al. 2024), ZoeDepth (Bhat et al.
2023), GLPN (Kim et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch

from genkit.errors import HostError, InputError
from genkit.vision.models import Loaded, Sense
from genkit.vision.preprocess import mirrored_edge, read_size

MIRRORED = 5  # pixels of a side of which an edge can be mirrored
MOST_PIXELS = 2**22  # that the network reads at once, of all pictures in a batch


class Depth(Sense):
    """Maps of depth, in the model's own measure.

    Models of relative depth give nearness: the larger, the nearer. Those of metric depth give metres.
    """

    sense = "depth estimator"

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        if len(getattr(self.model.config, "bin_configurations", ())) > 1:
            self.batch = 1  # pictures of one call vote together whether ZoeDepth's head is that of rooms or of streets

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the depth (B, H, W) of uint8 pictures (B, 3, H, W), float32 on the CPU.

        Raises InputError as `pixels` does, and HostError where the network's result is not a number.
        """
        maps = self.maps(self.pixels(pictures))
        if not bool(maps.isfinite().all()):
            raise HostError(self.not_a_number())
        return self.at_size(maps, (pictures.shape[-2], pictures.shape[-1]))

    def at_size(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return maps (B, h, w) of pictures of a size, (height, width), at that size: mirrored edges are cut off."""
        if not self.loaded.processor_config.mirrored:
            return resized(maps, size)
        down, across = (mirrored_edge(side) for side in size)
        whole = resized(maps, (size[0] + 2 * down, size[1] + 2 * across))
        return whole[:, down : down + size[0], across : across + size[1]].contiguous()

    def pixels(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return uint8 pictures (B, 3, H, W) as the model reads them: on its device, in its dtype.

        Raises InputError for pictures so narrow that nothing of them, or too many pixels, would be read, and for those
        that would not be read as squares by a network that takes everything for a square.
        """
        height, width = pictures.shape[-2:]
        if self.loaded.processor_config.mirrored and min(height, width) < MIRRORED:
            raise InputError(
                f"{width}x{height} pixels: ZoeDepth mirrors edges of pictures of {MIRRORED} and more a side"
            )
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
        side: Any = getattr(inner, "patch_size", None) or getattr(config, "patch_size", 1)
        return int(max(side) if isinstance(side, list | tuple) else side)

    def _own_vit(self) -> bool:
        config = self.model.config
        if self.loaded.kind != "DPTForDepthEstimation":
            return False
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
