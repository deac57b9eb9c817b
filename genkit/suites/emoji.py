"""The suite `emoji`: what the embedded model can and cannot draw, judged by emoji-clip and by pixels, not a detector.

Objects are recognised by CLIP among eight labels, which works for a single large object only. Colours and the number of
pieces are measured on the pixels (pixels.py). docs/evaluation.md gives the accuracy of these judgements.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from genkit.suites.pixels import COLOURS

THINGS = (
    "bear", "panda", "pizza", "crown", "sunflower", "umbrella", "butterfly", "fish", "star", "doughnut", "bus",
    "bicycle", "trumpet", "snail", "tomato", "watermelon", "cookie", "volcano", "sailboat", "bird", "trophy", "whale",
    "axe", "bomb",
)  # fmt: skip
PAINTED = ("car", "balloon", "book", "fish", "umbrella", "butterfly", "bird")  # objects that come in any colour
UNUSUAL = ("banana", "carrot", "strawberry", "pizza", "sunflower", "elephant", "fox")  # objects with a typical colour
OWN_COLOUR = (
    ("tomato", "red"), ("green apple", "green"), ("whale", "blue"), ("star", "yellow"), ("carrot", "orange"),
    ("eggplant", "purple"),
)  # fmt: skip
COUNTED = ("star", "balloon", "doughnut")
NUMBERS = ("one", "two", "three", "four", "five")
OTHERS = 7  # wrong labels
SURE = 0.5  # least probability of the prompt among the labels
# Least share of a colour in an object, in the background, and for one of two objects. That of an object is below a
# half, because a red butterfly has some orange too.
THING, GROUND, SOME = 0.35, 0.5, 0.1


def rows() -> list[dict[str, Any]]:
    """Return the rows: id, prompt, labels, verify, task."""
    found: list[dict[str, Any]] = []
    for task, made in _TASKS.items():
        for k, (prompt, thing, tests) in enumerate(made()):
            row: dict[str, Any] = {"id": f"{task.replace(' ', '-')}-{k:02d}", "prompt": prompt, "task": task}
            if thing:
                row["labels"] = labels_of(prompt, thing)
                tests = [f"p['{prompt}'] > {SURE}", *tests]
            found.append({**row, "verify": " and ".join(tests)})
    return found


def labels_of(prompt: str, thing: str) -> list[str]:
    """Return the prompt, and the same with OTHERS other objects, so that colours do not decide."""
    at = THINGS.index(thing) if thing in THINGS else len(thing)
    others = [name for name in (*THINGS[at + 1 :], *THINGS[: at + 1]) if name != thing][:OTHERS]
    texts = [prompt.replace(_a(thing), _a(name), 1).replace(f" {thing}", f" {name}", 1) for name in others]
    return [prompt, *texts]


def _single() -> Iterator[tuple[str, str, list[str]]]:
    for thing in THINGS:
        yield _a(thing), thing, []


def _colour() -> Iterator[tuple[str, str, list[str]]]:
    for thing, colour in _spread(PAINTED):
        yield _a(f"{colour} {thing}"), thing, [f"thing_{colour} > {THING}"]


def _background() -> Iterator[tuple[str, str, list[str]]]:
    for thing, colour in _spread(THINGS[:7]):
        yield f"{_a(thing)} on {_a(colour)} background", thing, [f"back_{colour} > {GROUND}"]


def _both() -> Iterator[tuple[str, str, list[str]]]:
    return _coloured(PAINTED)


def _unusual() -> Iterator[tuple[str, str, list[str]]]:
    return _coloured(UNUSUAL)


def _coloured(things: tuple[str, ...]) -> Iterator[tuple[str, str, list[str]]]:
    for n, (thing, colour) in enumerate(_spread(things)):
        behind = COLOURS[(COLOURS.index(colour) + 1 + n % (len(COLOURS) - 1)) % len(COLOURS)]
        tests = [f"thing_{colour} > {THING}", f"back_{behind} > {GROUND}"]
        yield f"{_a(f'{colour} {thing}')} on {_a(behind)} background", thing, tests


def _two() -> Iterator[tuple[str, str, list[str]]]:
    for k, (one, first) in enumerate(OWN_COLOUR):
        for two, second in OWN_COLOUR[k + 1 :]:
            yield f"{_a(one)} and {_a(two)}", "", ["pieces == 2", *(f"thing_{c} > {SOME}" for c in (first, second))]


def _counting() -> Iterator[tuple[str, str, list[str]]]:
    for thing in COUNTED:
        for n, word in enumerate(NUMBERS, 1):
            yield f"{word} {thing}{'s' if n > 1 else ''}", "", [f"pieces == {n}"]


def _spread(things: tuple[str, ...], each: int = 3) -> Iterator[tuple[str, str]]:
    """Yield `each` colours for every object, so that all colours are equally frequent."""
    for n, thing in enumerate(things):
        for k in range(each):
            yield thing, COLOURS[(n + 2 * k) % len(COLOURS)]


def _a(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


_TASKS = {
    "single thing": _single, "colour": _colour, "background": _background, "colour and background": _both,
    "unusual colour": _unusual, "two things": _two, "counting": _counting,
}  # fmt: skip
