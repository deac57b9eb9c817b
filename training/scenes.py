"""Scenes to learn detection from: drawings placed on a background, with their boxes, and words to look for.

A scene depends on (seed, epoch, drawing) alone, as pictures do. Drawings are pictures with transparency, whose boxes
are therefore exact; an opaque picture is a thing as large as itself.
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
KINDS = 3  # most kinds of things in a scene
# Largest side of a thing among so many, as a share of the picture's, so that they find room; and the least of that.
LARGEST, LEAST = (1.0, 0.6, 0.52, 0.46, 0.42, 0.38, 0.35, 0.33, 0.31), 0.6
SHARED = 0.12  # of the smaller of two boxes, at most, that both cover
TRIES = 25  # places tried before a thing is made smaller
CLEAR = 32  # levels of alpha that a thing's outline has at least
TURNED = 15  # degrees
GRAIN = 8.0  # most noise, as a standard deviation in levels
WORD = re.compile(r"[a-z]{3,}")


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a scene shows. words: to look for, those of its things first. boxes: (n, 4), centre and size, of 1.

    owners: for each box the number of its word.
    """

    words: list[str]
    boxes: np.ndarray
    owners: list[int]


class ScenePictures(Pictures):
    """Examples as the things of scenes, one scene for each of them and epoch, in which it is the main thing."""

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
        """Return the scenes of `indices` as epoch `epoch` has them; their captions are the words, joined."""
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
        for _ in range(20):  # of a small data set there may be no others
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
        """Return scenes of other examples, with their first names."""
        data = self.data.model_copy(update={"captions": ["{caption}"], "recolour": None})
        return ScenePictures(examples, data, self.resolution, self.multiple, self.seed, self.plan)

    def drawing(self, index: int) -> Image.Image:
        """Return a drawing as RGBA, cut to its outline; the last KEPT are kept."""
        if index not in self._drawings:
            if len(self._drawings) >= KEPT:
                del self._drawings[next(iter(self._drawings))]
            self._drawings[index] = cut(self.examples[index].read().convert("RGBA"), self.examples[index].key)
        return self._drawings[index]

    def _kind(self, index: int, count: int, lot: random.Random) -> tuple[str, list[Image.Image]]:
        """Return the word of a kind, and `count` of its drawings: the same one, or in any style that there is."""
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
        if colour and lot.random() < 0.5:  # a blue car is a car
            word = worded(self.data, template, values, colour)
        return word, drawn

    def _absent(self, present: Sequence[int], lot: random.Random) -> list[str]:
        """Return words of things that are not there, half of them of things that are near to one that is."""
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
    """Return whether two examples are called by words of which none is shared: an apple is a red apple, too."""
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
    """Return an RGBA picture cut to what is not transparent. Raises InputError where nothing is."""
    box = picture.getchannel("A").point(lambda level: 255 * (level >= CLEAR)).getbbox()
    if box is None:
        raise InputError(f"{name}: is transparent all over: there is no thing in it")
    return picture.crop(box)


def compose(
    things: Sequence[Image.Image], side: int, lot: random.Random
) -> tuple[Image.Image, list[tuple[float, float, float, float]]]:
    """Place RGBA drawings on a background; return the square picture and each one's corners, from 0 to 1.

    They hardly overlap.
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
    """Return where a thing of `shape` lies and its size: as large as `length`, or smaller where there is no room."""
    while True:
        scale = min(length, side) / max(shape)
        width, height = max(2, round(shape[0] * scale)), max(2, round(shape[1] * scale))
        for _ in range(TRIES):
            x, y = lot.randint(0, max(0, side - width)), lot.randint(0, max(0, side - height))
            if all(_covered((x, y, x + width, y + height), other) <= SHARED for other in taken):
                return (x, y), (width, height)
        if length < 6:  # a crowd: there it lies
            return (x, y), (width, height)
        length *= 0.85


def _covered(a: Sequence[float], b: Sequence[float]) -> float:
    """Return what two boxes share, as a part of the smaller one."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / max(1e-9, min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])))


def ground(side: int, lot: random.Random) -> Image.Image:
    """Return a background: white, a named or any colour, or one colour that fades into another."""
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
    """Return a picture with the small errors that a drawn one has: blotches of noise, of a few levels."""
    from PIL import Image

    noise = np.random.default_rng(lot.randrange(2**32)).standard_normal((picture.height, picture.width, 3))
    noise += np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, (1, 1), (0, 1))
    levels = np.asarray(picture, dtype=np.float32) + noise / 2 * lot.uniform(0, GRAIN)
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))


def pictures_of(recipe: Recipe, examples: Sequence[Example], task: Any) -> Pictures:
    """Return the examples as a task is trained on them: pictures, or for a detector scenes."""
    if recipe.task == "detector":
        return ScenePictures(examples, recipe.data, task.resolution, task.multiple, recipe.seed, recipe.scenes)
    return Pictures(examples, recipe.data, task.resolution, task.multiple, recipe.seed)
