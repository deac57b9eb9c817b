"""Pictures to latents and back: the VAE with its scaling, or the identity for a network that works on pixels."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from genkit.device.memory import PICTURES
from genkit.device.outofmemory import attempt
from genkit.device.residency import Hold
from genkit.pictures.images import read_image, read_mask
from genkit.rows.request import Request
from genkit.sampling.strips import can_strip, decode_in_strips, encode_in_strips

log = logging.getLogger("genkit")

Call = Callable[[Any, torch.Tensor], torch.Tensor]


class Codec:
    """Encode pictures to latents and decode latents to pictures. `vae` None: the latents are the pictures, -1 to 1.

    hold: context manager that keeps the VAE on the device (device/residency.py). area: most latent positions (rows
    times columns) a decode; larger latents are decoded in strips. It is lowered when memory runs out.
    """

    def __init__(self, vae: Any, hold: Hold = contextlib.nullcontext, area: float = math.inf) -> None:
        self.vae, self.hold, self.area = vae, hold, area
        self._users = threading.Condition()
        self._running = 0  # calls of the VAE in its own dtype
        config = {} if vae is None else vae.config
        self.pixels = 4 ** (len(config.get("block_out_channels") or [1]) - 1)  # of a picture per latent
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)

    @torch.inference_mode()
    def encode(self, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return a latent (C, h, w), sampled from the VAE's posterior of one picture (3, H, W) in -1 to 1."""
        with self.hold():
            moments = self._fitting(picture[None], picture[0].numel() / self.pixels, _ENCODE)
        mean, logvar = moments.float().cpu().chunk(2, dim=1)
        drawn = torch.randn(mean.shape, generator=generator)
        return ((mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * drawn)[0] - self.shift) * self.scale

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the pictures (B, 3, H, W), -1 to 1, of latents (B, C, h, w), on their device.

        Raises torch.OutOfMemoryError if not even one of them fits in strips.
        """
        if self.vae is None:
            return latents
        z = latents / self.scale + self.shift
        done: list[torch.Tensor] = []
        with self.hold():
            while (start := sum(map(len, done))) < len(z):
                done.append(self._fitting(z[start:], z[0, 0].numel(), _DECODE))
        return torch.cat(done)

    def _fitting(self, x: torch.Tensor, each: float, ways: tuple[Call, Call]) -> torch.Tensor:
        """Run the VAE on the first rows of x (B, …), as many as memory allows. each: latent positions of a row."""
        whole, strips = ways
        while count := int(min(len(x), PICTURES, self.area / each)):
            found = attempt(lambda part=x[:count]: self._run(whole, part))  # type: ignore[misc]
            if found is not None:
                return found
            self.area = each * (count // 2 or 0.99)
            how = f"{count // 2} at once" if count > 1 else "in strips"
            log.warning("out of memory at %d pictures in the VAE: from now on %s", count, how)
        found = attempt(lambda: self._run(strips, x[:1])) if can_strip(self.vae) else None
        if found is None:
            raise torch.OutOfMemoryError("out of memory in the VAE at one picture")
        return found

    def _run(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        """Call the VAE in its own dtype, then again in float32 for the rows that overflowed in half precision."""
        with self._as_it_is() as dtype:
            out = call(self.vae, x.to(dtype)).float()
            bad = ~torch.isfinite(out).flatten(1).all(dim=1) & torch.isfinite(x).flatten(1).all(dim=1)
            overflow = dtype != torch.float32 and bool(bad.any())  # synchronises: no kernel reads the weights any more
        if overflow:
            with self._in_float32():
                out[bad] = call(self.vae, x[bad].float())
        return out

    @contextlib.contextmanager
    def _as_it_is(self) -> Iterator[torch.dtype]:
        """Keep the weights in their dtype within this context: one thread may encode while another decodes."""
        with self._users:
            self._running += 1
        try:
            yield self.vae.dtype
        finally:
            with self._users:
                self._running -= 1
                self._users.notify_all()

    @contextlib.contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Convert the weights to float32 for this thread alone within this context, and back without loss."""
        with self._users:
            self._users.wait_for(lambda: self._running == 0)
            dtype = self.vae.dtype
            try:
                self.vae.to(torch.float32)
                yield
            finally:
                self.vae.to(dtype)
                if self.vae.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()  # before other streams read the weights


def quantise(pictures: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """Return pictures (B, 3, H, W) in -1 to 1 as uint8, and for each whether it contains a NaN or an infinity.

    Rounds as diffusers does. These bytes are what is scored and saved.
    """
    bad = (~torch.isfinite(pictures).flatten(1).all(dim=1)).tolist()
    scaled = (pictures.nan_to_num(nan=-1.0) / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    if scaled.shape[1] == 1:  # greyscale networks: one channel, shown as three
        scaled = scaled.expand(-1, 3, -1, -1)
    return scaled, bad


def condition(
    request: Request, width: int, height: int, latent: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the row's initial picture, (3, height, width) in -1 to 1, its mask, (1, rows, columns), and the picture
    with zeros where it is masked; the last two are None without a mask.

    White in the mask is redrawn, black is kept. Both are resized as diffusers' image processor does (Lanczos).
    """
    picture = read_image(request.image)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    tensor = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1) * 2 - 1
    if request.mask_source is None:
        return tensor, None, None
    mask = read_mask(request.mask_source)
    if mask.size != (width, height):
        mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    weight = torch.from_numpy(np.asarray(mask, dtype=np.float32) >= 127.5).float()[None, None]
    return tensor, torch.nn.functional.interpolate(weight, size=latent[1:])[0], tensor * (1 - weight[0])


# Calls of the VAE, whole and in strips.
_ENCODE: tuple[Call, Call] = (lambda vae, x: vae.encode(x).latent_dist.parameters, encode_in_strips)
_DECODE: tuple[Call, Call] = (lambda vae, z: vae.decode(z, return_dict=False)[0], decode_in_strips)
