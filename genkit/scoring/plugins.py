"""Plugin scorers: functions (pictures, prompts) -> {name: a number for each picture}.

pictures: a uint8 tensor (B, 3, H, W) on the device of the generator; prompts: B texts. A package registers a scorer
under the entry-point group `genkit.scorers`; in Python the function itself is passed. It returns one score, named as it
is registered, or those in its attribute `names`. A feature network for FID and other distances is a function
pictures -> (B, D), registered under the group `genkit.features`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import keyword
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from genkit.errors import HostError, InputError, nearest, reason, shown
from genkit.scoring.boxes import FIELDS, MEASURES
from genkit.scoring.names import SCORES

GROUP, FEATURES = "genkit.scorers", "genkit.features"
Function = Callable[[Any, list[str]], Mapping[str, Any]]
TAKEN = {*SCORES, *FIELDS, *MEASURES, "p", "min", "max", "abs", "embedding", "early"}  # early: score of pruning


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A plugin scorer: its function and the names of its scores."""

    name: str
    function: Function
    names: tuple[str, ...]

    def __call__(self, pictures: Any, prompts: Sequence[str]) -> dict[str, list[float | bool | None]]:
        """Return {name: a number for each picture}, None for NaN or infinity. Raises ValueError for a wrong result."""
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
    """Return the plugins of installed names, or of functions.

    Raises InputError for an unknown name, a failing import, and score names that are taken or invalid.
    """
    plugins: list[Plugin] = []
    taken: dict[str, str] = {}
    for each in asked:
        name, function = (
            _installed(each, GROUP, "--scorer", "scorer")
            if isinstance(each, str)
            else (getattr(each, "__name__", ""), each)
        )
        if not callable(function):
            raise InputError(f"--scorer: {shown(name)} is no function of (pictures, prompts)")
        names = getattr(function, "names", None) or (name,)
        if not isinstance(names, str | list | tuple):
            raise InputError(f"--scorer: {shown(name)}: its names are {shown(names)}, not texts")
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


class Features:
    """A feature network, and the option or key that names it, for messages."""

    def __init__(self, name: str, field: str, network: Callable[[Any], Any]) -> None:
        self.name, self.field, self.network = name, field, network
        self.width: int | None = None  # D, from the first call on

    def __call__(self, pictures: Any, names: Sequence[str]) -> Any:
        """Return the features of uint8 pictures (B, 3, H, W) on the network's device, (B, D) float64 on the CPU.

        names: of the pictures. Raises InputError, naming a picture, if the network raises or gives anything else.
        """
        try:
            found = self.network(pictures).double().cpu()
            if found.ndim != 2 or len(found) != len(pictures) or found.shape[1] != (self.width or found.shape[1]):
                width = "D of 2 or more" if self.width is None else self.width
                raise ValueError(f"it gave {tuple(found.shape)} in place of ({len(pictures)}, {width})")
            if found.shape[1] < 2 or not found.isfinite().all():
                raise ValueError(
                    "it gave NaN or infinity" if found.shape[1] > 1 else "it gave one feature: 2 are needed"
                )
        except Exception as error:  # a plugin may raise anything
            if len(names) > 1:
                for picture, name in zip(pictures, names, strict=True):  # raises for the picture at fault
                    self(picture[None], [name])
            raise InputError(
                f"{self.field}: {self.name}: {names[0]}: {type(error).__name__}: {reason(error)}"
            ) from None
        self.width = found.shape[1]
        return found


def find_features(name: str, field: str, device: Any) -> Features:
    """Return the feature network of that name, for pictures on `device`.

    "inception" is the InceptionV3 of the original FID, from torch-fidelity. Raises InputError, naming `field`, if it is
    not installed, HostError if its weights cannot be downloaded.
    """
    if name != "inception":
        return Features(name, field, _installed(name, FEATURES, field, "feature network", ("clip", "inception"))[1])
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # its torchvision raises RuntimeError if it does not match the installed torch
        raise InputError(
            f"{field}: inception needs torch-fidelity (pip install torch-fidelity): {reason(error)}"
        ) from None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except OSError as error:
        raise HostError(f"{field}: the weights of inception cannot be had: {reason(error)}") from None
    return Features(name, field, lambda pictures: network(pictures)[0])


def _installed(name: str, group: str, field: str, what: str, built_in: Sequence[str] = ()) -> tuple[str, Any]:
    installed = entry_points(group=group)
    if name not in installed.names:
        known = ", ".join(sorted(installed.names)) or "none"
        there = f"there are {', '.join(built_in)}; " if built_in else ""
        close = nearest(name, [*built_in, *installed.names])
        raise InputError(f"{field}: {shown(name)}: no such {what}{close}; {there}installed: {known}")
    try:
        return name, installed[name].load()
    except Exception as error:  # importing a plugin may raise anything
        raise InputError(f"{field}: {name} cannot be loaded: {type(error).__name__}: {reason(error)}") from None


def _numbers(column: Any) -> list[float | bool | None]:
    values = column.tolist() if hasattr(column, "tolist") else list(column)
    found: list[float | bool | None] = []
    for value in values:
        number = value if isinstance(value, bool) else float(value)
        found.append(number if isinstance(number, bool) or math.isfinite(number) else None)
    return found
