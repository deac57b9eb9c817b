"""Make batches of examples. Augmentation is a function of (seed, epoch, picture), the order of (seed, epoch)."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from genkit.datasets.config import Background, Data
from genkit.datasets.example import Example
from genkit.errors import InputError, nearest, shown
from genkit.pictures.edges import COMPUTED, PREPROCESS
from genkit.training.layers import BLACK, check_conditioning, fitted, pasted, read_beside
from genkit.training.state import fold

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("genkit")
# Colours that pictures are changed to, as hues in degrees, and those of backgrounds.
HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 125, "blue": 215, "purple": 275, "pink": 325}
BACKGROUNDS = {
    "red": "#e53935", "orange": "#fb8c00", "yellow": "#fdd835", "green": "#43a047", "blue": "#1e66d0",
    "purple": "#8e24aa", "pink": "#f06fb0", "black": "#000000", "white": "#ffffff", "gray": "#808080",
}  # fmt: skip
SATURATED, LIT = 60, 50  # least saturation and value, of 255, of a pixel with a hue
COLOURED = 0.15  # least share of such pixels for a picture's hue to be changed
# Words in captions that would be wrong after changing the hue, or after mirroring.
COLOURED_WORD = re.compile(
    rf"\b({'|'.join({*HUES, *BACKGROUNDS})}|grey|brown|violet|cyan|magenta|gold|golden|silver|beige)\b", re.IGNORECASE
)
SIDED_WORD = re.compile(r"\b(left|right)(ward)?s?\b|clockwise", re.IGNORECASE)
SEEN = 0.1  # least share of background for a caption to mention it
FIELD = re.compile(r"\{(\w+)\}")
ASPECTS = 2.0  # buckets go from 1:2 to 2:1


@dataclasses.dataclass
class Batch:
    """A training batch: pixels (B, 3, H, W) from -1 to 1, captions, names (keys), and SDXL's sizes (B, 6).

    sizes: original height and width, top and left of the crop, target height and width. weights (B,): of the losses.
    dropped (B,): whether the caption is dropped. tensors: cached inputs of the networks, if any. scenes: the objects of
    each composed picture (scenes.py). conditioning: what a ControlNet reads, (B, 3, H, W) uint8.
    """

    pixels: torch.Tensor
    captions: list[str]
    keys: list[str]
    sizes: torch.Tensor
    weights: torch.Tensor
    dropped: torch.Tensor
    tensors: dict[str, torch.Tensor] | None = None
    scenes: list[Any] | None = None
    conditioning: torch.Tensor | None = None


class Source(Protocol):
    """The source of a Feed: Pictures, or their cached tensors."""

    data: Data
    seed: int
    buckets: dict[tuple[int, int], list[int]]

    def batch(self, indices: Sequence[int], epoch: int) -> Batch: ...


class Pictures:
    """Examples with the recipe's augmentation. resolution: (width, height); with buckets its area is the largest.

    Raises InputError for a resolution that the networks do not support, and for a template with an unknown field.
    """

    def __init__(self, examples: Sequence[Example], data: Data, resolution: tuple[int, int], multiple: int, seed: int):
        self.examples, self.data, self.seed, self.multiple = list(examples), data, seed, multiple
        side = data.resolution
        self.resolution = resolution if side is None else (side, side) if isinstance(side, int) else (side[0], side[1])
        step = math.lcm(data.bucket_step, multiple) if data.buckets else multiple
        for number in self.resolution:
            if number % multiple:
                raise InputError(f"data.resolution: {number} is not a multiple of {multiple}, as the networks need it")
            if data.buckets and number < step:
                raise InputError(f"data.bucket_step: sides in steps of {step} are more than data.resolution, {number}")
        if self.examples:
            _check_words(data, {"caption"}.union(*(e.fields for e in self.examples)))
        check_conditioning(data, self.examples)
        self.buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.broken: set[int] = set()  # pictures that could not be read
        shapes = _shapes(self.resolution, step) if data.buckets else [self.resolution]
        for index, example in enumerate(self.examples):
            try:
                width, height = example.size() if data.buckets else (1, 1)
            except InputError as error:
                self._leave_out(index, error)
                continue
            self.buckets[min(shapes, key=lambda s: abs(math.log(s[0] * height / (s[1] * width))))].append(index)
        if self.broken and not self.buckets:
            raise InputError(f"data.path: none of the {len(self)} pictures can be read")
        for index in sorted(self.broken):  # each picture has its bucket; these are replaced by others that are there
            max(self.buckets.values(), key=len).append(index)
        self._shape = {index: shape for shape, members in self.buckets.items() for index in members}

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """Return the batch of `indices` (of one bucket, from `order`) with the augmentation of epoch `epoch`."""
        indices, turns = turned(self.data, len(self), indices, epoch)
        taken = [self._whole(index, turn) for index, turn in zip(indices, turns, strict=True)]
        indices, made = [index for index, _ in taken], [one for _, one in taken]
        pixels, captions, sizes, dropped, conditioning = zip(*made, strict=True)
        return Batch(
            torch.from_numpy(np.stack(pixels)), list(captions), [self.examples[i].key for i in indices],
            torch.tensor(sizes), torch.ones(len(made)), torch.tensor(dropped),
            conditioning=None if self.data.conditioning is None else torch.from_numpy(np.stack(conditioning)),
        )  # fmt: skip

    def _whole(self, index: int, turn: int) -> tuple[int, Any]:
        """Return a picture as `make` does, with its index; instead of one that cannot be read, the next of its bucket.

        Raises InputError once more pictures than data.broken allows, or all of a bucket, cannot be read. Below that
        limit training goes on.
        """
        shape = self._shape[index]
        while True:
            if index not in self.broken:
                try:
                    return index, self.make(index, turn)
                except InputError as error:
                    self._leave_out(index, error)
                    log.warning("left out: %s", error)
            others = [i for i in self.buckets[shape] if i not in self.broken]
            if not others:
                name, size = self.examples[index].key, f"{shape[0]}x{shape[1]}"
                raise InputError(
                    f"data.path: {name} cannot be read, and no other picture is trained at {size}: remove it"
                )
            index = next((i for i in others if i > index), others[0])

    def _leave_out(self, index: int, error: InputError) -> None:
        """Count a picture as unreadable. Raises `error` where these are more than data.broken allows."""
        if len(self.broken) + 1 > self.data.broken * len(self):
            raise error
        self.broken.add(index)

    def make(self, index: int, turn: int) -> tuple[np.ndarray, str, tuple[int, ...], bool, np.ndarray | None]:
        """Return pixels (3, H, W), caption, sizes, whether the caption is dropped, and conditioning (3, H, W) uint8.

        turn: how often the picture was used before. Augmentation that would make its caption wrong is left out. Raises
        InputError, naming the picture.
        """
        example, data = self.examples[index], self.data
        variant = turn % data.cache if data.cache else turn
        rng = random.Random(fold(self.seed, "picture", variant, example.key))
        picture, colour, wanted = example.read(), "", data.recolour
        template, values = self._told(example, rng)
        may = wanted is not None and (wanted.where is None or bool(example.fields.get(wanted.where)))
        if wanted is not None and may and rng.random() < wanted.share:
            colour = rng.choice(list(HUES))
            known = COLOURED_WORD.search(worded(data, template, values, ""))
            hued = None if known else turn_hue(picture, HUES[colour])
            picture, colour = (picture, "") if hued is None else (hued, colour)
        caption = worded(data, template, values, colour)
        if data.caption_shuffle:
            parts = [part.strip() for part in caption.split(",")]
            rng.shuffle(parts)
            caption = ", ".join(parts)
        layers = [picture]
        if example.conditioning is not None:
            layers.append(read_beside(example.conditioning, picture.size))
        mentioned, layers = self._on_background(layers, "background" in caption.lower(), rng)
        if mentioned:
            caption = filled(data.background.caption, {"caption": caption, "background": mentioned})
        flip = 0.0 if SIDED_WORD.search(caption) else data.flip
        layers, sizes = fitted(layers, self._shape[index], data.crop, flip, rng)
        pixels = np.ascontiguousarray(np.asarray(layers[0], dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)
        if data.conditioning in COMPUTED:
            layers.append(PREPROCESS[data.conditioning](layers[0]))
        read = np.asarray(layers[1]).transpose(2, 0, 1) if len(layers) > 1 else None
        return pixels, caption, sizes, self.dropped(index, turn), read

    def dropped(self, index: int, turn: int) -> bool:
        """Return whether a picture's caption is dropped in this turn."""
        rng = random.Random(fold(self.seed, "drop", turn, self.examples[index].key))
        return rng.random() < self.data.caption_dropout

    def plain(self, examples: Sequence[Example]) -> Pictures:
        """Return other examples without augmentation and with the first template: for validation."""
        still: dict[str, Any] = {"flip": 0.0, "crop": "center", "zoom": 1.0, "recolour": None, "caption_shuffle": False}
        colour = "white" if self.data.background.colour == "random" else self.data.background.colour
        fields = {"caption"}.union(*(e.fields for e in examples))
        first = [t for t in self.data.captions[:1] if fields.issuperset(FIELD.findall(t))]
        still["broken"] = 1.0  # the limit is of the whole data set, which the doctor has counted
        still |= {"background": Background(colour=colour), "captions": first or ["{caption}"]}
        data = self.data.model_copy(update=still)
        return Pictures(examples, data, self.resolution, self.multiple, self.seed)

    def names(self) -> set[str]:
        """Return all captions, without augmentation."""
        return {worded(self.data, *self._told(example, random.Random(0)), "") for example in self.examples}

    def _told(self, example: Example, rng: random.Random) -> tuple[str, dict[str, Any]]:
        """Draw a template, and one value of each field."""
        values = {**example.fields, "caption": list(example.captions) or example.caption or ""}
        template = rng.choice(usable(self.data, values))
        return template, {name: rng.choice(v) if isinstance(v, list) and v else v for name, v in values.items()}

    def _on_background(
        self, layers: list[Image.Image], captioned: bool, rng: random.Random
    ) -> tuple[str, list[Image.Image]]:
        """Return the name of the background if the caption should mention it, else "", and the picture on it.

        layers: the picture, and its conditioning if it lies beside it, on black; both are scaled by `zoom`. captioned:
        whether the caption mentions a background already.
        """
        picture = layers[0]
        plan, clear, named = self.data.background, picture.mode == "RGBA", ""
        if clear and rng.random() < plan.share:
            named = rng.choice(list(BACKGROUNDS))
        scale = rng.uniform(self.data.zoom, 1.0)
        if not clear and self.data.zoom == 1:
            return "", layers
        covered = scale**2 * float(np.asarray(picture.getchannel("A")).mean()) / 255 if named else 1.0
        mentioned = "" if captioned or 1 - covered < SEEN else named
        drawn = tuple(rng.randrange(256) for _ in range(3)) if plan.colour == "random" else None
        colour = drawn if drawn is not None and not mentioned else _colour(mentioned or plan.colour)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        at = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
        grounds = zip(layers, (colour, BLACK), strict=False)
        return mentioned, [pasted(layer, (width, height), at, ground) for layer, ground in grounds]


