"""A folder of models, LoRAs and ControlNets that are served by name."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from genkit.components.collection import Item, collection
from genkit.device.memory import CONTROL
from genkit.errors import InputError, nearest
from genkit.files import place
from genkit.options import Options

# Options that fit one model only
OF_ONE = ("vae", "text_encoder", "prediction", "embeddings", "embedding_dir", "refiner", "refiner_start")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The models below a folder; at most `loaded` of them are in memory at once."""

    folder: Path
    loaded: int = 1

    def of(self, options: Options) -> dict[str | None, tuple[Options, dict[str, str], dict[str, str]]]:
        """Return options, LoRAs and ControlNets of each model by its name; the first is loaded when the server starts.

        The first is `options.model` if that was given, else the first in alphabetical order. Files that cannot be used
        are named on stderr. Raises InputError where there is no model, and for options that fit one model only.
        """
        for name in OF_ONE:
            if getattr(options, name) != getattr(Options, name):
                raise InputError(f"--{name.replace('_', '-')}: does not go with --models: it is of one model")
        items = collection(self.folder, options.variant)
        drawing = {item.name: item for item in items if item.draws}
        for item in items:
            if item.why:
                print(f"--models: {place(item.path)}: {item.why}", file=sys.stderr)
        if not drawing:
            raise InputError(f"--models: {place(self.folder)}: has no model that draws")
        first = self._first(options, drawing)
        loras, controls = (
            {item.name: str(item.path.absolute()) for item in items if item.kind == kind} for kind in ("lora", CONTROL)
        )
        names = [first, *(name for name in drawing if name != first)]
        return {name: (dataclasses.replace(options, model=str(drawing[name].path)), loras, controls) for name in names}

    def _first(self, options: Options, drawing: dict[str, Item]) -> str:
        if options.model == Options.model:
            return next(iter(drawing))
        if options.model not in drawing:
            there = ", ".join(drawing)
            raise InputError(
                f"--model: {options.model} is not in {place(self.folder)}{nearest(options.model, drawing)}; "
                f"there: {there[:300]}"
            )
        return options.model
