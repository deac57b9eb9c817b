"""What a job needs of the device's memory, by the configs and before anything is loaded; and what to do with less."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from genkit.components.footprint import clip_row, unet_row, vae_decode, vae_strips
from genkit.device.devices import CPU_SLOTS, CUDA_SLOTS, DTYPES, free_memory, host_memory
from genkit.errors import HostError, InputError, nearest, shown
from genkit.rows.settings import Geometry

if TYPE_CHECKING:
    import torch

    from genkit.components import ModelInfo
    from genkit.job import Options

MEMORY = ("auto", "high", "low")
PICTURES = 8  # most pictures a decode; more gain nothing
CLIP_BATCH = 32  # texts or pictures a call of CLIP
FEW = 4  # images at once that are worth a costlier level
MODEST = 256 * 2**20  # bytes of images in flight that --memory low takes without asking whether one would do
RESERVE = {"cuda": 0.4 * 2**30, "cpu": 0.3 * 2**30}  # workspaces and kernels of the libraries; what else is running
SPARE = 0.05  # of what is free: blocks that do not fit together
LEAVES = 4  # of the UNet's largest layers may be on the device when it comes layer by layer: one works, one is coming
STATE = 12  # float32 numbers per latent number and image: sample, solver history, noise, guided halves

# From the least costly to the most. Where the UNet is not resident its calls cannot be captured in a graph.
RESIDENT, PARTS, TURNS, LAYERS = LEVELS = ("resident", "parts", "turns", "layers")
TEXTS = ("text_encoder", "text_encoder_2")


def check_memory(memory: str) -> None:
    """Refuse a word that is no `--memory`: raises InputError with the nearest."""
    if memory not in MEMORY:
        raise InputError(f"--memory: {shown(memory)} is not auto, high or low{nearest(memory, MEMORY)}")


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that work takes on a device.

    weights: by network ("unet", "vae", "text_encoder", "clip"); largest: the UNet's largest weight. image: of
    denoising one image of the model's own size, guided. area: of that size in latent numbers a channel. decode, strips:
    of decoding one of its pictures, whole and in strips. text: of a batch of prompts; score: of a picture for CLIP.
    cost: the largest picture of the job, in pictures of the model's own size. beside: whether decoding runs while
    others are denoised.
    """

    weights: Mapping[str, float]
    largest: float
    image: float
    area: int
    decode: float
    strips: float
    text: float = 0.0
    score: float = 0.0
    cost: float = 1.0
    beside: bool = True


@dataclasses.dataclass(frozen=True)
class Budget:
    """How a job goes about a device's memory: its level, images in flight, latent area a decode, bytes at the peak."""

    level: str
    slots: int
    area: float
    peak: float
    free: float

    def line(self, device: object, memory: str = "auto") -> str:
        """Return what the user is told of it; nothing where nothing is out of the ordinary on a CPU."""
        if str(device) == "cpu" and self.slots >= CPU_SLOTS and memory == "auto":
            return ""
        where = "" if str(device) == "cpu" else f"{_SAID[self.level]}; "
        many = f"{self.slots} images at once" if self.slots > 1 else "one image at once"
        return f"memory: {where}{many}, about {_gib(self.peak)} of {_gib(self.free)} GiB free on {device}"


def need(
    configs: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float], item: int, largest: float,
    cost: float = 1.0, beside: bool = True, vae_item: int | None = None,
) -> Need:  # fmt: skip
    """Return what networks of these configs take, in numbers of `item` bytes, in the VAE of `vae_item`; see Need."""
    unet, vae, clip = configs["unet"], configs.get("vae"), configs.get("clip")
    g = Geometry.of(unet, vae)
    channels, height, width = g.latent_shape(g.width, g.height)
    rows = 2 if g.text else 1
    score = 0 if clip is None else max(clip_row(clip["text_config"]), clip_row(clip["vision_config"]))
    return Need(
        weights=weights,
        image=rows * item * unet_row(unet, height, width) + 4 * STATE * channels * height * width,
        area=height * width,
        decode=0 if vae is None else (vae_item or item) * vae_decode(vae, height, width),
        strips=0 if vae is None else (vae_item or item) * vae_strips(vae, height, width),
        text=CLIP_BATCH * item * max((clip_row(configs[name]) for name in TEXTS if name in configs), default=0),
        score=item * score,
        largest=largest,
        cost=cost,
        beside=beside,
    )


