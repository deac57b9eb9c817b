"""The prompt syntax of AUTOMATIC1111: attention weights, prompt editing, composition, and tags that name LoRAs.

Of a prompt as a user writes it: `lora_tags` first, then `composed`, `scheduled` for each of its prompts, and `weighted`
for each text that a schedule holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import TypeAlias

from genkit.errors import InputError, nearest, shown

MAX_OPEN = 200  # brackets around one word; each multiplies the weight of every word in it
MAX_SCHEDULE = 10_000_000  # characters of all texts of a schedule; alternation writes the prompt once per step

_TAGS = ("lora", "lyco")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_TIME = re.compile(rf"{_NUMBER.pattern}(?:[eE][-+]?[0-9]+)?")
_ATTENTION = re.compile(r"\\[()\[\]\\]|\\|[()\[\]]|:\s*([-+]?[.0-9]+)\s*\)|[^\\()\[\]:]+|:")
_EDITING = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)


def weighted(text: str) -> list[list[tuple[str, float]]]:
    r"""Return the chunks of a prompt, split at BREAK, each as [(text, attention weight), …] in reading order.

    (a) weighs 1.1, (a:1.3) 1.3, [a] 1/1.1; nested weights multiply. \( \) \[ \] \\ are the characters themselves. A
    bracket that is never closed acts to the end of the prompt; one that was never opened is text. An empty chunk is
    [("", 1.0)]. Raises InputError for a weight that is no number, and for more than 200 brackets open at once.
    """
    pieces: list[str | None] = []  # None: BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(weights)):
            weights[i] *= factor

    def add(piece: str | None) -> None:
        pieces.append(piece)
        weights.append(1.0)

    for match in _ATTENTION.finditer(text):
        token, weight = match[0], match[1]
        if token.startswith("\\"):
            add(token[1:])
        elif token in opened:
            opened[token].append(len(weights))
            if sum(map(len, opened.values())) > MAX_OPEN:
                raise InputError(f"{shown(text)}: more than {MAX_OPEN} brackets are open at once")
        elif weight is not None and opened["("]:
            close("(", _finite(weight, f"the weight of {shown(token)}"))
        elif token == ")" and opened["("]:
            close("(", 1.1)
        elif token == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:
            parts = re.split(r"\bBREAK\b", token)
            for i, part in enumerate(parts):
                if i:
                    add(None)
                    part = part.lstrip()
                add(part.rstrip() if i < len(parts) - 1 else part)
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[bracket]:
            close(bracket, factor)
    if not all(map(math.isfinite, weights)):
        raise InputError(f"{shown(text)}: the weights of nested brackets multiply to more than any number")
    return _chunks(pieces, weights)


def _chunks(pieces: list[str | None], weights: list[float]) -> list[list[tuple[str, float]]]:
    """Return the pieces in chunks, with neighbours of equal weight joined: they are tokenized as one text."""
    chunks: list[list[tuple[list[str], float]]] = [[]]
    for piece, weight in zip(pieces, weights, strict=True):
        if piece is None:
            chunks.append([])
        elif piece and chunks[-1] and chunks[-1][-1][1] == weight:
            chunks[-1][-1][0].append(piece)
        elif piece:
            chunks[-1].append(([piece], weight))
    return [[("".join(texts), weight) for texts, weight in chunk] or [("", 1.0)] for chunk in chunks]


def _finite(text: str, what: str) -> float:
    """Return a plainly written number; raises InputError naming `what` it is."""
    value = float(text) if _NUMBER.fullmatch(text.strip()) else math.nan
    if not math.isfinite(value):
        raise InputError(f"{what} is {shown(text)}, not a number")
    return value


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Edit:
    """[before:after:when]"""

    before: list[_Node]
    after: list[_Node]
    when: int


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Alternation:
    """[a|b|…]"""

    options: list[list[_Node]]


class _Separator(str):
    """A colon or bar that is not part of an inner bracket."""


_Node: TypeAlias = "str | list[_Node] | _Edit | _Alternation"


def scheduled(text: str, steps: int) -> list[tuple[int, str]]:
    r"""Return [(last step, counted from 1 and inclusive, text), …] of a prompt with prompt editing, for `steps` steps.

    [a:b:when] is a, then b from the step after `when`; [b:when] adds b, [a::when] removes a. `when` is a step, or with
    a decimal point a fraction of the steps. [a|b|c] changes at every step. Both nest. A bracket that is neither stays
    as it is, and so does one that encloses unbalanced brackets or stray colons; a backslash keeps the next character
    from acting. Raises InputError for steps below 1, and for texts of more than 10,000,000 characters together.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"{shown(steps)} is no number of steps")
    ends = {steps}
    root: list[_Node] = []
    frames: list[tuple[str, list[_Node]]] = []  # open brackets and what followed each
    for match in _EDITING.finditer(text):
        token = match[0]
        here = frames[-1][1] if frames else root
        if token in ("(", "["):
            frames.append((token, []))
        elif token in (")", "]"):
            node = _closed(frames[-1][0] + token, here, steps) if frames else None
            if node is None:  # nothing that encloses it can be a bracket of the syntax either
                _release(frames, root)
                root.append(token)
                continue
            frames.pop()
            (frames[-1][1] if frames else root).append(node)
            if isinstance(node, _Edit):
                ends.add(node.when)
            elif isinstance(node, _Alternation):
                ends.update(range(1, min(steps, MAX_SCHEDULE) + 1))
        else:
            here.append(_Separator(token) if token in (":", "|") else token)
    _release(frames, root)
    if len(ends) * len(text) > MAX_SCHEDULE:
        raise InputError(f"{shown(text)}: {len(text)} characters are too many for a prompt that changes so often")
    return [(end, _text_at(root, end)) for end in sorted(ends) if end >= 1]


