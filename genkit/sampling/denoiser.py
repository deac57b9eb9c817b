"""One guided network call over rows that each have their own timestep, prompt and guidance."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from genkit.device.compiled import Compiled, compile_network
from genkit.device.graphs import Call, Graphs
from genkit.device.outofmemory import in_parts
from genkit.sampling.guidance import guide

SIZES = 6  # SDXL is told the height and width of the picture before and after cropping, and where it was cropped


class Denoiser:
    """A UNet as a function of rows, split into smaller calls when memory does not suffice.

    `limit` is the most rows a call may have; it halves when the device runs out of memory, and stays there.
    graphs: record calls as CUDA graphs, where the UNet's weights stay on a CUDA device. compiled: compile meanwhile.
    """

    def __init__(
        self,
        unet: Any,
        *,
        graphs: bool = False,
        compiled: bool = False,
        float32: Callable[[Any], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        """float32: has a UNet compute in float32 for a while, for `in_float32` (Residency.float32)."""
        self.unet, self._widened = unet, float32 or contextlib.nullcontext
        self.limit: int | None = None
        self.graphs = Graphs(self._plain) if graphs else None
        self.compiled = Compiled(lambda: compile_network(self.unet, network_call)) if compiled else None
        self._float32 = False

    @property
    def notes(self) -> list[str]:
        """What the user may like to know of how the network is called: a line each."""
        found = (self.graphs and self.graphs.reason, self.compiled and self.compiled.note)
        return [note for note in found if note]

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Run the network in float32 for a while."""
        if self.compiled is not None:
            self.compiled.wait()  # it may share the weights
        self._float32 = True
        try:
            with self._widened(self.unet):
                yield
        finally:
            self._float32 = False
            if self.graphs is not None:
                self.graphs.reset()  # the weights lie elsewhere now

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor | None,
        uncond: torch.Tensor | None,
        scale: torch.Tensor,
        added: torch.Tensor | None = None,
        unadded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the guided raw prediction, float32, of shape (B, C, H, W).

        x: (B, C, H, W); t: (B,); cond, uncond: (B, tokens, width) or None for an unconditional network; scale: (B,) on
        the CPU; added, unadded: (B, width), what SDXL is told beside cond and uncond. Only rows with scale > 1 are
        computed a second time, with uncond. Raises torch.OutOfMemoryError when not even one row fits.
        """
        guided = (scale > 1).nonzero().flatten().to(x.device) if cond is not None else None
        if guided is None or not len(guided):
            return self._rows(x, t, cond, added)
        assert cond is not None and uncond is not None
        every = len(guided) == len(x)  # the usual case needs no gather
        xs, ts = (torch.cat([a, a if every else a[guided]]) for a in (x, t))
        conds = torch.cat([cond, uncond if every else uncond[guided]])
        beside = None
        if added is not None and unadded is not None:
            beside = torch.cat([added, unadded if every else unadded[guided]])
        both = self._rows(xs, ts, conds, beside)
        out, without = both[: len(x)], both[len(x) :]
        weight = scale.to(x.device)[:, None, None, None]
        if every:
            return guide(out, without, weight)
        return out.index_copy(0, guided, guide(out[guided], without, weight[guided]))

    def _rows(
        self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None, added: torch.Tensor | None
    ) -> torch.Tensor:
        inputs = [i for i in (x, t, cond, added) if i is not None]
        most = min(self.limit or len(x), len(x))
        out, fitting = in_parts(len(x), most, lambda part: self._call(*(i[part] for i in inputs)), "rows")
        if fitting < most:
            self.limit = fitting
        return out[0] if len(out) == 1 else torch.cat(out)

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self._float32 or torch.is_grad_enabled():
            return self._plain(*inputs)
        call = self.graphs or self._plain
        return call(*inputs) if self.compiled is None else self.compiled(call, *inputs)

    def _plain(self, *inputs: torch.Tensor) -> torch.Tensor:
        return network_call(self.unet)(*inputs)


def network_call(unet: Any) -> Call:
    """Return the UNet as a function of tensors with a row for each sample.

    x (B, C, H, W); t (B,); prompts (B, tokens, width), unless it is unconditional; for SDXL then (B, projection + 6):
    the prompt's vector and six sizes.
    """
    dtype = unet.dtype

    def call(x: torch.Tensor, t: torch.Tensor, *cond: torch.Tensor) -> torch.Tensor:
        prompts, added = [c.to(dtype) for c in cond[:1]], {}
        for beside in cond[1:]:
            vector, sizes = beside.to(dtype).split([beside.shape[1] - SIZES, SIZES], dim=1)
            added["added_cond_kwargs"] = {"text_embeds": vector, "time_ids": sizes}
        return unet(x.to(dtype), t, *prompts, **added, return_dict=False)[0].float()

    return call
