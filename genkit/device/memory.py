"""How a job uses a device's memory: the level at which networks are moved, images in flight, size of a decode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

from genkit.device.devices import CPU_SLOTS, CUDA_SLOTS
from genkit.errors import HostError, InputError, nearest, shown

MEMORY = ("auto", "high", "low")
PICTURES = 8  # most pictures a decode; more gain nothing
CLIP_BATCH = 32  # texts or pictures a call of CLIP
# Bytes of linear weights of which a CPU keeps a packed copy: Stable Diffusion 1.5 has fewer, SDXL more
MOST_PACKED = 2**31
FEW = 4  # images in flight: a level that allows this many is preferred to a faster level that allows fewer
MODEST = 256 * 2**20  # bytes of images in flight that --memory low allows
RESERVE = {"cuda": 0.4 * 2**30, "cpu": 0.3 * 2**30}  # workspaces and kernels of the libraries, other processes
SPARE = 0.05  # share of the free memory lost to fragmentation
LEAVES = 4  # largest layers of the UNet that may be on the device at the level "layers"

# From the fastest to the slowest. Where the UNet is moved, its calls cannot be captured in a graph.
RESIDENT, PARTS, TURNS, LAYERS = LEVELS = ("resident", "parts", "turns", "layers")
TEXTS = ("text_encoder", "text_encoder_2", "refiner_text")
UNETS = ("unet", "refiner")
CONTROL = "controlnet"  # and a number: ControlNets compute at every step, too


def at_each_step(name: str) -> bool:
    """Whether a network computes at every step: a UNet or a ControlNet."""
    return name in UNETS or name.startswith(CONTROL)


def check_memory(memory: str) -> None:
    """Raise InputError for an unknown value of --memory."""
    if memory not in MEMORY:
        raise InputError(f"--memory: {shown(memory)} is not auto, high or low{nearest(memory, MEMORY)}")


@dataclasses.dataclass(frozen=True)
class Look:
    """Bytes that a vision model takes: its weights, and the activations for one picture."""

    weights: float
    picture: float


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that the networks of a job and their work take on a device.

    weights: by network ("unet", "vae", "text_encoder", "clip"; "refiner", "refiner_text" of SDXL's refiner; "detector",
    "classifier", "captioner"); largest: the UNet's largest weight. image: denoising one image of the model's own size,
    with guidance. area: latent positions (rows times columns) of that size. decode, strips: decoding one such image,
    whole and in strips. text: a batch of prompts; score: one picture in CLIP; looks: one picture in each vision model.
    cost: pixels of the job's largest picture relative to the model's own size. beside: whether decoding overlaps
    denoising. first: a model that runs alone on the device before any other is loaded ("segmenter"), with
    its activations.
    """

    weights: Mapping[str, float]
    largest: float
    image: float
    area: int
    decode: float
    strips: float
    text: float = 0.0
    score: float = 0.0
    looks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cost: float = 1.0
    beside: bool = True
    first: float = 0.0


@dataclasses.dataclass(frozen=True)
class Budget:
    """The memory level, images in flight, latent positions a decode, and the bytes at the peak and free."""

    level: str
    slots: int
    area: float
    peak: float
    free: float

    def line(self, device: object, memory: str = "auto") -> str:
        """Return the message for the user; empty on a CPU with the usual number of slots."""
        if str(device) == "cpu" and self.slots >= CPU_SLOTS and memory == "auto":
            return ""
        where = "" if str(device) == "cpu" else f"{_SAID[self.level]}; "
        many = f"{self.slots} images at once" if self.slots > 1 else "one image at once"
        return f"memory: {where}{many}, about {gib(self.peak)} of {gib(self.free)} GiB free on {device}"


def peak(n: Need, level: str, slots: int, pictures: int = 1, strips: bool = False) -> float:
    """Return the peak bytes with `slots` images in flight and `pictures` of the largest size a decode."""
    rows = n.image * max(slots, n.cost)
    decode = n.cost * (n.strips if strips else n.decode * pictures)
    return _PEAKS[level](n, rows, decode, _at_work(n, slots))


