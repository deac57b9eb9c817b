"""One guided call of the UNet over rows that each have their own timestep, prompt and guidance scale."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from genkit.components.geometry import TIME_IDS
from genkit.device.graphs import Graphs
from genkit.device.outofmemory import in_parts
from genkit.sampling.controls import Controls, Steered, residuals
from genkit.sampling.guidance import guide

if TYPE_CHECKING:
    from genkit.sampling.adapters import Adapters


class Composed(NamedTuple):
    """Further prompts of rows (composable diffusion): the row of each, embeddings, and the weights of all prompts.

    cond: (E, tokens, width); added: SDXL's added conditioning, (E, projection + 6), or None; weights: of the rows' own
    prompts, then of these, (B + E). Without further prompts cond and added are None.
    """

    owner: list[int]
    cond: torch.Tensor | None
    added: torch.Tensor | None
    weights: list[float]


class Denoiser:
    """A UNet with classifier-free guidance, split into smaller calls when memory runs out.

    `limit` is the most rows of a call; it is halved when memory runs out, and stays halved. graphs: replay calls as
    CUDA graphs; the weights must then stay where they are.
    """

    def __init__(
        self,
        unet: Any,
        *,
        graphs: bool = False,
        float32: Callable[[Any], contextlib.AbstractContextManager[Any]] | None = None,
        adapters: Adapters | None = None,
        controls: Controls | None = None,
        sizes: int = len(TIME_IDS),
    ) -> None:
        """float32: context manager in which a network computes in float32, for `in_float32` (Residency.float32).
        adapters: the LoRAs whose weights a call may name. controls: the ControlNets that a call may name. sizes: of
        SDXL's added conditioning, how many are time_ids.
        """
        self.sizes = sizes
        self.unet, self._widened = unet, float32 or contextlib.nullcontext
        self.limit: int | None = None
        self.adapters, self.controls = adapters, controls
        self.graphs = Graphs(self._plain) if graphs else None
        self._float32 = False

    @property
    def notes(self) -> list[str]:
        """Messages for the user about graphs."""
        return [self.graphs.reason] if self.graphs is not None and self.graphs.reason else []

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Run the network in float32 within this context."""
        self._float32 = True
        try:
            with contextlib.ExitStack() as stack:
                for network in (self.unet, *(() if self.controls is None else self.controls.networks.values())):
                    stack.enter_context(self._widened(network))
                yield
        finally:
            self._float32 = False
            if self.graphs is not None:
                self.graphs.reset()  # the weights have new addresses

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor | None,
        uncond: torch.Tensor | None,
        scale: torch.Tensor,
        added_cond: torch.Tensor | None = None,
        added_uncond: torch.Tensor | None = None,
        adapters: torch.Tensor | None = None,
        beside: torch.Tensor | None = None,
        embedded: torch.Tensor | None = None,
        composed: Composed | None = None,
        steered: Sequence[Steered] = (),
    ) -> torch.Tensor:
        """Return the guided raw prediction, float32, of shape (B, C, H, W).

        x: (B, C, H, W); t: (B,); cond, uncond: (B, tokens, width), None for an unconditional network; scale: (B,) on
        the CPU; added_cond, added_uncond: SDXL's added conditioning, (B, projection + 6), or None; adapters: the weight
        of each LoRA in each row, (B, adapters), or None; beside: additional input channels of an inpainting UNet,
        (B, 1 + C, H, W), or None; embedded: embedding of the guidance scale, (B, width), or None. composed: further
        prompts of the rows, and the weights of all. steered: the ControlNets of each row; empty if no row has any. Only
        rows with scale > 1, and those whose weights do not sum to 1, are computed a second time, with uncond. Raises
        torch.OutOfMemoryError if not even one row fits.
        """
        if composed is not None and cond is not None and uncond is not None:
            given = [(cond, composed.cond, uncond), (added_cond, composed.added, added_uncond)]
            return self._composed(x, t, scale, given, (adapters, beside, embedded), composed, steered)
        guided = (scale > 1).nonzero().flatten().to(x.device) if cond is not None else None
        if guided is None or not len(guided):
            return self._rows(x, t, cond, added_cond, adapters, beside, embedded, steered=steered)
        assert cond is not None and uncond is not None
        every = len(guided) == len(x)  # the usual case, which needs no gather
        xs, ts = (torch.cat([a, a if every else a[guided]]) for a in (x, t))
        conds = torch.cat([cond, uncond if every else uncond[guided]])
        added = None
        if added_cond is not None and added_uncond is not None:
            added = torch.cat([added_cond, added_uncond if every else added_uncond[guided]])
        if adapters is not None:
            adapters = torch.cat([adapters, adapters if every else adapters[guided]])
        if beside is not None:
            beside = torch.cat([beside, beside if every else beside[guided]])
        if embedded is not None:
            embedded = torch.cat([embedded, embedded if every else embedded[guided]])
        if steered:
            steered = [*steered, *(steered[i] for i, one in enumerate(scale.tolist()) if one > 1)]
        both = self._rows(xs, ts, conds, added, adapters, beside, embedded, steered=steered)
        out, without = both[: len(x)], both[len(x) :]
        weight = scale.to(x.device)[:, None, None, None]
        if every:
            return guide(out, without, weight)
        return out.index_copy(0, guided, guide(out[guided], without, weight[guided]))

    def _composed(
        self, x: torch.Tensor, t: torch.Tensor, scale: torch.Tensor, told: list[Any], given: tuple[Any, ...],
        composed: Composed, steered: Sequence[Steered],
    ) -> torch.Tensor:  # fmt: skip
        """Return the guided prediction of rows with several prompts. told: (cond, of the others, uncond), and added."""
        owner = torch.tensor([*range(len(x)), *composed.owner])
        weights = torch.tensor(composed.weights)
        total = torch.zeros(len(x)).index_add(0, owner, weights)
        guided = ((scale > 1) | (total != 1)).nonzero().flatten()
        chosen = torch.cat([owner, guided])
        steered = [steered[i] for i in chosen.tolist()] if steered else ()
        rows = chosen.to(x.device)
        owner, guided, weights, total = (part.to(x.device) for part in (owner, guided, weights, total))
        parts = [
            None if a is None else torch.cat([*(p for p in (a, b) if p is not None), c[guided]]) for a, b, c in told
        ]
        out = self._rows(x[rows], t[rows], *parts, *(None if g is None else g[rows] for g in given), steered=steered)
        weighted = out[: len(owner)] * weights[:, None, None, None]
        summed = torch.zeros_like(out[: len(x)]).index_add(0, owner, weighted)
        if not len(guided):
            return summed
        scale, total = (part.to(x.device)[guided][:, None, None, None] for part in (scale, total))
        return summed.index_copy(0, guided, guide(summed[guided], out[len(owner) :], scale, total))

    def _rows(
        self, x: torch.Tensor, t: torch.Tensor, *given: torch.Tensor | None, steered: Sequence[Steered]
    ) -> torch.Tensor:  # fmt: skip
        absent = x.new_empty(len(x), 0)  # keeps the places of the others
        inputs = [x, t, *(absent if i is None else i for i in given)]
        most = min(self.limit or len(x), len(x))

        def call(part: slice) -> torch.Tensor:
            return self._call(steered[part], *(i[part] for i in inputs))

        out, fitting = in_parts(len(x), most, call, "rows")
        if fitting < most:
            self.limit = fitting
        return out[0] if len(out) == 1 else torch.cat(out)

    def _call(self, steered: Sequence[Steered], *inputs: torch.Tensor) -> torch.Tensor:
        if any(steered):  # graphs hold the UNet alone
            return self._plain(*inputs, steered=steered)
        if self._float32 or torch.is_grad_enabled():
            return self._plain(*inputs)
        return (self.graphs or self._plain)(*inputs)

    def _plain(
        self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, added: torch.Tensor, adapters: torch.Tensor,
        beside: torch.Tensor, embedded: torch.Tensor, *, steered: Sequence[Steered] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Return the raw prediction of the UNet, (B, C, H, W) float32.

        x: (B, C, H, W), t: (B,). The others are (B, 0) where there is none: embeddings (B, tokens, width); for SDXL the
        pooled embedding and time_ids side by side, (B, projection + 6); weights of LoRAs, (B, adapters); what an
        inpainting UNet reads beside x, (B, 1 + C, H, W); the embedded guidance scale, (B, width).
        """
        dtype = self.unet.dtype
        prompts = [cond.to(dtype)] if cond.shape[1] else []
        added_cond: dict[str, Any] = {}
        if added.shape[1]:
            vector, sizes = added.to(dtype).split([added.shape[1] - self.sizes, self.sizes], dim=1)
            added_cond["added_cond_kwargs"] = {"text_embeds": vector, "time_ids": sizes}
        if embedded.shape[1]:
            added_cond["timestep_cond"] = embedded.to(dtype)
        if any(steered):  # without what an inpainting UNet reads beside x
            added_cond |= residuals(steered, x.to(dtype), t, prompts[0], added_cond.get("added_cond_kwargs"))
        x = torch.cat([x, beside], dim=1) if beside.shape[1] else x
        with contextlib.nullcontext() if self.adapters is None else self.adapters.using(adapters):
            return self.unet(x.to(dtype), t, *prompts, **added_cond, return_dict=False)[0].float()
