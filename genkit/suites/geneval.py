"""The suite `geneval`: prompts made by the published rules of GenEval (Ghosh, Hajishirzi and Schmidt 2023).

553 prompts, "a photo of …", over the 80 objects of COCO: 80 of a single object, 99 of two, 80 of counting 2 to 4, 94 of
a colour, 100 of a relative position, 100 of two objects with a colour each. They are sampled here with a fixed seed and
differ from those of GenEval's file, so results are of the same protocol, but not of the same prompts. Pictures are
judged by the counts, colours and positions of detected boxes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLACES = {"left of": "left_of", "right of": "right_of", "above": "above", "below": "below"}
TWO, COUNTS, COLOURED, PLACED, ATTRIBUTED = 99, 80, 94, 100, 100
SEED = 2023
# Names in prompts of objects whose name in COCO is ambiguous, as in GenEval.
SAID = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
_PLURALS = {
    "person": "people", "sheep": "sheep", "skis": "skis", "knife": "knives", "scissors": "scissors",
    "computer mouse": "computer mice", "broccoli": "broccoli",
}  # fmt: skip
_UNCOUNTED = ("skis", "scissors", "broccoli")  # without a plural that shows the number
_PLAIN = tuple(name for name in OBJECTS if name != "person")  # people have no colour


def rows() -> list[dict[str, Any]]:
    """Return the 553 rows: id, prompt, verify, task."""
    found: list[dict[str, Any]] = []
    for task, make in _TASKS.items():
        rng = random.Random(f"{SEED}/{task}")  # one generator a task, so that tasks do not affect each other
        for k, (text, verify) in enumerate(make(rng)):
            row_id = f"{task.replace(' ', '-')}-{k:03d}"
            found.append({"id": row_id, "prompt": f"a photo of {text}", "verify": verify, "task": task})
    return found


def _single(rng: random.Random) -> Iterator[tuple[str, str]]:
    for name in OBJECTS:
        yield _a(name), f"count['{name}'] >= 1"


def _two(rng: random.Random) -> Iterator[tuple[str, str]]:
    for one, two in rng.sample(list(itertools.combinations(OBJECTS, 2)), TWO):
        yield f"{_a(one)} and {_a(two)}", f"count['{one}'] >= 1 and count['{two}'] >= 1"


def _counting(rng: random.Random) -> Iterator[tuple[str, str]]:
    pairs = [(n, name) for name in OBJECTS if name not in _UNCOUNTED for n in NUMBERS]
    for n, name in rng.sample(pairs, COUNTS):
        yield f"{NUMBERS[n]} {plural(name)}", f"count['{name}'] == {n}"


def _colours(rng: random.Random) -> Iterator[tuple[str, str]]:
    for colour, name in rng.sample([*itertools.product(COLOURS, _unhued())], COLOURED):
        yield _a(name, colour), f"color['{name}'] == '{colour}'"


def _position(rng: random.Random) -> Iterator[tuple[str, str]]:
    pairs = list(itertools.permutations(OBJECTS, 2))
    for n, (one, two) in enumerate(rng.sample(pairs, PLACED)):
        said, function = [*PLACES.items()][n % len(PLACES)]
        yield f"{_a(one)} {said} {_a(two)}", f"{function}('{one}', '{two}')"


def _attribution(rng: random.Random) -> Iterator[tuple[str, str]]:
    for one, two in rng.sample(list(itertools.combinations(_unhued(), 2)), ATTRIBUTED):
        first, second = rng.sample(COLOURS, 2)
        yield (
            f"{_a(one, first)} and {_a(two, second)}",
            f"color['{one}'] == '{first}' and color['{two}'] == '{second}'",
        )


def _unhued() -> list[str]:
    return [name for name in _PLAIN if name not in COLOURS]  # "a pink orange" is ambiguous


def plural(name: str) -> str:
    """Return the plural of an object's name in prompts."""
    said = SAID.get(name, name)
    if said in _PLURALS:
        return _PLURALS[said]
    ending = "es" if said.endswith(("s", "ch", "sh", "x")) else "s"
    return said + ending


def _a(name: str, colour: str = "") -> str:
    """Return "a cat" or "an orange cat"; without an article for plurals and uncountable nouns."""
    said = f"{colour} {SAID.get(name, name)}".strip()
    if name in _UNCOUNTED:
        return said
    return f"{'an' if said[0] in 'aeiou' else 'a'} {said}"


_TASKS: dict[str, Callable[[random.Random], Iterator[tuple[str, str]]]] = {
    "single object": _single, "two objects": _two, "counting": _counting, "colors": _colours, "position": _position,
    "color attribution": _attribution,
}  # fmt: skip
