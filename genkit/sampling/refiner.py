"""SDXL's refiner beside a base model: its networks, and the conditioning of a row for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from genkit.components.geometry import REFINER_IDS
from genkit.components.text import Penultimate, SecondEncoder, TextEncoder
from genkit.device.residency import Residency
from genkit.rows.refining import START, handover
from genkit.rows.request import Request
from genkit.sampling.conditioning import Texts, distinct, sized
from genkit.sampling.denoiser import Denoiser
from genkit.schedulers import Plan

if TYPE_CHECKING:
    from genkit.components import Components


@dataclasses.dataclass
class Refined:
    """The refiner's conditioning of a trajectory, in the fields of Trajectory; at: the call at which it takes over."""

    at: int
    cond: torch.Tensor
    uncond: torch.Tensor
    added_cond: torch.Tensor
    added_uncond: torch.Tensor
    weight: float
    more: tuple[Any, ...]
    changes: dict[int, dict[str, Any]]
    beside: None = None
    embedded: None = None


class Refiner:
    """SDXL's refiner: a UNet, and a text encoder of its own. start: the fraction of the timesteps where it takes over.

    parts: loaded, without a VAE. residency: of the model, which moves its networks too.
    """

    def __init__(self, parts: Components, residency: Residency, start: float = START) -> None:
        assert parts.scheduler is not None
        self.name, self.start, self.unet, self.scheduler = parts.info.name, start, parts.unet, parts.scheduler
        hold = residency.add("refiner_text", parts.text_encoder_2)
        second = Penultimate(parts.text_encoder_2, pooled=True)
        self.text: Any = SecondEncoder(TextEncoder(parts.tokenizer_2, second, hold))
        self.zero_empty = parts.info.zero_empty
        residency.add("refiner", parts.unet)
        graphs = residency.steady and residency.device.type == "cuda"
        self.denoiser = Denoiser(parts.unet, graphs=graphs, float32=residency.float32, sizes=len(REFINER_IDS))

    def read(
        self, request: Request, prompts: list[tuple[float, Texts]], negative: Texts, ids: Sequence[Sequence[float]],
        plan: Plan,
    ) -> Refined:  # fmt: skip
        """Return the refiner's conditioning of a row. prompts, negative: of `read_prompts`; ids: its time_ids."""
        pairs = distinct(prompts, negative)
        found = dict(zip(pairs, self.text([first for first, _ in pairs]), strict=True))
        told = sized(prompts, negative, found, ids, self.zero_empty and not request.negative_prompt)
        at = handover(plan, self.start, self.scheduler.num_train_timesteps)
        changes = told.pop("changes")
        for call in sorted(call for call in changes if call <= at):
            told |= changes.pop(call)
        return Refined(at, **told, changes=changes)
