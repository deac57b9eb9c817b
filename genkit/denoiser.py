"""One guided network call over rows that each have their own timestep, prompt and guidance."""

from __future__ import annotations

from typing import Any

import torch

from genkit.outofmemory import in_parts


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return uncond + scale * (cond - uncond), classifier-free guidance (Ho and Salimans 2022, equation 6).

    Linear in the prediction, so it may act on eps, v, x0 or flow alike. `scale` broadcasts over (rows, C, H, W).
    """
    return uncond + scale * (cond - uncond)


class Denoiser:
    """A UNet as a function of rows, split into smaller calls when memory does not suffice.

    `limit` is the most rows a call may have; it halves when the device runs out of memory, and stays there. resident:
    whether the UNet's weights stay where they are between calls, so that a call may be captured.
    """

    def __init__(self, unet: Any, resident: bool = True) -> None:
        self.unet, self.resident = unet, resident
        self.limit: int | None = None

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor | None,
        uncond: torch.Tensor | None,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        """Return the guided raw prediction, float32, of shape (B, C, H, W).

        x: (B, C, H, W); t: (B,); cond, uncond: (B, tokens, width) or None for an unconditional network; scale: (B,) on
        the CPU. Only rows with scale > 1 are computed a second time, with uncond. Raises torch.OutOfMemoryError when
        not even one row fits.
        """
        guided = (scale > 1).nonzero().flatten().to(x.device) if cond is not None else None
        if guided is None or not len(guided):
            return self._rows(x, t, cond)
        assert cond is not None and uncond is not None
        every = len(guided) == len(x)  # the usual case needs no gather
        xs, ts = (torch.cat([a, a if every else a[guided]]) for a in (x, t))
        both = self._rows(xs, ts, torch.cat([cond, uncond if every else uncond[guided]]))
        out, without = both[: len(x)], both[len(x) :]
        weight = scale.to(x.device)[:, None, None, None]
        if every:
            return guide(out, without, weight)
        return out.index_copy(0, guided, guide(out[guided], without, weight[guided]))

    def _rows(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        def call(part: slice) -> torch.Tensor:
            return self._call(x[part], t[part], None if cond is None else cond[part])

        most = min(self.limit or len(x), len(x))
        out, fitting = in_parts(len(x), most, call, "rows")
        if fitting < most:
            self.limit = fitting
        return out[0] if len(out) == 1 else torch.cat(out)

    def _call(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        extra = () if cond is None else (cond.to(self.unet.dtype),)
        return self.unet(x.to(self.unet.dtype), t, *extra, return_dict=False)[0].float()
