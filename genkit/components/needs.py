"""How much memory a model's networks take on a device, by configs and weight headers, before any is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from genkit.components.footprint import clip_row, control_row, unet_row, vae_decode, vae_strips
from genkit.components.geometry import Geometry
from genkit.components.info import ModelInfo
from genkit.device.devices import CPU_SLOTS, DTYPES, free_memory, host_memory
from genkit.device.memory import (
    CLIP_BATCH,
    CONTROL,
    LAYERS,
    MOST_PACKED,
    RESIDENT,
    TEXTS,
    TURNS,
    UNETS,
    Budget,
    Look,
    Need,
    at_each_step,
    gib,
    peak,
    plan_memory,
)
from genkit.errors import HostError

if TYPE_CHECKING:
    import torch

FIRST = "segmenter"  # among models that look at pictures: it is gone before the others come
NO_LOOKS: Mapping[str, Look] = MappingProxyType({})
STATE = 12  # float32 values per latent element of an image in flight: sample, solver history, noise, guidance


def need(
    configs: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float], item: int, largest: float,
    cost: float = 1.0, beside: bool = True, vae_item: int | None = None, looks: Mapping[str, Look] = NO_LOOKS,
) -> Need:  # fmt: skip
    """Return the Need of networks with these configs. item: bytes of an element; vae_item: … in the VAE."""
    unet, vae, clip = configs["unet"], configs.get("vae"), configs.get("clip")
    g = Geometry.of(unet, vae)
    channels, height, width = g.latent_shape(g.width, g.height)
    rows = 2 if g.text and not g.guidance_width else 1
    row = max(unet_row(configs[name], height, width) for name in UNETS if name in configs)
    row += sum(control_row(config, height, width) for name, config in configs.items() if name.startswith(CONTROL))
    first, looks = looks.get(FIRST), {name: look for name, look in looks.items() if name != FIRST}
    score = 0 if clip is None else max(clip_row(clip["text_config"]), clip_row(clip["vision_config"]))
    return Need(
        weights={**weights, **{name: look.weights for name, look in looks.items()}},
        looks={name: look.picture for name, look in looks.items()},
        image=rows * item * row + 4 * STATE * channels * height * width,
        area=height * width,
        decode=0 if vae is None else (vae_item or item) * vae_decode(vae, height, width),
        strips=0 if vae is None else (vae_item or item) * vae_strips(vae, height, width),
        text=CLIP_BATCH * item * max((clip_row(configs[name]) for name in TEXTS if name in configs), default=0),
        score=item * score,
        largest=largest,
        cost=cost,
        beside=beside,
        first=0.0 if first is None else first.weights + first.picture,
    )


def model_need(
    info: ModelInfo, clip: ModelInfo | None, dtype: str, device: str, largest: tuple[int, int] | None = None,
    refiner: ModelInfo | None = None, looks: Mapping[str, Look] = NO_LOOKS,
) -> Need:  # fmt: skip
    """Return the Need of a model, its scorer, its refiner and vision models on "cuda" or "cpu", by headers and configs.

    dtype: "float32", "float16", "bfloat16", or "int8" for the UNet's weights in 8 bits and the device's usual precision
    for everything else. largest: width and height of the largest picture of the job.
    """
    item = 4 if dtype == "float32" or (dtype == "int8" and device == "cpu") else 2
    second = {} if refiner is None else {"refiner": "unet", "refiner_text": "text_encoder_2"}
    parts = {**info.parts, **({} if clip is None else clip.parts)}
    parts |= {name: refiner.parts[own] for name, own in second.items() if refiner is not None}
    configs = {name: part.config for name, part in parts.items()}
    weights: dict[str, float] = {name: item * part.parameters for name, part in parts.items()}
    if device == "cpu" and item == 4:  # linear layers also have a packed copy (device/cpu.py)
        for name in (name for name in weights if at_each_step(name) or name == "vae"):
            linear = item * sum(math.prod(t.shape) for t in parts[name].tensors.values() if len(t.shape) == 2)
            weights[name] += linear if linear <= MOST_PACKED else 0
    if dtype == "int8":
        weights |= {name: parts[name].parameters for name in UNETS if name in parts}
    widened = vae_in_float32(configs, dtype) and item == 2
    if widened:
        weights["vae"] *= 2
    g = Geometry.of(configs["unet"], configs.get("vae"))
    cost = 1.0 if largest is None else max(1.0, largest[0] * largest[1] / (g.width * g.height))
    unets = [parts[name] for name in UNETS if name in parts]
    heaviest = item * max(math.prod(t.shape) for unet in unets for t in unet.tensors.values())
    vae_item = 4 if widened else item
    return need(configs, weights, item, largest=heaviest, cost=cost, beside=device == "cuda", vae_item=vae_item,
                looks=looks)  # fmt: skip


def vae_in_float32(configs: Mapping[str, Mapping[str, Any]], dtype: str) -> bool:
    """Whether the VAE overflows in float16: SDXL's first one does, and its config says so (force_upcast)."""
    overflows = "text_encoder_2" in configs and configs["vae"]["force_upcast"]
    return bool(overflows) and dtype in ("float16", "int8")


