"""A gate calibrated on one half of 200 labelled pictures, checked on the other half.

    python benchmarks/calibration.py -o runs/calibration [--precision 0.8] [--steps 12]

200 pictures of "a red cupcake on a purple background", drawn by the embedded model in 12 steps; the score is the
zero-shot p of that text among the same with other colours. The label is no opinion of a CLIP model: good is where the
measured colours of most of the object's pixels, and of most of the background's, are the asked ones (`colours` of
benchmarks/selection.py). The pictures are halved at random 100 times: `genkit calibrate` fits a threshold on the one
half, and the other says what precision it really has. The interval also holds for the whole run, of which the half is
a sample; "covered" counts the halvings where it held. The first halving is printed in full. Stopped, the same command
goes on; when the pictures are there it only reports.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.selection import COLOURS, colours, pixels, prompt
from genkit import Request, generate
from genkit.errors import InputError
from genkit.rows.result import Result, value_of
from genkit.scoring.gates import Expression
from genkit.selection.calibrate import calibrate, read_pictures, report

COLOUR, THING, BACKGROUND = "red", "cupcake", "purple"
IMAGES, HALVINGS = 200, 100
TEXT = prompt(COLOUR, THING, BACKGROUND)
SCORES = (f"p[{TEXT!r}]", "clip_z", "clip")


def rows(steps: int) -> list[Request]:
    """One row, with a label for each colour."""
    labels = [prompt(colour, THING, BACKGROUND) for colour in COLOURS]
    return [Request(id="0", prompt=TEXT, labels=labels, seed=0, num_images=IMAGES, num_inference_steps=steps)]


def good(folder: Path, r: Result) -> bool:
    """Return whether the measured colours of a picture are those that the prompt asks for."""
    return colours(pixels(folder, r)) == (COLOUR, BACKGROUND)


def halving(
    folder: Path, pictures: dict[str, Result], labels: dict[str, bool], score: str, precision: float, seed: int
) -> tuple[dict[str, Any], list[bool], list[bool]]:
    """Calibrate on a random half; return what it says, and the labels above the threshold: other half, all."""
    names = sorted(labels)
    random.Random(seed).shuffle(names)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    with tempfile.TemporaryDirectory() as temp:
        votes = Path(temp) / "votes.csv"
        votes.write_text("image,vote\n" + "".join(f"{name},{int(labels[name])}\n" for name in first))
        found = calibrate(folder, votes, precision, score, name="half")
    order, threshold = Expression(score, labels=[TEXT]), float(found["expression"].split(">")[1])
    above = {name: value_of(pictures[name], order) > threshold for name in names}
    return found, [labels[n] for n in second if above[n]], [labels[n] for n in names if above[n]]


def table(folder: Path, precision: float) -> None:
    pictures, _, _ = read_pictures(folder)
    labels = {name: good(folder, r) for name, r in pictures.items()}
    print(f"{len(labels)} pictures, {sum(labels.values())} of them good; "
          f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores")  # fmt: skip
    print(
        f"{'score':12} {'fitted':>6} {'estimate':>8} {'interval':>16} {'other half':>10} {'within':>7} {'covered':>8}"
    )
    for score in SCORES:
        runs, problem = [], ""
        for seed in range(HALVINGS):
            try:
                runs.append(halving(folder, pictures, labels, score, precision, seed))
            except InputError as error:
                problem = str(error)
        if not runs:
            print(f"{score[:12]:12} {0:6} {problem.partition(': ')[2]}")
            continue
        other = [statistics.fmean(second) for _, second, _ in runs if second]
        within = [f["low"] <= statistics.fmean(second) <= f["high"] for f, second, _ in runs if second]
        covered = [f["low"] <= statistics.fmean(every) <= f["high"] for f, _, every in runs]
        low, high, estimate = (statistics.fmean(f[key] for f, _, _ in runs) for key in ("low", "high", "precision"))
        head = f"{score[:12]:12} {len(runs):6} {estimate:8.3f} {low:7.3f} to {high:5.3f}"
        print(f"{head} {statistics.fmean(other):10.3f} "
              f"{statistics.fmean(within):7.0%} {statistics.fmean(covered):8.0%}")  # fmt: skip
    try:
        found, second, _ = halving(folder, pictures, labels, SCORES[0], precision, 0)
        print(f"\nthe first halving:\n{report(found)}")
        print(f"other half  {sum(second)} of {len(second)} above it are good: {statistics.fmean(second):.3f}")
    except InputError as error:
        print(f"\nthe first halving: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--precision", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    generate(rows(given.steps), given.out)
    table(given.out, given.precision)


if __name__ == "__main__":
    main()