def turn_hue(picture: Image.Image, hue: float) -> Image.Image | None:
    """Return the picture with its hues rotated so that the main one is `hue`, in degrees; None if it has no hue."""
    from PIL import Image

    alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
    hsv = np.array(picture.convert("RGB").convert("HSV"))
    seen = np.full(hsv.shape[:2], True) if alpha is None else np.asarray(alpha) > 127
    coloured = seen & (hsv[..., 1] >= SATURATED) & (hsv[..., 2] >= LIT)
    if coloured.sum() < COLOURED * max(1, seen.sum()):
        return None
    counts = np.bincount(hsv[..., 0][coloured], minlength=256)
    smooth = sum(np.roll(counts, shift) for shift in range(-8, 9))
    hsv[..., 0] += np.uint8((round(hue * 256 / 360) - int(np.argmax(smooth))) % 256)  # wraps round
    turned = Image.fromarray(hsv, "HSV").convert("RGB")
    if alpha is not None:
        turned.putalpha(alpha)
    return turned


def usable(data: Data, values: Mapping[str, Any]) -> list[str]:
    """Return the templates of a recipe for which a picture has all fields."""
    return [t for t in data.captions if all(values.get(n) for n in FIELD.findall(t))] or ["{caption}"]


def worded(data: Data, template: str, values: Mapping[str, Any], colour: str) -> str:
    """Fill a template; `colour`, if any, is put into {caption}, or into the last field of the template."""
    names = FIELD.findall(template)
    if colour and data.recolour is not None and names:
        thing = "caption" if "caption" in names else names[-1]
        values = {**values, thing: filled(data.recolour.caption, {"caption": values[thing], "colour": colour})}
    return filled(template, values)


