"""How often the judge of the suite `emoji` is right, on pictures composed of known drawings.

    python benchmarks/suite_judge.py [--pictures 400] [--sheet sheet.png]

For each kind of verdict, as many pictures that show what is asked as pictures that do not (one thing too few or many,
another colour, another thing), from the drawings in training/recipes/openmoji.tar: all of them, also those that have
several parts, turned to a known hue where a colour is asked for, on backgrounds of a known colour. What a thing is, by
CLIP, also on drawings of the embedded model itself, cut out and put on backgrounds: what it drew of each thing on white
counts as that thing. The table: of those that show it, how many the judge calls right; of the others, how many it calls
wrong. 95 % intervals (Wilson). No network beyond the embedded ones; a minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from genkit import ClipScorer, Request, TextToImage
from genkit.datasets.config import Data
from genkit.datasets.sources import read_examples
from genkit.selection.intervals import wilson
from genkit.suites import emoji
from genkit.suites.pixels import APART, COLOURS, pixel_scores
from genkit.training.data import HUES, turn_hue

TAR = Path(__file__).resolve().parent.parent / "training" / "recipes" / "openmoji.tar"
GROUNDS = {
    "red": (220, 40, 40), "orange": (245, 140, 20), "yellow": (250, 215, 40), "green": (60, 170, 70),
    "blue": (50, 110, 225), "purple": (140, 60, 200), "pink": (250, 120, 190),
}  # fmt: skip
WHITE = (255, 255, 255)
SPOTS = {
    1: [(10, 10, 108)], 2: [(3, 33, 60), (65, 33, 60)], 3: [(3, 3, 60), (65, 3, 60), (34, 65, 60)],
    4: [(3, 3, 60), (65, 3, 60), (3, 65, 60), (65, 65, 60)],
    5: [(2, 2, 40), (86, 2, 40), (44, 44, 40), (2, 86, 40), (86, 86, 40)],
    6: [(2, 14, 40), (44, 14, 40), (86, 14, 40), (2, 74, 40), (44, 74, 40), (86, 74, 40)],
}  # fmt: skip
Case = tuple[np.ndarray, bool, Any]  # a picture (128, 128, 3), whether it shows what is asked, and what is asked


def placed(
    drawings: Sequence[Image.Image], ground: tuple[int, int, int], spots: Sequence[tuple[int, int, int]] | None = None
) -> np.ndarray:
    page = Image.new("RGB", (128, 128), ground)
    for drawing, (x, y, side) in zip(drawings, spots or SPOTS[len(drawings)], strict=True):
        small = drawing.resize((side, side), Image.Resampling.LANCZOS)
        page.paste(small, (x, y), small)
    return np.asarray(page)


def hued(drawings: Sequence[Image.Image], lot: random.Random, colour: str) -> Image.Image:
    """A random drawing with colour enough, its hue turned to that colour."""
    while True:
        found = turn_hue(lot.choice(drawings), HUES[colour])
        if found is not None:
            return found


def counting(drawings: Sequence[Image.Image], lot: random.Random) -> Case:
    shows, asked = lot.random() < 0.5, lot.randint(1, 5)
    there = asked if shows else lot.choice([n for n in (asked - 1, asked + 1) if 1 <= n <= 6])
    return placed([lot.choice(drawings)] * there, lot.choice([WHITE, *GROUNDS.values()])), shows, asked


def colour(drawings: Sequence[Image.Image], lot: random.Random) -> Case:
    shows, asked = lot.random() < 0.5, lot.choice(COLOURS)
    there = asked if shows else lot.choice([c for c in COLOURS if c != asked])
    ground = lot.choice([WHITE, *(GROUNDS[c] for c in COLOURS if c != there)])
    return placed([hued(drawings, lot, there)], ground), shows, asked


def background(drawings: Sequence[Image.Image], lot: random.Random) -> Case:
    shows, asked = lot.random() < 0.5, lot.choice(COLOURS)
    ground = GROUNDS[asked] if shows else lot.choice([WHITE, *(GROUNDS[c] for c in COLOURS if c != asked)])
    return placed([lot.choice(drawings)], ground), shows, asked


def two(drawings: Sequence[Image.Image], lot: random.Random) -> Case:
    shows, asked = lot.random() < 0.5, lot.sample(COLOURS, 2)
    other = lot.choice([c for c in COLOURS if c not in asked])
    there = asked if shows else lot.choice([asked[:1], [asked[0], other], [*asked, asked[0]]])
    return placed([hued(drawings, lot, c) for c in there], WHITE), shows, asked


def judged(
    made: Callable[..., Case], right: Callable[[dict[str, Any], int, Any], bool], drawings: Sequence[Image.Image],
    count: int, shown: list[np.ndarray],
) -> list[tuple[bool, bool]]:  # fmt: skip
    """(shows what is asked, is called right) of `count` pictures."""
    lot = random.Random(made.__name__)
    cases = [made(drawings, lot) for _ in range(count)]
    pictures = torch.from_numpy(np.stack([picture for picture, _, _ in cases])).permute(0, 3, 1, 2)
    scores = pixel_scores(pictures, [""] * count)
    shown += [picture for picture, _, _ in cases[:10]]
    return [(shows, right(scores, k, asked)) for k, (_, shows, asked) in enumerate(cases)]


def prompt_of(thing: str, ground: str) -> str:
    first, second = ("an" if text[0] in "aeiou" else "a" for text in (thing, ground))
    return f"{first} {thing}" + (f" on {second} {ground} background" if ground != "white" else "")


def things(
    drawings: dict[str, Image.Image], clip: ClipScorer, grounds: dict[str, tuple[int, int, int]],
    shown: list[np.ndarray], half: bool = False,
) -> list[tuple[bool, bool]]:  # fmt: skip
    """Every thing on every ground, asked for by its name and by that of the next thing, among the suite's labels.

    half: at about half the size, in the middle.
    """
    found = []
    for name_of_ground, ground in grounds.items():
        spots = [(34, 34, 60)] if half else SPOTS[1]
        pictures = [placed([drawings[name]], ground, spots) for name in emoji.THINGS]
        shown += pictures[:10]
        vectors = clip.embed_images(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
        for k in range(len(pictures)):
            for shows, asked in ((True, emoji.THINGS[k]), (False, emoji.THINGS[k - 1])):
                logits = (
                    clip.logit_scale
                    * clip.directions(emoji.labels_of(prompt_of(asked, name_of_ground), asked))
                    @ vectors[k]
                )
                found.append((shows, float(logits.softmax(0)[0]) > emoji.SURE))
    return found


def own_drawings() -> dict[str, Image.Image]:
    """What the embedded model draws of each thing on white, cut out."""
    rows = [Request(id=f"{k:03d}", prompt=f"a {name}", seed=k) for k, name in enumerate(emoji.THINGS)]
    found = sorted(TextToImage.from_pretrained("emoji", device="cpu").stream(rows), key=lambda r: r.id)
    masks = [255 * (255 - r.pixels.min(axis=2).astype(int) > APART).astype(np.uint8) for r in found]
    cut = [Image.fromarray(np.dstack([r.pixels, mask]), "RGBA") for r, mask in zip(found, masks, strict=True)]
    return dict(zip(emoji.THINGS, cut, strict=True))


def share(verdicts: Sequence[bool]) -> str:
    low, high = wilson(sum(verdicts), len(verdicts))
    return f"{sum(verdicts) / len(verdicts):6.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400, help="of each kind of verdict by pixels")
    parser.add_argument("--sheet", type=Path, help="write ten pictures of each kind into one PNG")
    given = parser.parse_args()
    named = {str(e.caption): e.read().convert("RGBA") for e in read_examples(Data(path=str(TAR)))}
    drawings, shown = list(named.values()), list[np.ndarray]()
    most, ground, some, many = emoji.THING, emoji.GROUND, emoji.SOME, given.pictures
    clip = ClipScorer.from_pretrained("emoji-clip", device="cpu")
    own = own_drawings()
    by_pixels: dict[str, list[tuple[bool, bool]]] = {
        "colour of the thing": judged(colour, lambda s, k, c: s[f"thing_{c}"][k] > most, drawings, many, shown),
        "colour of the background": judged(
            background, lambda s, k, c: s[f"back_{c}"][k] > ground, drawings, many, shown
        ),
        "pieces, 1 to 5": judged(counting, lambda s, k, n: s["pieces"][k] == n, drawings, many, shown),
        "two things of two colours": judged(
            two,
            lambda s, k, c: s["pieces"][k] == 2 and min(s[f"thing_{x}"][k] for x in c) > some,
            drawings,
            many,
            shown,
        ),
    }
    by_clip = {
        "thing, model's own on white": things(own, clip, {"white": WHITE}, shown),
        "thing, model's own on colours": things(own, clip, GROUNDS, shown),
        "thing, own at half the size": things(own, clip, {"white": WHITE}, shown, half=True),
        "thing, OpenMoji on white": things(named, clip, {"white": WHITE}, shown),
    }
    print(f"{len(drawings)} drawings; {platform.machine()}, {len(os.sched_getaffinity(0))} cores\n")
    print(f"{'verdict':<30}  {'pictures':>8}  {'shows it: called right':<26}  does not: called wrong")
    for name, found in {**by_pixels, **by_clip}.items():
        yes, no = [right for shows, right in found if shows], [not right for shows, right in found if not shows]
        print(f"{name:<30}  {len(found):>8}  {share(yes):<26}  {share(no)}")
    if given.sheet is not None:
        lines = [np.concatenate(shown[k : k + 10], axis=1) for k in range(0, len(shown) - len(shown) % 10, 10)]
        Image.fromarray(np.concatenate(lines)).save(given.sheet)


if __name__ == "__main__":
    main()
