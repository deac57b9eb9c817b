"""What selection buys on the embedded model: best-of-N, gates and "until 2 pass", judged by the colours of the pixels.

    python benchmarks/selection.py -o runs/selection [--quick] [--sheet sheet.png]

100 prompts, "a COLOUR OBJECT on a BACKGROUND background": 20 objects that have a colour of their own or several, so
that the model does not always follow (of plain ones, say balloons, 97 % come out right at the first draw), each in 5
pairs of two different colours. No caption of the training data speaks of a background: `--captions TAR` checks. Each
row draws 8 pictures, and goes on to 16 until 2 pass the gate: zero-shot p of the asked-for colour among 7, above 0.9.
The judge is not the scorer: hue, saturation and value of the pixels, see `colours`. --sheet shows it at work.
Intervals: 95 %, bootstrap over prompts. Stopped, the same command goes on; when done it only reports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from genkit import Request, generate
from genkit.rows.result import Result
from genkit.runs.records import read_results

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
OBJECTS = (
    "banana", "bicycle", "carrot", "crown", "cupcake", "dragon", "elephant", "fox", "ghost", "guitar",
    "house", "owl", "panda", "penguin", "pizza", "robot", "rocket", "snowman", "strawberry", "sunflower",
)  # fmt: skip
PAIRS = 5  # of colour and background, for each object
WANTED, FIRST, MOST, PASS = 2, 8, 16, 0.9
GATES = (0.5, 0.7, 0.8, PASS)
# Hues in degrees at which a colour begins; red goes on from 345 round to 15.
HUES = {"red": 345, "orange": 15, "yellow": 42, "green": 70, "blue": 170, "purple": 255, "pink": 310}
GREY = 0.25, 0.2  # less saturation, or less value, is no colour
FRAME, APART = 6, 40  # pixels of the edge that are background; levels that tell the object from it


def prompt(colour: str, thing: str, background: str) -> str:
    first, second = ("an" if c == "orange" else "a" for c in (colour, background))
    return f"{first} {colour} {thing} on {second} {background} background"


def rows(quick: bool) -> list[Request]:
    """The k-th pair of object n: colour n + k, and a background 1 to 6 colours further on."""
    found = []
    for n, thing in enumerate(OBJECTS):
        for k in range(1 if quick else PAIRS):
            colour = COLOURS[(n + k) % len(COLOURS)]
            background = COLOURS[(n + k + 1 + (n + 2 * k) % (len(COLOURS) - 1)) % len(COLOURS)]
            labels = [prompt(c, thing, background) for c in COLOURS]
            text = prompt(colour, thing, background)
            found.append(
                Request(
                    id=f"{colour}-{thing}-{background}", prompt=text, labels=labels, seed=100 * len(found),
                    num_images=FIRST, keep=WANTED, max_images=MOST, gate=f"p[{text!r}] > {PASS}",
                    num_inference_steps=8 if quick else 20, scheduler="tuned" if quick else None,
                )
            )  # fmt: skip
    return found


def check_captions(tar: Path, asked: list[Request]) -> None:
    with tarfile.open(tar) as archive:
        files = [archive.extractfile(m) for m in archive if m.name.endswith(".json")]
        captions = [json.load(f)["caption"].lower() for f in files if f is not None]
    clash = {r.prompt for r in asked for c in captions if r.prompt in c}
    speak = sum("background" in c for c in captions)
    print(f"{len(captions)} captions: {len(clash)} of {len(asked)} prompts are among them; {speak} name a background")


def named(rgb: np.ndarray) -> np.ndarray:
    """(…, 3) bytes -> the name of each pixel's colour, of COLOURS or "grey" (white and black included)."""
    hsv = np.asarray(Image.fromarray(rgb.reshape(-1, 1, 3)).convert("HSV"))[:, 0].astype(float)
    hue, saturation, value = hsv[:, 0] * 360 / 256, hsv[:, 1] / 255, hsv[:, 2] / 255
    starts = sorted((at, name) for name, at in HUES.items())
    place = np.searchsorted([at for at, _ in starts], hue, side="right") - 1  # -1: before the first, the last goes on
    names = np.array([name for _, name in starts])[place]
    return np.where((saturation < GREY[0]) | (value < GREY[1]), "grey", names).reshape(rgb.shape[:-1])


