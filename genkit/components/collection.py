"""A folder of models, LoRAs and ControlNets, as people keep them: what is in it, by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genkit.components import ModelInfo, Part, inspect_model
from genkit.components.control import facts, is_control, read_control
from genkit.components.embeddingfile import is_embedding, read_embedding
from genkit.components.single import LORA, STEERS, kind_of
from genkit.components.weights import read_header
from genkit.device.memory import CONTROL
from genkit.errors import InputError
from genkit.files import place, user_path

MARKS = ("model_index.json", "config.json")  # of a folder that is a model


@dataclasses.dataclass(frozen=True)
class Item:
    """An entry of the folder.

    kind: that of ModelInfo, "lora", "embedding" or "controlnet"; None if it is refused, and `why`.
    """

    name: str
    path: Path
    kind: str | None
    info: ModelInfo | None = None
    why: str = ""
    part: Part | None = None  # of a ControlNet

    @property
    def draws(self) -> bool:
        """Whether it is a model that draws by itself."""
        return self.info is not None and self.info.geometry is not None and not self.info.geometry.refines

    def describe(self) -> dict[str, Any]:
        """Return what `genkit models` prints, as JSON values."""
        about: dict[str, Any] = {"name": self.name, "path": str(self.path), "kind": self.kind or "refused"}
        if self.info is not None:
            found = self.info.describe()
            about |= {key: found[key] for key in ("family", "size", "parameters") if key in found}
        if self.part is not None:
            about |= facts(self.part)
        return about | ({"why": self.why} if self.why else {})


def collection(folder: str | Path, variant: str | None = None) -> list[Item]:
    """Return what is in a folder and those below it, by name; no weights are read.

    A model is a folder as diffusers saves it, or a .safetensors file, which is called by its name without the suffix.
    What is refused is listed with the reason. Raises InputError for a folder that is none, and for two of one name.
    """
    root = user_path(str(folder))
    if not root.is_dir():
        raise InputError(f"{place(root)}: is no folder")
    found: dict[str, Item] = {}
    for path in _candidates(root, set()):
        item = _item(path, variant)
        other = found.setdefault(item.name, item)
        if other is not item:
            raise InputError(f"{place(root)}: {item.name} is the name of {place(other.path)} and of {place(path)}")
    return [found[name] for name in sorted(found, key=str.casefold)]


def _candidates(folder: Path, entered: set[str]) -> Iterator[Path]:
    """Yield the paths of possible models. entered: real paths of the folders listed so far; a link may repeat one."""
    real = os.path.realpath(folder)
    if real in entered:
        return
    entered.add(real)
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{place(folder)}: cannot be listed: {error.strerror}") from None
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if any((path / mark).is_file() for mark in MARKS):
                yield path
            else:
                yield from _candidates(path, entered)
        elif path.suffix == ".safetensors":
            yield path


def _item(path: Path, variant: str | None) -> Item:
    name = path.stem if path.is_file() else path.name
    try:
        if path.is_file():
            tensors = {tensor.key: tensor for tensor in read_header(path)}
            if is_embedding(tensors):
                read_embedding(path, kind_of)  # is it whole?
                return Item(name, path, "embedding")
            if kind_of(tensors) == f"is {LORA}":
                return Item(name, path, "lora")
            if kind_of(tensors) == f"is {STEERS}":
                return Item(name, path, CONTROL, part=read_control(path))
        elif is_control(path):
            return Item(name, path, CONTROL, part=read_control(path, variant))
        info = inspect_model(str(path), variant=variant if path.is_dir() else None)
    except InputError as error:
        return Item(name, path, None, why=str(error).removeprefix(f"{place(path)}: "))
    return Item(name, path, info.kind, info)
