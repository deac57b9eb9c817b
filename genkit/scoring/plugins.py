"""Scorers that others wrote: a function (pictures, prompts) -> {name: a number for each picture}.

pictures: a uint8 tensor (B, 3, H, W) on the device that drew them, to do with as one likes; prompts: B texts. A
package offers one under the entry-point group `genkit.scorers`; in Python the function itself is passed. It gives one
score, of the name it is registered under, or those that its attribute `names` lists.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from genkit.errors import InputError, nearest, reason, shown
from genkit.scoring.names import SCORES

GROUP = "genkit.scorers"
Function = Callable[[Any, list[str]], Mapping[str, Any]]
TAKEN = {*SCORES, "p", "min", "max", "abs", "embedding"}


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A scorer: its function and the scores that it gives."""

    name: str
    function: Function
    names: tuple[str, ...]

    def __call__(self, pictures: Any, prompts: Sequence[str]) -> dict[str, list[float | bool | None]]:
        """Return a column of as many numbers as there are pictures for each name; raises what is wrong with them."""
        found = self.function(pictures, list(prompts))
        if not isinstance(found, Mapping) or set(found) != set(self.names):
            given = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise ValueError(f"it gave {shown(given)} in place of {shown(sorted(self.names))}")
        columns = {name: _numbers(found[name]) for name in self.names}
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise ValueError(f"{name}: {len(column)} numbers for {len(prompts)} pictures")
        return columns


def find_scorers(asked: Sequence[str | Function]) -> list[Plugin]:
    """Return the scorers of those names, or made of those functions.

    Raises InputError for an unknown name, one that cannot be imported, and score names that are taken or no names.
    """
    plugins: list[Plugin] = []
    taken: dict[str, str] = {}
    for each in asked:
        name, function = _installed(each) if isinstance(each, str) else (getattr(each, "__name__", ""), each)
        if not callable(function):
            raise InputError(f"--scorer: {shown(name)} is no function of (pictures, prompts)")
        names = getattr(function, "names", None) or (name,)
        names = (names,) if isinstance(names, str) else tuple(names)
        for score in names:
            if not (isinstance(score, str) and score.isidentifier() and not keyword.iskeyword(score)):
                raise InputError(f"--scorer: {shown(score)} cannot be a score's name: letters, digits and _ only")
            if score in TAKEN or score in taken:
                owner = f"scorer {taken[score]!r}" if score in taken else "genkit"
                raise InputError(f"--scorer: {shown(name)} gives a score {score!r}, which is one of {owner} already")
            taken[score] = name
        plugins.append(Plugin(name, function, names))
    return plugins


def _installed(name: str) -> tuple[str, Function]:
    installed = entry_points(group=GROUP)
    if name not in installed.names:
        known = ", ".join(sorted(installed.names)) or "none"
        raise InputError(f"--scorer: {shown(name)}: no such scorer{nearest(name, installed.names)}; installed: {known}")
    try:
        return name, installed[name].load()
    except Exception as error:  # whatever importing somebody's package raises
        raise InputError(f"--scorer: {name} cannot be loaded: {type(error).__name__}: {reason(error)}") from None


def _numbers(column: Any) -> list[float | bool | None]:
    values = column.tolist() if hasattr(column, "tolist") else list(column)
    found: list[float | bool | None] = []
    for value in values:
        number = value if isinstance(value, bool) else float(value)
        found.append(number if isinstance(number, bool) or math.isfinite(number) else None)
    return found