def _check_words(data: Data, known: Collection[str]) -> None:
    """Raise InputError for a template with an unknown field, and for an unknown colour."""
    recolour, ground = data.recolour, data.background
    own: list[tuple[str, Sequence[str], Collection[str], Collection[str]]] = [
        ("data.captions", data.captions, known, ()),
        ("data.background.caption", [ground.caption], ("caption", "background"), ("caption", "background")),
    ]
    if recolour is not None:
        own.append(("data.recolour.caption", [recolour.caption], ("caption", "colour"), ("caption", "colour")))
        own.append(("data.recolour.where", [f"{{{recolour.where}}}"] if recolour.where else [], known, ()))
    for field, templates, may, must in own:
        for template in templates:
            names = FIELD.findall(template)
            strange = next((name for name in names if name not in may), None)
            if strange is not None:
                there = ", ".join(sorted(may, key=lambda name: (name != "caption", name))[:20])
                raise InputError(
                    f"{field}: no picture has a field {shown(strange)}{nearest(strange, may)}; there are {there}"
                )
            missing = next((name for name in must if name not in names), None)
            if missing is not None:
                raise InputError(f"{field}: {shown(template)} says nothing of {{{missing}}}")
    if ground.colour != "random":
        _colour(ground.colour)


def _colour(name: str) -> tuple[int, ...]:
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(BACKGROUNDS.get(name, name))[:3]
    except ValueError:
        hint = nearest(name, BACKGROUNDS)
        raise InputError(f"data.background.colour: {shown(name)} is no colour{hint}") from None