def _at_work(n: Need, slots: int) -> dict[str, float]:
    """Return the bytes of activations of CLIP and of each vision model, for a batch of pictures."""
    looks = {name: size * min(slots, PICTURES) for name, size in n.looks.items()}
    return {"clip": n.score * min(slots, CLIP_BATCH), **looks}


def plan_memory(n: Need, free: float, memory: str = "auto", slots: int | None = None, *, device: str = "cuda",
                host: float = math.inf) -> Budget:  # fmt: skip
    """Return the budget for `free` bytes: the fastest level that fits a few images, else the fastest that fits one.

    slots: images in flight, if asked for. host: bytes of RAM free for networks that are moved off the device. Raises
    HostError if not one image fits at any level that `memory` allows, or what works before them does not.
    """
    kind = device.split(":")[0]
    if n.first > free:
        raise HostError(f"memory: masks in words take {gib(n.first)} GiB on {device}, and {gib(free)} are free")
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
        raise HostError(f"memory: one image takes {gib(least)} GiB on {device}, and {gib(free)} are free{hint}")
    return _share(n, usable, free, levels[-1], slots or 1, True, grow=False)


def _share(n: Need, usable: float, free: float, level: str, slots: int, strips: bool, *, grow: bool) -> Budget:
    """Return the budget of a level: up to a third of the memory is for decoding, the rest for images in flight."""
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
    left = room - (
        _PEAKS[level](n, n.image * max(slots, n.cost), much, {"clip": 0}) - much
    )  # the most that a decode may take
    area = n.area * left / n.decode if n.decode else math.inf
    return Budget(level, slots, area, peak(n, level, slots, pictures, strips), free)


def at_once(look: Look, free: float, device: str, most: int) -> int:
    """Return at how many pictures a model that is alone on a device may look at once, 1 to `most`."""
    usable = free * (1 - SPARE) - RESERVE.get(device.split(":")[0], 0)
    return max(1, min(most, int((usable - look.weights) / max(look.picture, 1.0))))


def away(level: str, names: Collection[str]) -> set[str]:
    """Return which of a model's networks are kept in RAM at a level."""
    return {RESIDENT: set(), PARTS: {name for name in names if not at_each_step(name)}}.get(level, set(names))


def gib(size: float) -> float:
    return round(size / 2**30, 2 if size > 2**30 else 3)


def _guests(n: Need, decode: float, looks: Mapping[str, float]) -> float:
    """Return the peak bytes of the networks that are moved to the device one at a time, each with its work."""
    w = n.weights
    looking = max((w.get(name, 0) + work for name, work in looks.items()), default=0)
    return max(w.get("vae", 0) + decode, max(w.get(name, 0) for name in TEXTS) + n.text, looking)


def _unets(n: Need) -> list[float]:
    return [size for name, size in n.weights.items() if at_each_step(name)]


def _resident(n: Need, rows: float, decode: float, looks: Mapping[str, float]) -> float:
    work = max(decode, n.text, *looks.values())
    return sum(n.weights.values()) + (rows + work if n.beside else max(rows, work))


_PEAKS: dict[str, Callable[[Need, float, float, Mapping[str, float]], float]] = {
    RESIDENT: _resident,
    PARTS: lambda n, rows, *work: sum(_unets(n)) + rows + _guests(n, *work),
    TURNS: lambda n, rows, *work: max(max(_unets(n)) + rows, _guests(n, *work)),
    LAYERS: lambda n, rows, *work: max(LEAVES * n.largest + rows, _guests(n, *work)),
}
_LEVELS: dict[str, tuple[str, ...]] = {"auto": LEVELS, "high": (RESIDENT,), "low": (TURNS, LAYERS)}
_SAID = {
    RESIDENT: "every network stays on the device",
    PARTS: "the UNet stays on the device, the other networks come for their work",
    TURNS: "one network at a time is on the device",
    LAYERS: "the UNet comes to the device layer by layer, which is slow",
}