def model_need(
    info: ModelInfo, clip: ModelInfo | None, dtype: str, device: str, largest: tuple[int, int] | None = None
) -> Need:
    """Return what a model and its scorer will take on "cuda" or "cpu", by headers and configs.

    dtype: "float32", "float16", "bfloat16", or "int8" for the UNet's weights in 8 bits and the device's usual precision
    for everything else. largest: width and height of the largest picture of the job.
    """
    item = 4 if dtype == "float32" or (dtype == "int8" and device == "cpu") else 2
    configs = {**info.configs, **({} if clip is None else clip.configs)}
    parts = {**info.parts, **({} if clip is None else clip.parts)}
    weights: dict[str, float] = {name: item * part.parameters for name, part in parts.items()}
    if device == "cpu" and item == 4:  # linear layers are laid out anew beside themselves (genkit.device.cpu)
        for name in {"unet", "vae"} & weights.keys():
            weights[name] += item * sum(math.prod(t.shape) for t in parts[name].tensors.values() if len(t.shape) == 2)
    if dtype == "int8":
        weights["unet"] = parts["unet"].parameters
    widened = vae_in_float32(configs, dtype) and item == 2
    if widened:
        weights["vae"] *= 2
    g = Geometry.of(configs["unet"], configs.get("vae"))
    cost = 1.0 if largest is None else max(1.0, largest[0] * largest[1] / (g.width * g.height))
    heaviest = item * max(math.prod(t.shape) for t in parts["unet"].tensors.values())
    vae_item = 4 if widened else item
    return need(configs, weights, item, largest=heaviest, cost=cost, beside=device == "cuda", vae_item=vae_item)


def vae_in_float32(configs: Mapping[str, Mapping[str, Any]], dtype: str) -> bool:
    """Whether the VAE is one that overflows in float16 in every picture: SDXL's first, which says so in its config."""
    overflows = "text_encoder_2" in configs and configs["vae"]["force_upcast"]
    return bool(overflows) and dtype in ("float16", "int8")


def peak(n: Need, level: str, slots: int, pictures: int = 1, strips: bool = False) -> float:
    """Return the bytes on the device at the peak: `slots` images in flight, `pictures` of the largest size a decode."""
    rows = n.image * max(slots, n.cost)
    decode = n.cost * (n.strips if strips else n.decode * pictures)
    return _PEAKS[level](n, rows, decode, n.score * min(slots, CLIP_BATCH))


