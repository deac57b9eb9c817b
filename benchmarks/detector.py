"""How well a detector counts and finds drawings in scenes composed of them, with their boxes known.

    python benchmarks/detector.py emoji-train.tar runs/emoji-detector [--scenes 1000] [--sheet sheet.png]

Scenes are those of the recipe `emoji-detector`: 1 to 5 things, of one kind or several, on plain grounds, of the emoji
that the recipe holds out (in all their styles); and of the drawings in training/recipes/openmoji.tar, a style that no
network here has seen, of emoji that it has. The words of a scene's things are looked for together, as a gate would,
each of eight absent words alone. Table: the share of right counts by how many there are, of absent words how many are
counted as 0, with 95 % intervals (Wilson), and AP at an overlap of 0.5. A minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from genkit.datasets.example import Example
from genkit.datasets.sources import read_examples, split
from genkit.scoring.boxes import separate
from genkit.selection.intervals import wilson
from genkit.training.counting import Verdict, average_precision
from genkit.training.recipe import Recipe, read_recipe
from genkit.training.scenes import Scene, ScenePictures
from genkit.vision.detector import Detector, Seen

RECIPES = Path(__file__).resolve().parent.parent / "training" / "recipes"


def scenes_of(recipe: Recipe, examples: Sequence[Example], count: int) -> tuple[torch.Tensor, list[Scene]]:
    """uint8 pictures (count, 3, H, W) and what they show."""
    data = recipe.data.model_copy(update={"captions": ["{caption}"], "recolour": None})
    made = ScenePictures(examples, data, (128, 128), 16, recipe.seed, recipe.scenes)
    places = [(n % len(made), n // len(made)) for n in range(count)]
    pixels, scenes = zip(*(made.make(index, turn) for index, turn in places), strict=True)
    return torch.from_numpy((np.stack(pixels) * 127.5 + 127.5).round().astype(np.uint8)), list(scenes)


def verdicts(detector: Detector, pictures: torch.Tensor, scenes: Sequence[Scene]) -> list[Verdict]:
    """What is found of each word, by genkit's own way from picture to boxes."""
    side, found = pictures.shape[-1], list[Verdict]()
    for picture, scene in zip(pictures, scenes, strict=True):
        present = max(scene.owners) + 1
        asked = [scene.words[:present], *([word] for word in scene.words[present:])]
        seen = detector.see(picture[None].expand(len(asked), -1, -1, -1), asked)
        for number, word in enumerate(scene.words):
            own = [box for box, owner in zip(scene.boxes, scene.owners, strict=True) if owner == number]
            truth = [
                ((x - w / 2) * side, (y - h / 2) * side, (x + w / 2) * side, (y + h / 2) * side) for x, y, w, h in own
            ]
            found.append(Verdict(boxed(seen[max(0, number - present + 1)], word), truth, len(scene.owners)))
    return found


def boxed(seen: Seen, word: str) -> list[list[object]]:
    return separate([box.to_json() for box in seen.boxes if box.label == word])  # type: ignore[return-value]


def share(right: Sequence[bool]) -> str:
    low, high = wilson(sum(right), len(right))
    return f"{sum(right) / max(1, len(right)):6.1%} ({low:.1%} to {high:.1%})"


def sheet(detector: Detector, pictures: torch.Tensor, scenes: Sequence[Scene], path: Path, columns: int = 8) -> None:
    side = pictures.shape[-1]
    page = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side))
    for n, (picture, scene) in enumerate(zip(pictures, scenes, strict=True)):
        shown = Image.fromarray(picture.permute(1, 2, 0).numpy())
        pen = ImageDraw.Draw(shown)
        [boxes] = detector.detect(picture[None], scene.words[: max(scene.owners) + 1])
        for box in boxes:
            pen.rectangle((box.x0, box.y0, box.x1, box.y1), outline="red")
        page.paste(shown, (n % columns * side, n // columns * side))
    page.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="emoji-train.tar")
    parser.add_argument("detector", help="a folder, such as `genkit train` writes")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--sheet", type=Path, help="write 48 scenes with their boxes into one PNG")
    given = parser.parse_args()
    detector = Detector.from_pretrained(given.detector, device="cpu", dtype="float32")
    recipe = read_recipe(RECIPES / "emoji-detector.yaml", [f"data.path={given.data}"])
    _, held = split(read_examples(recipe.data), recipe.data)
    other = recipe.model_copy(update={"scenes": recipe.scenes.model_copy(update={"near": "group"})})
    drawn = read_examples(recipe.data.model_copy(update={"path": str(RECIPES / "openmoji.tar")}))
    print(f"{given.detector}, threshold {detector.threshold}; {given.scenes} scenes of each; "
          f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores\n")  # fmt: skip
    columns = {
        "emoji held out": scenes_of(recipe, held, given.scenes),
        "OpenMoji": scenes_of(other, drawn, given.scenes),
    }
    found = {name: verdicts(detector, *scenes) for name, scenes in columns.items()}
    print(f"{'':<22}" + "".join(f"  {name:<26}" for name in found))
    there = {name: [v for v in every if v.truth] for name, every in found.items()}
    for n in range(1, recipe.scenes.most + 1):
        line = [
            share([v.counted(detector.threshold) == n for v in some if len(v.truth) == n]) for some in there.values()
        ]
        print(f"{f'count of {n}':<22}" + "".join(f"  {text:<26}" for text in line))
    for kind, wanted in (("one kind in a scene", True), ("several kinds", False)):
        line = [share([v.counted(detector.threshold) == len(v.truth) for v in some
                       if (len(v.truth) == v.together) is wanted]) for some in there.values()]  # fmt: skip
        print(f"{kind:<22}" + "".join(f"  {text:<26}" for text in line))
    means = [np.mean([np.mean([v.counted(detector.threshold) == n for v in some if len(v.truth) == n])
                      for n in range(1, recipe.scenes.most + 1)]) for some in there.values()]  # fmt: skip
    print(f"{'mean of counts 1 to 5':<22}" + "".join(f"  {mean:6.1%}{'':<20}" for mean in means))
    absent = [share([v.counted(detector.threshold) == 0 for v in every if not v.truth]) for every in found.values()]
    print(f"{'absent word, count 0':<22}" + "".join(f"  {text:<26}" for text in absent))
    print(f"{'AP50':<22}" + "".join(f"  {average_precision(some):6.3f}{'':<20}" for some in there.values()))
    if given.sheet is not None:
        pictures, scenes = columns["emoji held out"]
        sheet(detector, pictures[:48], scenes[:48], given.sheet)


if __name__ == "__main__":
    main()