def filled(template: str, values: Mapping[str, Any]) -> str:
    return FIELD.sub(lambda m: str(values.get(m[1], m[0])), template).strip()


def _shapes(resolution: tuple[int, int], step: int) -> list[tuple[int, int]]:
    """Return widths and heights in steps, of at most the area of `resolution`, from 1:2 to 2:1."""
    area = resolution[0] * resolution[1]
    found = set()
    for width in range(step, area // step + 1, step):
        height = area // width // step * step
        if height and 1 / ASPECTS <= width / height <= ASPECTS:
            found.add((width, height))
    return sorted(found) or [resolution]


def order(source: Source, batch_size: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch, each of one bucket; each picture is in data.repeat of them.

    The last batch of a bucket may be short. In the k-th repeat of a picture, k from 0, its index is increased by k
    times the number of pictures; `turned` undoes this.
    """
    rng = random.Random(fold(source.seed, "order", epoch))
    count = sum(map(len, source.buckets.values()))
    found = []
    for shape in sorted(source.buckets):
        members = [index + copy * count for copy in range(source.data.repeat) for index in source.buckets[shape]]
        rng.shuffle(members)
        found += [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
    rng.shuffle(found)
    return found


def turned(data: Data, count: int, places: Sequence[int], epoch: int) -> tuple[list[int], list[int]]:
    """Return the pictures' indices from those of an `order` of `count` pictures, and how often each was used before."""
    return [place % count for place in places], [epoch * data.repeat + place // count for place in places]


class Feed:
    """An endless stream of batches that can start at any step; each process gets its own part."""

    def __init__(
        self, source: Source, batch_size: int, workers: int = 0, rank: int = 0, world: int = 1, pin: bool = False
    ):
        self.source, self.batch_size, self.workers, self.pin = source, batch_size, workers, pin
        self.rank, self.world = rank, world
        self.steps = sum(-(-len(m) * source.data.repeat // batch_size) for m in source.buckets.values())
        self._counts = lru_cache(8)(lambda epoch: [len(members) for members in order(source, batch_size, epoch)])

    def places(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (epoch, indices) of this process's micro-steps from `start` on."""
        epoch, own = -1, []
        number = start * self.world + self.rank
        while True:
            if number // self.steps != epoch:
                epoch = number // self.steps
                own = order(self.source, self.batch_size, epoch)
            yield epoch, own[number % self.steps]
            number += self.world

    def weight_of(self, micro_step: int, passes: int) -> float:
        """Return the weight of a micro-step's mean loss, so that all pictures of a step have the same weight.

        It is the micro-step's share of the pictures of its step, times the number of processes, and differs from the
        others' if the last batch of a bucket is short.
        """
        first = micro_step // passes * passes * self.world
        every = [self._counts(n // self.steps)[n % self.steps] for n in range(first, first + passes * self.world)]
        return every[micro_step * self.world + self.rank - first] * self.world / sum(every)

    def from_micro_step(self, start: int) -> Iterator[tuple[int, Batch]]:
        """Yield (epoch, batch) from a micro-step on. Raises InputError for a picture that cannot be read."""
        return batches(self.source, self.places(start), self.workers, self.pin)


def batches(
    source: Source, places: Iterable[tuple[int, list[int]]], workers: int = 0, pin: bool = False
) -> Iterator[tuple[int, Batch]]:
    """Yield (epoch, batch) for each (epoch, indices) of `places`, in order, read ahead by `workers` processes."""
    if not workers:
        yield from ((epoch, source.batch(indices, epoch)) for epoch, indices in places)
        return
    loader = torch.utils.data.DataLoader(
        _Fetch(source), batch_size=None, sampler=_Places(places), num_workers=workers,
        prefetch_factor=4, pin_memory=pin, collate_fn=_same,
    )  # fmt: skip
    for epoch, batch in loader:
        if isinstance(batch, str):
            raise InputError(batch)
        yield epoch, Batch(**batch)


class _Fetch(torch.utils.data.Dataset[Any]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, place: tuple[int, list[int]]) -> tuple[int, Any]:
        try:
            return place[0], dict(vars(self.source.batch(place[1], place[0])))
        except InputError as error:  # as text: the message of an exception in a worker would contain a traceback
            return place[0], str(error)


class _Places(torch.utils.data.Sampler[Any]):
    def __init__(self, places: Iterable[tuple[int, list[int]]]) -> None:
        self.places = places

    def __iter__(self) -> Iterator[Any]:
        return iter(self.places)


def _same(value: Any) -> Any:
    return value