def _closed(brackets: str, nodes: list[_Node], steps: int) -> _Node | None:
    """Return the node of a pair of brackets around `nodes`, or None if the pair has no meaning in the syntax."""
    marks = [i for i, node in enumerate(nodes) if isinstance(node, _Separator)]
    colons = [i for i in marks if nodes[i] == ":"]
    if brackets == "()" and len(colons) <= 1:
        return ["(", *nodes, ")"]
    if brackets != "[]":
        return None
    if not marks:
        return ["[", *nodes, "]"]
    if not colons:
        edges = [-1, *marks, len(nodes)]
        return _Alternation([nodes[a + 1 : b] for a, b in itertools.pairwise(edges)])
    when = _when(nodes[colons[-1] + 1 :], steps)
    if when is None or len(colons) > 2:
        return None
    before = nodes[: colons[0]] if len(colons) == 2 else []
    return _Edit(before, nodes[colons[-2] + 1 if len(colons) == 2 else 0 : colons[-1]], when)


def _when(nodes: list[_Node], steps: int) -> int | None:
    """Return the last step of [before:after:when] that shows `before`, 0 to `steps`; None if it is no number."""
    if not all(isinstance(node, str) for node in nodes):
        return None
    number = "".join(map(str, nodes)).strip()
    if not _TIME.fullmatch(number):
        return None
    value = float(number) * (steps if "." in number else 1)
    return int(min(max(value, 0), steps))


def _release(frames: list[tuple[str, list[_Node]]], root: list[_Node]) -> None:
    """Turn all open brackets into text."""
    for bracket, nodes in frames:
        root.append(bracket)
        root.extend(nodes)
    frames.clear()


def _text_at(nodes: list[_Node], step: int) -> str:
    """Return the text at a step; without recursion, since brackets may be nested to any depth."""
    found: list[str] = []
    pending: list[_Node] = [nodes]
    while pending:
        node = pending.pop()
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, list):
            pending.extend(reversed(node))
        elif isinstance(node, _Edit):
            pending.append(node.before if step <= node.when else node.after)
        else:
            pending.append(node.options[(step - 1) % len(node.options)])
    return "".join(found)


def composed(text: str) -> list[tuple[str, float]]:
    """Return [(prompt, weight), …] of prompts joined by AND (composable diffusion): "a cat AND a dog :1.2".

    A number after a last colon is the weight, 1.0 if absent, also of a prompt without AND, as in AUTOMATIC1111. Blanks
    around a prompt are dropped. Raises InputError for a weight too large for a number.
    """
    found = []
    for part in re.split(r"\bAND\b", text):
        prompt, colon, weight = part.rpartition(":")
        if colon and _NUMBER.fullmatch(weight.strip()):
            found.append((prompt.strip(), _finite(weight.strip(), f"the weight of {shown(prompt.strip())}")))
        else:
            found.append((part.strip(), 1.0))
    return found


def lora_tags(text: str) -> tuple[str, list[tuple[str, float, float]]]:
    """Return a prompt without its tags, and (name, weight, text_weight) of each <lora:…> or <lyco:…>, in order.

    <lora:name> weighs 1.0, <lora:name:0.8> 0.8 for denoiser and text encoder alike. As in AUTOMATIC1111, the first of
    two numbers is the text encoder's: <lora:name:0.5:0.8> is ("name", 0.8, 0.5); te=0.5 and unet=0.8 may be named
    instead. Raises InputError for a malformed tag, and for tags of networks other than these.
    """
    found: list[tuple[str, float, float]] = []
    kept: list[str] = []
    end = 0
    for match in re.finditer(r"<\s*(\w+)\s*(?::([^<>]*))?(>?)", text):
        kind, inside, closed = match.groups()
        if kind not in _TAGS:
            if closed and inside:
                raise InputError(
                    f"{shown(match[0])}: there are no such tags{nearest(kind.lower(), _TAGS)}; there is <lora:…>"
                )
            if kind.lower() not in _TAGS:
                continue  # e.g. "<3", or the word of an embedding
        if not closed or inside is None:
            raise InputError(f"{shown(match[0])}: is no tag; write <lora:name:0.8>")
        found.append(_lora(match[0], inside))
        kept.append(text[end : match.start()])
        end = match.end()
    return "".join([*kept, text[end:]]), found


def _lora(tag: str, inside: str) -> tuple[str, float, float]:
    """Return (name, weight, text_weight) of the part of a tag behind its kind."""
    name, *values = (part.strip() for part in inside.split(":"))
    if not name:
        raise InputError(f"{shown(tag)}: names no file; write <lora:name:0.8>")
    given: dict[str, float] = {}
    order = iter(("te", "unet"))
    for value in values:
        key, equals, number = value.partition("=")
        key = key.strip() if equals else next(order, "")
        if key not in ("te", "unet"):
            known = (
                f"is no weight{nearest(key, ('te', 'unet'))}; there are te and unet" if equals else "is one too many"
            )
            raise InputError(f"{shown(tag)}: {shown(value)} {known}")
        if key in given:
            raise InputError(f"{shown(tag)}: {key} is given twice")
        given[key] = _finite(number if equals else value, f"{shown(tag)}: {key}")
    text_weight = given.get("te", 1.0)
    return name, given.get("unet", text_weight), text_weight
