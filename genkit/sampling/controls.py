"""ControlNets (Zhang et al. 2023): copies of the UNet's first half that read a picture and add to its activations.

Each row of a batch has its own ControlNets, pictures, weights and ranges of steps. A network computes only the rows
that it steers at this step; where a row has several, what they add is summed, as diffusers' MultiControlNetModel does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from genkit.components.control import read_control
from genkit.components.info import Part
from genkit.device.cpu import suit_cpu
from genkit.device.memory import CONTROL
from genkit.device.processor import AttentionChoice
from genkit.device.residency import Residency
from genkit.errors import InputError
from genkit.pictures.edges import PREPROCESS
from genkit.pictures.images import read_image
from genkit.rows.controls import USUAL, networks_of
from genkit.rows.request import Request


class Control(NamedTuple):
    """A ControlNet of a trajectory, its picture (3, H, W) in 0 to 1, and its weight at each call of the plan."""

    network: Any
    picture: torch.Tensor
    weights: np.ndarray


Steered = Sequence[tuple[Any, torch.Tensor, float]]  # network, picture and weight of each ControlNet of a row


class Controls:
    """The ControlNets that rows have asked for, loaded once each and kept beside the UNet."""

    def __init__(self, unet: Any, vae: Any, residency: Residency, attention: AttentionChoice) -> None:
        self.unet, self.vae, self.residency, self.attention = unet, vae, residency, attention
        self.networks: dict[str, Any] = {}

    def check(self, request: Request) -> None:
        """Raise InputError for a ControlNet of a row that is missing, or does not fit the model."""
        vae = None if self.vae is None else self.vae.config
        networks_of(request.controls, self.unet.config, vae, self.networks)  # one that is trained now has no file yet

    def add(self, file: str, part: Part | None = None) -> Any:
        """Return a ControlNet by its name, loaded. Raises InputError as `read_control`, and for NaN among weights."""
        if file not in self.networks:
            from genkit.components.loading import load_network

            there = self.residency.steady
            part = part or read_control(file)
            network = load_network(part, device=self.residency.device, dtype=self.unet.dtype, in_ram=not there)
            self.attention.apply(network, self.residency.device)
            if self.residency.device.type == "cpu":
                suit_cpu(network)
            self.residency.add(f"{CONTROL} {len(self.networks)}", network)
            self.networks[file] = network
        return self.networks[file]

    def read(self, request: Request, width: int, height: int, calls: int) -> tuple[Control, ...]:
        """Return the ControlNets of a row that is drawn at width x height in so many calls of the UNet."""
        found = []
        for stated in request.controls or ():
            control = {**USUAL, **stated}
            network = self.add(control["file"])
            picture = control_picture(control, width, height).to(self.residency.device, self.unet.dtype)
            found.append(Control(network, picture, weights(control, calls)))
        return tuple(found)


def control_picture(control: Mapping[str, Any], width: int, height: int) -> torch.Tensor:
    """Return the picture of a ControlNet, (3, height, width) in 0 to 1, resized as diffusers does (Lanczos)."""
    try:
        picture = read_image(control["image"])
    except InputError as error:
        raise InputError(f"controls: {error}") from None
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    picture = PREPROCESS[control["preprocess"]](picture)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)


def weights(control: Mapping[str, Any], calls: int) -> np.ndarray:
    """Return the weight at each call, (calls,): 0 outside the range of steps, by diffusers' rule."""
    call = np.arange(calls)
    inside = (call / calls >= control["start"]) & ((call + 1) / calls <= control["end"])
    return np.where(inside, control["weight"], 0.0)


def steered(controls: Sequence[Control], call: int) -> Steered:
    """Return the ControlNets of a row that have a weight at a call."""
    return [(c.network, c.picture, float(c.weights[call])) for c in controls if c.weights[call]]


def residuals(
    rows: Sequence[Steered], x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor,
    added: Mapping[str, torch.Tensor] | None,
) -> dict[str, Any]:  # fmt: skip
    """Return what ControlNets add to the UNet's activations, as its keyword arguments; zeros for rows without any.

    rows: the ControlNets of each row; x: (B, C, H, W), t: (B,), cond: (B, tokens, width), and SDXL's added_cond_kwargs,
    as the UNet reads them.
    """
    total: list[torch.Tensor] = []
    for network in dict.fromkeys(one[0] for row in rows for one in row):
        uses = [(i, picture, weight) for i, row in enumerate(rows) for net, picture, weight in row if net is network]
        index = torch.tensor([i for i, *_ in uses]).to(x.device, non_blocking=True)
        scale = torch.tensor([weight for *_, weight in uses], dtype=x.dtype)[:, None, None, None]
        down, middle = network(
            x[index],
            t[index],
            encoder_hidden_states=cond[index],
            controlnet_cond=torch.stack([picture for _, picture, _ in uses]).to(x.dtype),
            conditioning_scale=scale.to(x.device, non_blocking=True),
            added_cond_kwargs=None if added is None else {name: value[index] for name, value in added.items()},
            return_dict=False,
        )
        parts = [*down, middle]
        total = total or [part.new_zeros(len(x), *part.shape[1:]) for part in parts]
        for sum_, part in zip(total, parts, strict=True):
            sum_.index_add_(0, index, part)
    return {"down_block_additional_residuals": tuple(total[:-1]), "mid_block_additional_residual": total[-1]}