def budget_for(info: ModelInfo, clip: ModelInfo | None, device: torch.device, dtype: torch.dtype, memory: str = "auto",
               slots: int | None = None, largest: tuple[int, int] | None = None,
               refiner: ModelInfo | None = None, looks: Mapping[str, Look] = NO_LOOKS) -> Budget:  # fmt: skip
    """Return the budget for a model, its scorer, refiner and vision models with the memory free on `device` now."""
    n = model_need(info, clip, str(dtype).removeprefix("torch."), device.type, largest, refiner, looks)
    return plan_memory(n, free_memory(device), memory, slots, device=str(device), host=host_memory())


def budget_of(unet: Any, vae: Any, device: torch.device) -> Budget:
    """Return the budget for networks that are loaded already."""
    try:
        configs = {"unet": unet.config, **({} if vae is None else {"vae": vae.config})}
        sizes = {"item": unet.dtype.itemsize, "vae_item": None if vae is None else vae.dtype.itemsize}
        n = need(configs, {}, largest=0, beside=device.type == "cuda", **sizes)
        return plan_memory(n, free_memory(device), "high", device=str(device))
    except HostError:  # they are loaded, so try
        return Budget(RESIDENT, 1, 0, 0, 0)
    except (KeyError, TypeError):  # networks of other classes
        return Budget(RESIDENT, CPU_SLOTS, math.inf, 0, 0)


def describe(
    info: ModelInfo,
    clip: ModelInfo | None,
    *,
    device: str,
    dtype: str,
    memory: str,
    slots: int | None,
    largest: tuple[int, int],
    refiner: ModelInfo | None = None,
    looks: Callable[[str, str], Mapping[str, Look]] = lambda stored, kind: NO_LOOKS,
) -> dict[str, Any]:
    """Return what `--dry-run` prints about memory, in GiB, for each kind of device that the job may run on.

    In the result: weights; an_image and a_decode, what one image in flight and one decode take; the peak of one image
    with all networks on the device (high), with one network at a time (low), and layer by layer with decoding in strips
    (least); masks, what the segmenter takes before all else. looks: returns what vision models take in a dtype on a
    kind of device.
    """
    found: dict[str, Any] = {}
    for kind, usual in (("cpu", "float32"), ("cuda", "float16")):
        if device.split(":")[0] in ("auto", kind):
            stored = usual if dtype == "auto" else DTYPES[dtype]
            n = model_need(info, clip, stored, kind, largest, refiner, looks(stored, kind))
            found[kind] = {
                **({"masks": gib(n.first)} if n.first else {}),
                "weights": gib(sum(n.weights.values())),
                "an_image": gib(n.image),
                "a_decode": gib(n.decode * n.cost),
                "high": gib(max(n.first, peak(n, RESIDENT, slots or 1))),
            }
            if kind == "cuda":
                low, least = peak(n, TURNS, slots or 1), peak(n, LAYERS, 1, 1, True)
                found[kind] |= {"low": gib(max(n.first, low)), "least": gib(max(n.first, least))}
            else:
                found[kind]["free"] = gib(host_memory())
    return {"memory": memory, "memory_gib": found}
