r"""Templates of prompts: choices at random, {a|b}, lines of wildcard files, __name__, and all combinations, {e$$a|b}.

{2::a|b}  a is twice as likely      {2$$a|b|c}  two of them      {1-2$$ and $$a|b|c}  one or two, joined by " and "
__dir/name__  a line of <wildcards>/dir/name.txt      {2$$__name__}  two lines of it      \{ \} \| \_  as they are
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from genkit.errors import InputError, nearest, shown
from genkit.files import file_size, place, read_text

MAX_DEPTH = 20  # choices and wildcards inside each other
MAX_TEXT = 100_000  # characters of a template and of what it becomes
MAX_CHOICES = 100_000  # drawn for one text; with empty choices, text alone would not limit them
MAX_PICKS = 1000  # of one choice: {1000$$…}
MAX_WEIGHT = 1e9
MAX_TOGETHER = 50_000_000  # characters of all combinations
MAX_FILE = 2**24  # bytes of a wildcard file
MAX_COUNTED = 1_000_000  # products that counting the selections of one choice may need
MAX_BITS = 10_000  # of a count that is still worked out

_HEAD = re.compile(r"(e\$\$)?(?: *(?:([0-9]{1,9})(-)?([0-9]{1,9})?|-([0-9]{1,9})) *\$\$(?:([^${}]*)\$\$)?)?")
_WEIGHT = re.compile(r"(\s*)(?:([-+.0-9eE]+)::)?")
_ESCAPE = re.compile(r"\\(?:([{}|_])|.)", re.DOTALL)
_TOKEN = re.compile(
    r"\\.|[$%]\{|\{[!~@]?|\}|\||\$\$|__(?P<name>[!~@]?(?:[^\W_]|[./\\~])(?:(?!__)[\w./\\:*~ -])*)__|[^\\{}|$%_]+|.",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class _Wildcard:
    name: str
    source: str


@dataclasses.dataclass(frozen=True)
class _Choice:
    """{…}: between `low` and `high` of the options, joined; high None is all there are."""

    options: tuple[tuple[_Node, ...], ...]
    weights: tuple[float, ...] | None
    low: int
    high: int | None
    separator: str
    every: bool
    source: str


_Node: TypeAlias = "str | _Wildcard | _Choice"
_Nodes: TypeAlias = "tuple[_Node, ...]"
_Size: TypeAlias = tuple[int, int]  # how many texts, and their characters together


def expand(template: str, seed: int, wildcards: Path | None) -> str:
    """Return one text of a template; the same seed gives the same text. wildcards: the folder of the files.

    Raises InputError for what is malformed, for wildcards that are missing, outside of the folder, or name each other,
    whichever the seed would choose, and for more than 20 levels or 100,000 characters.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed: {shown(seed)} is not a whole number from 0")
    folder = _Folder(wildcards)
    nodes = folder.checked(template)
    if any(map(_is_every, nodes)):
        raise InputError(f"{shown(template)}: {{e$$…}} stands for all combinations, not for one text")
    drawn = _Drawn(random.Random(seed), folder)
    drawn.write(nodes)
    return "".join(drawn.parts)


