"""Composed scenes to train a detector on: drawings pasted onto a background, with their boxes, and texts to look for.

A scene depends on (seed, epoch, drawing) alone, as augmented pictures do. Drawings are pictures with an alpha channel,
from which exact boxes follow; of an opaque picture the box is the whole picture.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genkit.datasets.config import Data
from genkit.datasets.example import Example
from genkit.errors import InputError
from genkit.training.data import BACKGROUNDS, COLOURED_WORD, HUES, Batch, Pictures, turn_hue, turned, worded
from genkit.training.recipe import Recipe, Scenes
from genkit.training.state import fold

if TYPE_CHECKING:
    from PIL import Image

KEPT = 4096  # drawings in memory
KINDS = 3  # most different texts of objects in a scene
# Largest side of each of 1, 2, … objects, as a share of the picture's side, so that all fit; and the least share of it.
LARGEST, LEAST = (1.0, 0.6, 0.52, 0.46, 0.42, 0.38, 0.35, 0.33, 0.31), 0.6
SHARED = 0.12  # most overlap of two boxes, as a share of the smaller one
TRIES = 25  # random positions tried before an object is made smaller
CLEAR = 32  # pixels with a lower alpha, of 255, are background
TURNED = 15  # largest rotation, degrees
GRAIN = 8.0  # largest standard deviation of noise, in levels of 255
WORD = re.compile(r"[a-z]{3,}")


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a scene.

    words: texts to look for, those of its objects first, then absent ones. boxes: (n, 4), centre and size, 0 to 1.
    owners: for each box the index of its text.
    """

    words: list[str]
    boxes: np.ndarray
    owners: list[int]