def colours(rgb: np.ndarray) -> tuple[str, str]:
    """(H, W, 3) bytes -> the colour of most of the object and that of most of the frame of the picture.

    The object is what differs from the frame's median colour; grey, white and black count as one colour of it.
    """
    frame = np.ones(rgb.shape[:2], bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    names = named(rgb)
    background = _most(names[frame])
    middle = np.median(rgb[frame & (names == background)], axis=0)
    return _most(names[np.abs(rgb - middle).max(axis=-1) > APART]), background


def _most(names: np.ndarray) -> str:
    found, counts = np.unique(names, return_counts=True)
    return str(found[counts.argmax()]) if len(found) else "none"


Row = list[tuple[float, float, bool]]  # clip, p of the asked-for colour, right; of image 0, 1, …


def judged(folder: Path, asked: list[Request]) -> dict[str, Row]:
    found: dict[str, dict[int, tuple[float, float, bool]]] = defaultdict(dict)
    prompts = {str(r.id): r.prompt for r in asked}
    for r in read_results(folder):
        if r.status == "done" and r.id in prompts:
            colour, _, background = r.id.split("-")
            right = colours(pixels(folder, r)) == (colour, background)
            found[r.id][r.index] = float(r.scores["clip"]), r.scores["p"][prompts[r.id]], right
    return {row: [images[k] for k in sorted(images)] for row, images in found.items()}


def pixels(folder: Path, r: Result) -> np.ndarray:
    with Image.open(folder / str(r.file)) as picture:
        return np.asarray(picture.convert("RGB"))


def best_of(row: Row, k: int, column: int) -> float:
    """Mean, over all choices of k of the first 8 draws, of what the one with the best clip has in `column`."""
    ranked = sorted(row[:FIRST], key=lambda image: -image[0])
    ways = [math.comb(len(ranked) - 1 - place, k - 1) for place in range(len(ranked))]
    return sum(w * float(image[column]) for w, image in zip(ways, ranked, strict=True)) / sum(ways)


def until(row: Row, least: float = PASS) -> tuple[Row, int]:
    """The pictures that "until 2 pass p > least" hands over, and how many it draws for them."""
    places = [k for k, (_, p, _) in enumerate(row) if p > least][:WANTED]
    return [row[k] for k in places], places[-1] + 1 if len(places) == WANTED else len(row)


def interval(found: list[Row], figure: Callable[[list[Row]], float]) -> tuple[float, float, float]:
    """The figure, and its 95 % bootstrap interval over prompts."""
    draw = np.random.default_rng(0)
    resampled = [figure([found[i] for i in draw.integers(len(found), size=len(found))]) for _ in range(1000)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return figure(found), float(low), float(high)


def mean(values: Iterator[Any] | list[Any]) -> float:
    return float(np.mean(list(values) or [math.nan]))


def right_of_gate(found: list[Row], least: float = PASS) -> float:
    return mean(right for row in found for _, _, right in until(row, least)[0])


def fewer(found: list[Row], least: float = PASS) -> float:
    return MOST * len(found) / sum(until(row, least)[1] for row in found)


def lift(found: list[Row], least: float = PASS) -> float:
    return right_of_gate(found, least) - mean(best_of(r, 1, 2) for r in found)


FIGURES: list[tuple[str, str, Callable[[list[Row]], float]]] = [
    ("mean clip, one draw", "{:.3f}", lambda f: mean(best_of(r, 1, 0) for r in f)),
    ("mean clip, best of 4", "{:.3f}", lambda f: mean(best_of(r, 4, 0) for r in f)),
    ("mean clip, best of 8", "{:.3f}", lambda f: mean(best_of(r, 8, 0) for r in f)),
    ("right colours, one draw", "{:.1%}", lambda f: mean(best_of(r, 1, 2) for r in f)),
    ("right colours, best of 4 by clip", "{:.1%}", lambda f: mean(best_of(r, 4, 2) for r in f)),
    ("right colours, gate + until 2 pass", "{:.1%}", right_of_gate),
    ("  points over one draw", "{:+.1%}", lift),
    ("  one draw, prompts with a pass only", "{:.1%}", lambda f: mean(best_of(r, 1, 2) for r in f if until(r)[0])),
    ("  right ones of all pictures asked for", "{:.1%}", lambda f: mean(
        sum(right for _, _, right in until(r)[0]) / WANTED for r in f)),
    ("draws that pass the gate", "{:.1%}", lambda f: mean(mean(p > PASS for _, p, _ in r[:FIRST]) for r in f)),
    ("prompts with 2 that pass within 16", "{:.1%}", lambda f: mean(len(until(r)[0]) == WANTED for r in f)),
    ("best of 16 draws more, times", "{:.2f}", fewer),
]  # fmt: skip


def by_gate(found: list[Row]) -> None:
    """Print what looser gates would have bought; until PASS they decide on the same draws."""
    print("\ngate     draws pass   2 in 16   right colours   points over one draw      best of 16 draws more, times")
    for least in GATES:
        rate = mean(mean(p > least for _, p, _ in row[:FIRST]) for row in found)
        full = mean(len(until(row, least)[0]) == WANTED for row in found)
        points = "{:+.1%} ({:+.1%} to {:+.1%})".format(*interval(found, partial(lift, least=least)))
        more = "{:.2f} ({:.2f} to {:.2f})".format(*interval(found, partial(fewer, least=least)))
        print(f"p > {least}  {rate:>10.0%} {full:>9.0%} {right_of_gate(found, least):>15.1%}   {points:24}  {more}")


def sheet(folder: Path, asked: list[Request], out: Path) -> None:
    """A contact sheet of image 0 of every row with what the judge measured; red where it is not what was asked for."""
    firsts = {r.id: r for r in read_results(folder) if r.status == "done" and r.index == 0}
    across, (w, h) = 10, (134, 164)
    page = Image.new("RGB", (across * w, h * -(-len(asked) // across)), "white")
    for place, row in enumerate(r for r in asked if r.id in firsts):
        rgb = pixels(folder, firsts[str(row.id)])
        found, (colour, thing, background) = colours(rgb), str(row.id).split("-")
        card = Image.new("RGB", (w, h), "white" if found == (colour, background) else "#ffb0b0")
        card.paste(Image.fromarray(rgb).resize((128, 128)), (3, 3))
        text = f"{colour} {thing} on {background}\n{found[0]} on {found[1]}"
        ImageDraw.Draw(card).text((3, 133), text, fill="black")
        page.paste(card, (w * (place % across), h * (place // across)))
    page.save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the run folder; with --quick another one")
    parser.add_argument("--quick", action="store_true", help="20 prompts, 8 tuned steps")
    parser.add_argument("--captions", type=Path, help="a WebDataset .tar whose captions to look the prompts up in")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of what the judge saw")
    given = parser.parse_args()
    asked = rows(given.quick)
    if given.captions:
        check_captions(given.captions, asked)
    full = generate(asked, given.out).slots_full
    found = judged(given.out, asked)
    if given.sheet:
        sheet(given.out, asked, given.sheet)
    drawn = sum(len(row) for row in found.values())
    print(f"{len(found)} prompts, {drawn} pictures, {asked[0].num_inference_steps} steps, embedded model; "
          f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores")  # fmt: skip
    for title, form, figure in FIGURES:
        middle, low, high = (form.format(v) for v in interval(list(found.values()), figure))
        print(f"{title:40}  {middle:>8}  ({low} to {high})")
    by_gate(list(found.values()))
    if full is not None:
        print(f"\nslots in use while there was more to draw: {full:.1%}")


if __name__ == "__main__":
    main()
