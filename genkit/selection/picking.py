"""Options that thin out the images that pass: --diverse, --dedupe and --reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from genkit.errors import InputError, shown


@dataclasses.dataclass(frozen=True)
class Picking:
    """diverse: 0 (score only) to 1 (a copy of the best counts as an average picture), see `diversity.pick`.

    dedupe: cosine of two embeddings above which they are near duplicates; 1: identical files. reference: a folder of
    pictures that kept images are compared with; with `dedupe`, near duplicates of them are rejected.
    """

    diverse: Annotated[
        float | None, "With --keep: 0 keeps the best; towards 1, prefer images unlike those already kept."
    ] = None
    dedupe: Annotated[
        float | None, "Keep one of images this similar (CLIP cosine, such as 0.95); 1: identical files only."
    ] = None
    reference: Annotated[
        Path | None, "Name each image's nearest in this folder; with --dedupe, reject copies of them."
    ] = None

    @property
    def needs_embeddings(self) -> str | None:
        """The option that needs embeddings, or None; identical files are found without."""
        if self.diverse is not None:
            return "--diverse"
        if self.reference is not None:
            return "--reference"
        return "--dedupe" if self.dedupe is not None and self.dedupe < 1 else None

    def check(self) -> None:
        """Raise InputError for a value out of range."""
        if self.diverse is not None and not 0 <= self.diverse <= 1:
            raise InputError(f"--diverse: {self.diverse:g} is not within 0 to 1")
        if self.dedupe is not None and not 0.5 <= self.dedupe <= 1:
            raise InputError(f"--dedupe: {self.dedupe:g} is not a cosine from 0.5 (most alike) to 1 (identical)")
        if self.reference is not None:
            from genkit.pictures.images import list_images

            if not self.reference.is_dir():
                raise InputError(f"--reference: {shown(str(self.reference))} is no folder")
            if not list_images(self.reference):
                raise InputError(f"--reference: {shown(str(self.reference))} holds no pictures")

    def check_rows(self, keep: bool) -> None:
        """Raise InputError for --diverse if no row says how many images to keep."""
        if self.diverse is not None and not keep:
            raise InputError("--diverse: chooses which to keep of more, and nothing says how many: give --keep")

    def to_json(self) -> dict[str, Any]:
        """Return the options that are set, for selection.json."""
        fields = {"diverse": self.diverse, "dedupe": self.dedupe, "reference": self.reference and str(self.reference)}
        return {name: value for name, value in fields.items() if value is not None}


NONE = Picking()
