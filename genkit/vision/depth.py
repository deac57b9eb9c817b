"""Depth estimation: DPT (Ranftl et al. 2021), Depth Anything (Yang et al. 2024), ZoeDepth (Bhat et al.
2023), GLPN (Kim et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch

from genkit.errors import HostError, InputError
from genkit.vision.models import Loaded, Sense
from genkit.vision.preprocess import mirrored_edge, read_size

MIRRORED = 5  # pixels: with a shorter side the mirrored edge would be longer than the side itself
MOST_PIXELS = 2**22  # of all pictures of a batch together, as the network reads them


class Depth(Sense):
    """Depth maps: of relative models a nearness, larger for nearer pixels; of metric models a distance in metres."""

    sense = "depth estimator"

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        if len(getattr(self.model.config, "bin_configurations", ())) > 1:
            self.batch = 1  # ZoeDepth chooses its indoor or outdoor head once for a whole batch

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the depth (B, H, W) of uint8 pictures (B, 3, H, W), float32 on the CPU.

        Raises InputError as `pixels` does, and HostError if a depth is NaN or infinite.
        """
        maps = self.maps(self.pixels(pictures))
        if not bool(maps.isfinite().all()):
            raise self.nan_error()
        return self.at_size(maps, (pictures.shape[-2], pictures.shape[-1]))

    def at_size(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return maps (B, h, w) resized to the (height, width) of their pictures, without ZoeDepth's mirrored edges."""
        if not self.loaded.processor_config.mirrored:
            return resized(maps, size)
        down, across = (mirrored_edge(side) for side in size)
        whole = resized(maps, (size[0] + 2 * down, size[1] + 2 * across))
        return whole[:, down : down + size[0], across : across + size[1]].contiguous()

    def pixels(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return uint8 pictures (B, 3, H, W) as the model reads them: on its device, in its dtype.

        Raises InputError for pictures that would be resized to less than a patch or more than MOST_PIXELS, and for a
        DPT with a ViT of its own, whose position embeddings are of a square, if they would not be resized to a square.
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
        """Return the depth (B, h, w) at the network's resolution, float32 on the CPU, of pictures from `pixels`."""
        self.batch = min(self.batch, max(1, MOST_PIXELS // (pixels.shape[-2] * pixels.shape[-1])))

        def look(part: slice) -> torch.Tensor:
            found: torch.Tensor = self.model(pixel_values=pixels[part].to(self.device)).predicted_depth
            return found.float().cpu()

        return torch.cat(self.in_batches(len(pixels), look))

    def nan_error(self) -> HostError:
        """Return the error for a depth that is NaN or infinite."""
        kind = str(self.dtype).removeprefix("torch.")
        return HostError(f"depth by {self.loaded.info.name} is not a number in {kind}: use --dtype float32")


def resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return maps (B, h, w) resized to (height, width): bicubic, align_corners=False."""
    found = torch.nn.functional.interpolate(maps[:, None], size=size, mode="bicubic", align_corners=False)
    return found[:, 0]
