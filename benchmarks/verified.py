"""Verified generation with the embedded model: what share of prompts gets a right picture before and after a gate.

    python benchmarks/verified.py [--images 8] [--guidance-scale 1 --steps 12] [--detector FOLDER] [-o runs/verified]

The prompts are those that the suite `emoji` finds hard: colour and background, unusual colours, two things, counts. Of
each, the first picture is what one gets without a gate; with `--gate G --keep 1 --max-images N` one gets the first that
passes, which is the same picture of the same seeds, so that all gates are compared on one run. Where none passes
nothing is kept, and that prompt counts as not right. Right is what the pixels say (genkit/suites/pixels.py: colours of
thing and background, pieces), which no gate here reads; how good that judge is, says suite_judge.py. Gates:

    clip      p['PROMPT'] > 0.5 among the same prompt with seven other things, and with every other colour of either;
              of counts among the other numbers, of two things among each of them alone
    best      no gate: of all of them the one with the highest p['PROMPT'], as --rank-by keeps it
    detector  with --detector: counts and colours of what it finds
    both      one and the other

Lines: right of the first pictures, right of all that was drawn, then for each gate the prompts that got a right
picture, how many got any, and how many pictures that took. 95 % intervals (Wilson; of all pictures for their
correlation within a prompt). The same command goes on.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import Request, generate
from genkit.pictures.images import read_image
from genkit.runs.records import read_results
from genkit.scoring.gates import Expression, passes
from genkit.selection.intervals import share_interval, wilson
from genkit.suites import emoji
from genkit.suites.pixels import COLOURS, NAMES, pixel_scores

TASKS = ("colour and background", "unusual colour", "two things", "counting")
COLOURED = re.compile(r"an? (\w+) ([\w ]+) on an? (\w+) background")
JUDGED_BY_CLIP = re.compile(r"p\['[^']+'\] > [\d.]+ and ")
SURE = 0.5


def asked(row: dict[str, Any]) -> dict[str, Any]:
    """Labels, words to look for, and the gates of a row of the suite."""
    prompt = row["prompt"]
    if match := COLOURED.fullmatch(prompt):
        colour, thing, behind = match.groups()
        others = [prompt.replace(f"{colour} {thing}", f"{c} {thing}", 1) for c in COLOURS if c != colour]
        others += [prompt.replace(f"{behind} background", f"{c} background", 1) for c in COLOURS if c != behind]
        labels = list(dict.fromkeys([*emoji.labels_of(prompt, thing), *others]))
        return gates(labels, [thing], f"count['{thing}'] == 1 and color['{thing}'] == '{colour}'")
    if row["task"] == "counting":
        number, thing = prompt.split()
        n = emoji.NUMBERS.index(number) + 1
        word = thing if n == 1 else thing[:-1]
        names = [word if k == 0 else f"{word}s" for k in range(len(emoji.NUMBERS))]
        labels = [prompt, *(f"{o} {names[k]}" for k, o in enumerate(emoji.NUMBERS) if o != number)]
        return gates(labels, [word], f"count['{word}'] == {n}")
    one, two = (re.sub(r"^an? ", "", part) for part in prompt.split(" and "))
    return gates([prompt, *(f"a {name}" for name in (one, two))], [one, two],
                 f"count['{one}'] == 1 and count['{two}'] == 1")  # fmt: skip


def gates(labels: list[str], words: list[str], seen: str) -> dict[str, Any]:
    clip = f"p['{labels[0]}'] > {SURE}"
    return {"labels": labels, "detect": words, "gates": {"clip": clip, "detector": seen, "both": f"{clip} and {seen}"}}


def judged(folder: Path, results: Sequence[Any], verify: str) -> list[bool]:
    """Whether each picture is right, by its pixels alone."""
    expression = Expression(JUDGED_BY_CLIP.sub("", verify), None, names=NAMES)
    pictures = torch.from_numpy(np.stack([np.asarray(read_image(folder / r.file)) for r in results])).permute(
        0, 3, 1, 2
    )
    scores = pixel_scores(pictures, [""] * len(results))
    return [passes(expression, {name: values[k] for name, values in scores.items()}) for k in range(len(results))]


def share(right: int, of: int) -> str:
    low, high = wilson(right, of)
    return f"{right / max(1, of):6.1%} ({low:.0%} to {high:.0%})"


def line(folder: Path, rows: Sequence[dict[str, Any]], most: int, seen: bool) -> dict[str, str]:
    """The table's lines of some rows. seen: whether a detector looked at the pictures."""
    results = [r for r in read_results(folder) if r.status == "done" and r.index < most]
    first, best, drawn = 0, 0, []
    tally: dict[str, dict[str, int]] = {}
    for row in rows:
        own = sorted((r for r in results if r.id == row["id"]), key=lambda r: r.index)
        right = judged(folder, own, row["verify"])
        first += right[0]
        drawn.append([float(x) for x in right])
        told = asked(row)
        chances = [Expression(f"p['{told['labels'][0]}']", told["labels"], names=None)(r.scores) for r in own]
        best += right[int(np.argmax(chances))]
        for name, text in told["gates"].items():
            if name != "clip" and not seen:
                continue
            count = tally.setdefault(name, {"right": 0, "kept": 0, "images": 0})
            gate = Expression(text, told["labels"], names=None)
            at = next((k for k, r in enumerate(own) if passes(gate, r.scores)), None)
            count["images"] += len(own) if at is None else at + 1
            count["kept"] += at is not None
            count["right"] += at is not None and right[at]
    of, (value, low, high) = len(rows), share_interval(drawn)
    found = {"prompts": str(of), "before": share(first, of), "all drawn": f"{value:6.1%} ({low:.0%} to {high:.0%})"}
    found["best"] = share(best, of)
    for name, t in tally.items():
        found[name] = f"{share(t['right'], of)}; {t['kept']} kept of {t['images']}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/verified"))
    parser.add_argument("--images", type=int, default=8, help="most pictures of a prompt (--max-images)")
    parser.add_argument("--detector")
    parser.add_argument("--guidance-scale", type=float, help="less of it gives pictures that differ more; default: 5")
    parser.add_argument("--steps", type=int, help="default: the tuned 12, or 20 with another guidance")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--limit", type=int, help="of each task, the first so many prompts")
    given = parser.parse_args()
    wanted = given.tasks.split(",")
    for task in wanted:
        rows = [row for row in emoji.rows() if row["task"] == task][: given.limit]
        told = {row["id"]: asked(row) for row in rows}
        requests = [
            Request(id=row["id"], prompt=row["prompt"], num_images=given.images, labels=told[row["id"]]["labels"],
                    detect=told[row["id"]]["detect"] if given.detector else None,
                    guidance_scale=given.guidance_scale, num_inference_steps=given.steps)
            for row in rows
        ]  # fmt: skip
        folder = given.out / task.replace(" ", "-")
        generate(requests, folder, detector=given.detector, device="cpu", quiet=True)
        if task == wanted[0]:
            cores = len(os.sched_getaffinity(0))
            print(f"detector: {given.detector or 'none'}; at most {given.images} pictures a prompt; "
                  f"{platform.machine()}, {cores} cores\n")  # fmt: skip
        for column, text in line(folder, rows, given.images, given.detector is not None).items():
            print(f"{task + ':' if column == 'prompts' else '':<24}{column:<10}  {text}", flush=True)


if __name__ == "__main__":
    main()