def combinations(template: str, wildcards: Path | None, limit: int = 100_000) -> list[str]:
    """Return a template once for each combination of its {e$$…}; what else it holds stays, so `expand` each.

    Inside {e$$…} all choices and all lines of wildcards are taken, and {e$$2$$a|b|c} gives both orders of each pair.
    The leftmost changes slowest. Without {e$$…} the template itself is the one combination. Raises InputError as
    `expand` does, and for more than `limit` combinations, which are counted first.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise InputError(f"limit: {shown(limit)} is not a whole number from 1")
    folder = _Folder(wildcards)
    nodes = folder.checked(template)
    count, together = _times(folder.size((node,)) if _is_every(node) else (1, len(_source(node))) for node in nodes)
    for found, most, what in ((count, limit, "combinations"), (together, MAX_TOGETHER, "characters in combinations")):
        if found > most:
            number = f"{found:,}" if found < 10**18 else f"about 10^{math.log10(found):.0f}"
            raise InputError(f"{shown(template)}: {number} {what}, more than {most:,}")
    lists = [list(folder.every((node,))) if _is_every(node) else [_source(node)] for node in nodes]
    return ["".join(parts) for parts in itertools.product(*lists)]


def _is_every(node: _Node) -> bool:
    return isinstance(node, _Choice) and node.every


def _source(node: _Node) -> str:
    return node if isinstance(node, str) else node.source


@dataclasses.dataclass
class _Open:
    """A choice that is being read."""

    start: int
    head: re.Match[str] | None = None
    options: list[_Nodes] = dataclasses.field(default_factory=list)
    weights: list[float] = dataclasses.field(default_factory=list)
    weighted: bool = False
    nodes: list[_Node] = dataclasses.field(default_factory=list)


def _parse(text: str) -> _Nodes:
    """Return the nodes of a template or of a line of a wildcard file; raises InputError for what is malformed."""
    frames = [_Open(0)]
    at = 0
    while match := _TOKEN.match(text, at):
        token, at = match[0], match.end()
        frame, inside = frames[-1], len(frames) > 1
        if token == "{":
            if len(frames) > MAX_DEPTH:
                raise InputError(f"{shown(text)}: more than {MAX_DEPTH} choices inside each other")
            frames.append(_Open(match.start(), _HEAD.match(text, at)))
            at = _weigh(frames[-1], text, at + len((frames[-1].head or match)[0]))
        elif token[0] == "{":
            raise InputError(f"{shown(text[match.start() :])}: there is no {token[1]} of choices; {{e$$a|b}} takes all")
        elif token in ("${", "%{"):
            raise InputError(f"{shown(text[at - 2 :])}: there are no variables and wrappers; write {token[0]}\\{{")
        elif token == "}" and not inside:
            raise InputError(f"{shown(text)}: }} closes nothing; write \\}} for the character")
        elif token == "}":
            frames.pop()
            choice = _choice(frame, text[frame.start : at])
            if choice.every and any(not f.head or not f.head[1] for f in frames[1:]):
                raise InputError(f"{shown(choice.source)}: is inside a choice at random; put it outside")
            frames[-1].nodes.append(choice)
        elif token == "|" and inside:
            frame.options.append(tuple(frame.nodes))
            frame.nodes = []
            at = _weigh(frame, text, at)
        elif token == "$$" and inside:
            raise InputError(
                f"{shown(text[frame.start :])}: $$ follows no number, as in {{2$$a|b}} or {{1-2$$, $$a|b}}"
            )
        else:
            frame.nodes.append(token if match["name"] is None else _Wildcard(match["name"], token))
    if len(frames) > 1:
        raise InputError(f"{shown(text[frames[-1].start :])}: {{ is not closed; write \\{{ for the character")
    return _joined(frames[0].nodes)


def _joined(nodes: Sequence[_Node]) -> _Nodes:
    """Return the nodes with neighbouring text in one piece."""
    found: list[_Node] = []
    for is_text, group in itertools.groupby(nodes, lambda node: isinstance(node, str)):
        run = list(group)
        found += ["".join(map(_source, run))] if is_text else run
    return tuple(found)


def _weigh(frame: _Open, text: str, at: int) -> int:
    """Read the weight of an option that begins at `at`; return where its text begins, behind blanks."""
    match = _WEIGHT.match(text, at)
    assert match is not None  # all of it is optional
    if not re.search("[0-9]", match[2] or ""):
        frame.weights.append(1.0)
        return match.end(1)
    if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", match[2]) or float(match[2]) > MAX_WEIGHT:
        raise InputError(f"{shown(match[0].strip())}: is no weight of a choice; write {{2::a|0.5::b}}")
    frame.weights.append(float(match[2]))
    frame.weighted = True
    return match.end()


def _choice(frame: _Open, source: str) -> _Choice:
    """Return the choice that was read, once its numbers fit its options."""
    options = (*(_joined(option) for option in frame.options), _joined(frame.nodes))
    if options == ((),):
        raise InputError(f"{shown(source)}: holds no choice; write \\{{\\}} for the characters")
    assert frame.head is not None
    every, low, dash, high, most, separator = frame.head.groups()
    first = 1 if low is None else int(low)
    last = int(high or most) if high or most else None if dash else first
    if last is not None and (last < first or last > MAX_PICKS):
        raise InputError(f"{shown(source)}: no choice takes {first} to {last}; the most is {MAX_PICKS}")
    if "__" in (separator or ""):
        raise InputError(f"{shown(source)}: a separator cannot be a wildcard")
    weights = tuple(frame.weights) if frame.weighted else None
    choice = _Choice(options, weights, first, last, "," if separator is None else separator, bool(every), source)
    if not _of_lines(choice):
        _last(choice, sum(weight > 0 for weight in frame.weights))
    return choice


def _of_lines(choice: _Choice) -> bool:
    """Whether the options of a choice are the lines of its one wildcard: {2$$__name__}."""
    only = choice.options[0]
    counted = (choice.low, choice.high) != (1, 1) and choice.weights is None
    return counted and len(choice.options) == 1 and len(only) == 1 and isinstance(only[0], _Wildcard)


def _last(choice: _Choice, possible: int) -> int:
    """Return the most that a choice takes of `possible` options; raises InputError for more than there are."""
    last = max(possible, choice.low) if choice.high is None else choice.high
    if last > possible:
        raise InputError(f"{shown(choice.source)}: takes {last}, more than the {possible} that can be taken")
    if last > MAX_PICKS:
        raise InputError(f"{shown(choice.source)}: takes up to {last}; the most is {MAX_PICKS}")
    return last


@dataclasses.dataclass(frozen=True)
class _Lines:
    """The parsed texts of a wildcard file or template: how deep they nest, and which wildcards they use."""

    texts: tuple[_Nodes, ...]
    levels: int
    names: dict[str, int]  # the deepest level at which each is used
    picks: tuple[_Choice, ...]  # choices among the lines of a wildcard, {2$$__name__}


def _survey(texts: tuple[_Nodes, ...]) -> _Lines:
    levels = 0
    names: dict[str, int] = {}
    picks: list[_Choice] = []
    pending = [(node, 0) for nodes in texts for node in nodes if not isinstance(node, str)]
    while pending:
        node, level = pending.pop()
        if isinstance(node, _Wildcard):
            names[node.name] = max(level, names.get(node.name, 0))
            continue
        levels = max(levels, level + 1)
        if _of_lines(node):
            picks.append(node)
        pending += [(x, level + 1) for option in node.options for x in option if not isinstance(x, str)]
    return _Lines(texts, levels, dict(sorted(names.items())), tuple(picks))


@functools.lru_cache(maxsize=256)
def _read(path: Path, size: int, changed: int) -> _Lines:
    """Return a wildcard file, parsed; its size and time tell a new content from one that was read."""
    texts = []
    for number, line in enumerate(read_text(path, MAX_FILE).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            nodes = _parse(line)
            if any(map(_is_every, nodes)):
                raise InputError("{e$$…} belongs in a template")
        except InputError as error:
            raise InputError(f"{place(path)}: line {number}: {error}") from None
        texts.append(nodes)
    if not texts:
        raise InputError(f"{place(path)}: holds no line but comments")
    return _survey(tuple(texts))


class _Folder:
    """The files of wildcards."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lines: dict[str, _Lines] = {}
        self._levels: dict[str, int] = {}
        self._sizes: dict[str, _Size] = {}

    def checked(self, template: str) -> _Nodes:
        """Return the nodes of a template, once all wildcards that it can reach are read."""
        if len(template) > MAX_TEXT:
            raise InputError(f"{shown(template)}: has {len(template):,} characters, more than {MAX_TEXT:,}")
        nodes = _parse(template)
        if self._reach(_survey((nodes,)), ()) > MAX_DEPTH:
            raise InputError(f"{shown(template)}: more than {MAX_DEPTH} choices and wildcards inside each other")
        return nodes

    def _reach(self, lines: _Lines, trail: tuple[str, ...]) -> int:
        """Return the levels below `lines`, which the wildcards in `trail` lead to."""
        found = lines.levels
        for name, level in lines.names.items():
            if name in trail:
                loop = " → ".join(f"__{x}__" for x in (*trail[trail.index(name) :], name))
                raise InputError(f"{loop}: these wildcards lead back to themselves")
            if len(trail) >= MAX_DEPTH:
                raise InputError(f"__{trail[0]}__: more than {MAX_DEPTH} wildcards inside each other")
            if name not in self._levels:
                self._levels[name] = self._reach(self.lines(name), (*trail, name))
            found = max(found, level + 1 + self._levels[name])
        for choice in lines.picks:
            self.options(choice)
        return found

    def lines(self, name: str) -> _Lines:
        if name not in self._lines:
            path = self._file(name)
            self._lines[name] = _read(path, file_size(path), os.stat(path).st_mtime_ns)
        return self._lines[name]

    def _file(self, name: str) -> Path:
        """Return the file of a wildcard; raises InputError for one that is absent or outside of the folder."""
        what = f"__{shown(name)[1:-1]}__"
        if self.path is None:
            raise InputError(f"{what}: there is no folder of wildcards (--wildcards); write \\__ for the characters")
        if name.startswith(("/", "~/")) or ".." in name.split("/"):
            raise InputError(f"{what}: leads out of the folder of wildcards")
        if re.search(r"[\\:*~!@]|//|/$|^\.", name):
            raise InputError(f"{what}: is no name of a wildcard; write __name__ or __folder/name__")
        if not os.path.isdir(self.path):
            raise InputError(f"{place(self.path)}: is no folder of wildcards")
        path = self.path / f"{name}.txt"
        if not os.path.exists(path):
            files = itertools.islice(self.path.rglob("*.txt"), 10_000)
            known = sorted(file.relative_to(self.path).as_posix().removesuffix(".txt") for file in files)
            raise InputError(f"{what}: no such file in {place(self.path)}{nearest(name, known)}")
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise InputError(f"{what}: is a link that leads out of the folder of wildcards")
        return path.resolve()

    def options(self, choice: _Choice) -> tuple[tuple[_Nodes, ...], tuple[float, ...] | None, int]:
        """Return the options of a choice, their weights (None if all are equal), and how many it takes at most."""
        if not _of_lines(choice):
            possible = sum(w > 0 for w in choice.weights or (1,) * len(choice.options))
            return choice.options, choice.weights, _last(choice, possible)
        node = choice.options[0][0]
        assert isinstance(node, _Wildcard)
        texts = self.lines(node.name).texts
        return texts, None, _last(choice, len(texts))

    def size(self, nodes: _Nodes) -> _Size:
        """Return how many texts `every` yields, and how many characters they have in total."""
        return _times(self._size(node) for node in nodes)

    def _size(self, node: _Node) -> _Size:
        if isinstance(node, str):
            return 1, len(node)
        if isinstance(node, _Wildcard):
            if node.name not in self._sizes:
                sizes = [self.size(nodes) for nodes in self.lines(node.name).texts]
                self._sizes[node.name] = sum(c for c, _ in sizes), sum(t for _, t in sizes)
            return self._sizes[node.name]
        options, weights, last = self.options(node)
        if weights is not None:
            raise InputError(f"{shown(node.source)}: weights have no meaning where all combinations are taken")
        if len(options) * last > MAX_COUNTED:
            raise InputError(f"{shown(node.source)}: up to {last} of {len(options)} are too many combinations to count")
        # The elementary symmetric polynomials of the options' sizes: of[k] is for each k of them in one order.
        of: list[_Size] = [(1, 0)] + [(0, 0)] * last
        for option in options:
            count, length = self.size(option)
            for k in range(last, 0, -1):
                (c, t), (c0, t0) = of[k], of[k - 1]
                of[k] = _countable((c + c0 * count, t + c0 * length + t0 * count))
        ways = [(math.factorial(k), len(node.separator) * max(0, k - 1)) for k in range(last + 1)]
        sizes = [(of[k][0] * w, (of[k][1] + of[k][0] * s) * w) for k, (w, s) in enumerate(ways) if k >= node.low]
        return _countable((sum(c for c, _ in sizes), sum(t for _, t in sizes)))

    def every(self, nodes: _Nodes) -> Iterator[str]:
        """Yield all texts of `nodes`, in the order that the template gives."""
        return map("".join, itertools.product(*(self._every(node) for node in nodes)))

    def _every(self, node: _Node) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, _Wildcard):
            for nodes in self.lines(node.name).texts:
                yield from self.every(nodes)
        else:
            options, _, last = self.options(node)
            texts = [list(self.every(option)) for option in options] if last else []
            for k in range(node.low, last + 1):
                for taken in itertools.permutations(texts, k):
                    yield from map(node.separator.join, itertools.product(*taken))