def plan_memory(n: Need, free: float, memory: str = "auto", slots: int | None = None, *, device: str = "cuda",
                host: float = math.inf) -> Budget:  # fmt: skip
    """Return how to go about `free` bytes: the least costly level that fits a few images, else the first that fits one.

    slots: images in flight that were asked for. host: bytes of RAM free for what is moved off the device. Raises
    HostError when not one image fits at any level that `memory` allows.
    """
    kind = device.split(":")[0]
    usable = free * (1 - SPARE) - RESERVE.get(kind, 0)
    levels = _LEVELS[memory] if kind == "cuda" else (RESIDENT,)
    levels = tuple(x for x in levels if sum(n.weights[name] for name in away(x, n.weights)) < host) or levels[:1]
    few = max(1, min(CUDA_SLOTS, int(MODEST // n.image))) if memory == "low" else FEW
    wanted = slots or min(few, CPU_SLOTS)
    quick, slow = [x for x in levels if x != LAYERS], [x for x in levels if x == LAYERS]
    for level, count in [(x, c) for some in (quick, slow) for c in (wanted, 1) for x in some]:
        for strips in (False, True):
            if peak(n, level, count, 1, strips) <= usable:
                return _share(n, usable, free, level, count, strips, grow=slots is None and memory != "low")
    least = peak(n, levels[-1], 1, 1, True)
    if least > free:
        hint = "" if memory == "low" or len(_LEVELS[memory]) == len(LEVELS) else "; --memory low needs less"
        raise HostError(f"memory: one image takes {_gib(least)} GiB on {device}, and {_gib(free)} are free{hint}")
    return _share(n, usable, free, levels[-1], slots or 1, True, grow=False)


def _share(n: Need, usable: float, free: float, level: str, slots: int, strips: bool, *, grow: bool) -> Budget:
    """Return the budget of a level: up to a third of the room is for decoding, the rest for images in flight."""
    room = usable if grow else peak(n, level, slots, 1, strips)
    pictures = 1
    if not strips:
        third = (usable - peak(n, level, 1, 0)) / 3 if n.beside and level in (RESIDENT, PARTS) else math.inf
        fitting = [p for p in (2, 4, PICTURES) if peak(n, level, slots, p) <= room and n.decode * n.cost * p <= third]
        pictures = max([1, *fitting])
    if grow:
        most = CUDA_SLOTS if n.beside else CPU_SLOTS
        slots = max([1, *(s for s in range(1, most + 1) if peak(n, level, s, pictures, strips) <= usable)])
    much = 1e15
    left = room - (_PEAKS[level](n, n.image * max(slots, n.cost), much, 0) - much)  # all that a decode may take
    area = n.area * left / n.decode if n.decode else math.inf
    return Budget(level, slots, area, peak(n, level, slots, pictures, strips), free)


def away(level: str, names: Collection[str]) -> set[str]:
    """Return which of a model's networks have their place in RAM at a level."""
    return {RESIDENT: set(), PARTS: set(names) - {"unet"}}.get(level, set(names))


def budget_for(info: ModelInfo, clip: ModelInfo | None, device: torch.device, dtype: torch.dtype, memory: str = "auto",
               slots: int | None = None, largest: tuple[int, int] | None = None) -> Budget:  # fmt: skip
    """Return how to load and run a model and its scorer on `device` as it is now; see `model_need`, `plan_memory`."""
    n = model_need(info, clip, str(dtype).removeprefix("torch."), device.type, largest)
    return plan_memory(n, free_memory(device), memory, slots, device=str(device), host=host_memory())


def budget_of(unet: Any, vae: Any, device: torch.device) -> Budget:
    """Return how to run networks that are loaded already, in what memory is left."""
    try:
        configs = {"unet": unet.config, **({} if vae is None else {"vae": vae.config})}
        sizes = {"item": unet.dtype.itemsize, "vae_item": None if vae is None else vae.dtype.itemsize}
        n = need(configs, {}, largest=0, beside=device.type == "cuda", **sizes)
        return plan_memory(n, free_memory(device), "high", device=str(device))
    except HostError:  # it is here, so let it try
        return Budget(RESIDENT, 1, 0, 0, 0)
    except (KeyError, TypeError):  # networks of other classes
        return Budget(RESIDENT, CPU_SLOTS, math.inf, 0, 0)


def describe(info: ModelInfo, clip: ModelInfo | None, options: Options, largest: tuple[int, int]) -> dict[str, Any]:
    """Return what `--dry-run` says of memory, in GiB, for each kind of device that the job may run on.

    weights, and what an image in flight and a decode take; the peak of one image with everything on the device (high),
    with one network at a time (low), and at the very least: layer by layer and in strips.
    """
    found: dict[str, Any] = {}
    for kind, usual in (("cpu", "float32"), ("cuda", "float16")):
        if options.device.split(":")[0] in ("auto", kind):
            dtype = usual if options.dtype == "auto" else DTYPES[options.dtype]
            n = model_need(info, clip, dtype, kind, largest)
            slots = options.batch_size or 1
            found[kind] = {
                "weights": _gib(sum(n.weights.values())),
                "an_image": _gib(n.image),
                "a_decode": _gib(n.decode * n.cost),
                "high": _gib(peak(n, RESIDENT, slots)),
            }
            if kind == "cuda":
                found[kind] |= {"low": _gib(peak(n, TURNS, slots)), "least": _gib(peak(n, LAYERS, 1, 1, True))}
            else:
                found[kind]["free"] = _gib(host_memory())
    return {"memory": options.memory, "memory_gib": found}


def _gib(size: float) -> float:
    return round(size / 2**30, 2 if size > 2**30 else 3)


def _guests(n: Need, decode: float, score: float) -> float:
    """Return the bytes of the largest of the networks that come for their work, with that work."""
    w = n.weights
    return max(w.get("vae", 0) + decode, max(w.get(name, 0) for name in TEXTS) + n.text, w.get("clip", 0) + score)


def _resident(n: Need, rows: float, decode: float, score: float) -> float:
    work = max(decode, n.text, score)
    return sum(n.weights.values()) + (rows + work if n.beside else max(rows, work))


_PEAKS: dict[str, Callable[[Need, float, float, float], float]] = {
    RESIDENT: _resident,
    PARTS: lambda n, rows, *work: n.weights["unet"] + rows + _guests(n, *work),
    TURNS: lambda n, rows, *work: max(n.weights["unet"] + rows, _guests(n, *work)),
    LAYERS: lambda n, rows, *work: max(LEAVES * n.largest + rows, _guests(n, *work)),
}
_LEVELS: dict[str, tuple[str, ...]] = {"auto": LEVELS, "high": (RESIDENT,), "low": (TURNS, LAYERS)}
_SAID = {
    RESIDENT: "every network stays on the device",
    PARTS: "the UNet stays on the device, the other networks come for their work",
    TURNS: "one network at a time is on the device",
    LAYERS: "the UNet comes to the device layer by layer, which is slow",
}