class ScenePictures(Pictures):
    """One scene for each example and epoch, with that example as the first object."""

    def __init__(
        self, examples: Sequence[Example], data: Data, resolution: tuple[int, int], multiple: int, seed: int,
        plan: Scenes,
    ) -> None:  # fmt: skip
        super().__init__(examples, data, resolution, multiple, seed)
        if self.resolution[0] != self.resolution[1]:
            raise InputError(f"data.resolution: {list(self.resolution)}: a detector reads squares; give one side")
        self.plan = plan
        self._drawings: dict[int, Image.Image] = {}
        by_name: dict[str | None, list[int]] = defaultdict(list)
        near: dict[Any, list[int]] = defaultdict(list)
        for index, example in enumerate(self.examples):
            by_name[example.caption].append(index)
            near[example.fields.get(plan.near) if plan.near else None].append(index)
        self.alike, self.near = dict(by_name), dict(near)
        if plan.near and len(self.examples) and near.keys() == {None}:
            raise InputError(f"scenes.near: no picture has a field {plan.near!r}")

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """Return the scenes of `indices` in an epoch; their captions are the joined texts."""
        indices, turns = turned(self.data, len(self), indices, epoch)
        taken = [self._whole(index, turn) for index, turn in zip(indices, turns, strict=True)]
        pixels, scenes = zip(*(made for _, made in taken), strict=True)
        count = len(taken)
        return Batch(
            torch.from_numpy(np.stack(pixels)), ["; ".join(s.words) for s in scenes],
            [self.examples[index].key for index, _ in taken], torch.zeros(count, 6, dtype=torch.long),
            torch.ones(count), torch.zeros(count, dtype=torch.bool), scenes=list(scenes),
        )  # fmt: skip

    def make(self, index: int, turn: int) -> Any:
        """Return pixels (3, H, W) from -1 to 1 and the Scene. Raises InputError, naming the picture."""
        lot = random.Random(fold(self.seed, "scene", turn, self.examples[index].key))
        count = lot.randint(1, self.plan.most)
        kinds = 1 if count == 1 or lot.random() < self.plan.alike else lot.randint(2, min(KINDS, count))
        chosen = [index]
        for _ in range(20):  # a small data set may have no other that fits
            other = lot.randrange(len(self.examples))
            if len(chosen) < kinds and all(apart(self.examples[other], self.examples[c]) for c in chosen):
                chosen.append(other)
        owners = [*range(len(chosen)), *(lot.randrange(len(chosen)) for _ in range(count - len(chosen)))]
        things, words = list[Any](), list[str]()
        for kind in chosen:
            word, own = self._kind(kind, owners.count(len(words)), lot)
            words.append(word)
            things += own
        owners.sort()
        canvas, corners = compose(things, self.resolution[0], lot)
        boxes = [((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0) for x0, y0, x1, y1 in corners]
        pixels = np.asarray(canvas, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
        words += self._absent(chosen, lot)
        return np.ascontiguousarray(pixels), Scene(words, np.array(boxes, dtype=np.float32), owners)

    def plain(self, examples: Sequence[Example]) -> ScenePictures:
        """Return scenes of other examples, for evaluation: plain captions, no changes of hue."""
        data = self.data.model_copy(update={"captions": ["{caption}"], "recolour": None})
        return ScenePictures(examples, data, self.resolution, self.multiple, self.seed, self.plan)

    def drawing(self, index: int) -> Image.Image:
        """Return a drawing as RGBA, cropped to its opaque part; KEPT of them are cached."""
        if index not in self._drawings:
            if len(self._drawings) >= KEPT:
                del self._drawings[next(iter(self._drawings))]
            self._drawings[index] = cut(self.examples[index].read().convert("RGBA"), self.examples[index].key)
        return self._drawings[index]

    def _kind(self, index: int, count: int, lot: random.Random) -> tuple[str, list[Image.Image]]:
        """Return the text of an example, and `count` drawings of it: the same one, or in all styles of the data set."""
        example, wanted = self.examples[index], self.data.recolour
        template, values = self._told(example, lot)
        group = self.alike[example.caption]
        same = lot.random() < 0.6
        drawn = [self.drawing(index if same or k == 0 else lot.choice(group)) for k in range(count)]
        colour, word = "", worded(self.data, template, values, "")
        may = wanted is not None and (wanted.where is None or bool(example.fields.get(wanted.where)))
        if wanted is not None and may and lot.random() < wanted.share and not COLOURED_WORD.search(word):
            hue = lot.choice(list(HUES))
            hued = [turned for picture in drawn if (turned := turn_hue(picture, HUES[hue])) is not None]
            drawn, colour = (hued, hue) if len(hued) == len(drawn) else (drawn, "")
        if colour and lot.random() < 0.5:  # in half of the cases the text names the colour, too
            word = worded(self.data, template, values, colour)
        return word, drawn

    def _absent(self, present: Sequence[int], lot: random.Random) -> list[str]:
        """Return texts of absent objects, half of them from the same group (`scenes.near`) as the first object."""
        main = self.examples[present[0]]
        near = self.near[main.fields.get(self.plan.near) if self.plan.near else None]
        found: list[str] = []
        for k in range(20 * self.plan.absent):
            other = self.examples[lot.choice(near) if k % 2 else lot.randrange(len(self.examples))]
            if len(found) < self.plan.absent and all(apart(other, self.examples[c]) for c in present):
                template, values = self._told(other, lot)
                word = worded(self.data, template, values, "")
                found += [word] if word not in found else []
        return found


def apart(one: Example, other: Example) -> bool:
    """Return whether two examples share no word of their names: "apple" would be right for "red apple", too."""
    return _names(one).isdisjoint(_names(other, True)) and _names(other).isdisjoint(_names(one, True))


def _names(example: Example, loose: bool = False) -> frozenset[str]:
    return _spelt(example.caption or "", *(_texts(example.fields, n) for n in ("synonyms", *(["keywords"] * loose))))


def _texts(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name) or ()
    return value if isinstance(value, str) else " ".join(map(str, value))


@functools.lru_cache(65536)
def _spelt(*texts: str) -> frozenset[str]:
    return frozenset(word for text in texts for word in WORD.findall(text.lower()))


def cut(picture: Image.Image, name: str) -> Image.Image:
    """Return an RGBA picture cropped to its opaque part. Raises InputError if it is transparent all over."""
    box = picture.getchannel("A").point(lambda level: 255 * (level >= CLEAR)).getbbox()
    if box is None:
        raise InputError(f"{name}: is transparent all over: there is no thing in it")
    return picture.crop(box)


def compose(
    things: Sequence[Image.Image], side: int, lot: random.Random
) -> tuple[Image.Image, list[tuple[float, float, float, float]]]:
    """Paste RGBA drawings onto a background; return the square picture and the corners of each, 0 to 1.

    Boxes overlap by at most SHARED, except in a crowd for which there is no room.
    """
    from PIL import Image

    largest = LARGEST[min(len(things), len(LARGEST)) - 1]
    canvas, corners = ground(side, lot), list[tuple[float, float, float, float]]()
    base = lot.uniform(LEAST, 1.0) * largest * side
    for thing in things:
        length = base * lot.uniform(0.8, 1.0)
        if lot.random() < 0.3:
            thing = cut(thing.rotate(lot.uniform(-TURNED, TURNED), Image.Resampling.BILINEAR, expand=True), "")
        if lot.random() < 0.3:
            thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        at, size = _placed(thing.size, length, side, corners, lot)
        canvas.paste(scaled := thing.resize(size, Image.Resampling.BOX if size[0] * 2 < thing.width else
                                            Image.Resampling.BILINEAR), at, scaled)  # fmt: skip
        corners.append((at[0], at[1], at[0] + size[0], at[1] + size[1]))
    if lot.random() < 0.3:
        canvas = grained(canvas, lot)
    return canvas, [(a / side, b / side, c / side, d / side) for a, b, c, d in corners]


def _placed(
    shape: tuple[int, int], length: float, side: int, taken: Sequence[tuple[float, ...]], lot: random.Random
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return position and size, in pixels, of an object with the aspect of `shape` and a longer side up to `length`."""
    while True:
        scale = min(length, side) / max(shape)
        width, height = max(2, round(shape[0] * scale)), max(2, round(shape[1] * scale))
        for _ in range(TRIES):
            x, y = lot.randint(0, max(0, side - width)), lot.randint(0, max(0, side - height))
            if all(_covered((x, y, x + width, y + height), other) <= SHARED for other in taken):
                return (x, y), (width, height)
        if length < 6:  # there is no room without overlap
            return (x, y), (width, height)
        length *= 0.85


def _covered(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the overlap of two boxes as a share of the smaller one."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / max(1e-9, min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])))


def ground(side: int, lot: random.Random) -> Image.Image:
    """Return a background: white, a named colour, a random colour, or a gradient."""
    from PIL import Image, ImageColor

    kind = lot.random()
    if kind < 0.35:
        return Image.new("RGB", (side, side), "white")
    named = [ImageColor.getrgb(BACKGROUNDS[name])[:3] for name in sorted(BACKGROUNDS)]
    first = lot.choice(named) if kind < 0.75 else tuple(lot.randrange(256) for _ in range(3))
    if kind < 0.9:
        return Image.new("RGB", (side, side), first)
    other = [min(255, max(0, c + lot.randint(-60, 60))) for c in first]
    ramp = Image.linear_gradient("L").rotate(lot.choice((0, 90, 180, 270))).resize((side, side))
    return Image.composite(Image.new("RGB", (side, side), tuple(other)), Image.new("RGB", (side, side), first), ramp)


def grained(picture: Image.Image, lot: random.Random) -> Image.Image:
    """Return a picture with blotches of low noise, similar to the small errors of generated pictures."""
    from PIL import Image

    noise = np.random.default_rng(lot.randrange(2**32)).standard_normal((picture.height, picture.width, 3))
    noise += np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, (1, 1), (0, 1))
    levels = np.asarray(picture, dtype=np.float32) + noise / 2 * lot.uniform(0, GRAIN)
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))


def pictures_of(recipe: Recipe, examples: Sequence[Example], task: Any) -> Pictures:
    """Return the training pictures of a task: composed scenes for a detector."""
    if recipe.task == "detector":
        return ScenePictures(examples, recipe.data, task.resolution, task.multiple, recipe.seed, recipe.scenes)
    return Pictures(examples, recipe.data, task.resolution, task.multiple, recipe.seed)