def _times(sizes: Iterator[_Size]) -> _Size:
    """Return the size of a product: of all concatenations of one text from each."""
    count, together = 1, 0
    for c, t in sizes:
        count, together = _countable((count * c, together * c + count * t))
    return count, together


def _countable(size: _Size) -> _Size:
    if size[0].bit_length() > MAX_BITS:
        raise InputError(f"more than 10^{int(MAX_BITS * math.log10(2))} combinations")
    return size


@dataclasses.dataclass
class _Drawn:
    """Writes one random text of a template."""

    rng: random.Random
    folder: _Folder
    parts: list[str] = dataclasses.field(default_factory=list)
    characters: int = 0
    choices: int = 0

    def write(self, nodes: _Nodes) -> None:
        for node in nodes:
            if isinstance(node, str):
                self._add(node)
                continue
            self.choices += 1
            if self.choices > MAX_CHOICES:
                raise InputError(f"{shown(node.source)}: more than {MAX_CHOICES:,} choices for one text")
            if isinstance(node, _Wildcard):
                lines = self.folder.lines(node.name).texts
                self.write(lines[self._below(len(lines))])
                continue
            for i, option in enumerate(self._taken(node)):
                if i:
                    self._add(node.separator)
                self.write(option)

    def _add(self, text: str) -> None:
        self.parts.append(_ESCAPE.sub(lambda match: match[1] or match[0], text))
        self.characters += len(self.parts[-1])
        if self.characters > MAX_TEXT:
            raise InputError(f"the template becomes more than {MAX_TEXT:,} characters")

    def _below(self, end: int) -> int:
        # random() alone is promised to give the same numbers for a seed in every version of Python.
        return int(self.rng.random() * end)

    def _taken(self, choice: _Choice) -> list[_Nodes]:
        options, weights, last = self.folder.options(choice)
        taken, left = [], list(range(len(options)))
        more = last - choice.low
        for _ in range(choice.low + (self._below(more + 1) if more else 0)):
            if weights is None:
                at = self._below(len(left))
            else:
                sums = list(itertools.accumulate(weights[i] for i in left))
                point = self.rng.random() * sums[-1]
                at = next(i for i, total in enumerate(sums) if point < total)
            taken.append(options[left[at]])
            left[at] = left[-1]
            left.pop()
        return taken
