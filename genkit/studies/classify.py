"""`genkit classify --model`: the most probable labels of a classifier for any pictures, as JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from genkit.device.devices import check_device
from genkit.errors import EXIT_OK, EXIT_SOME_FAILED, InputError
from genkit.studies.score import check_out, line_of, output_of, pictures_at
from genkit.studies.senses import looked_at
from genkit.vision.models import inspect_vision

if TYPE_CHECKING:
    import torch

TOP = 5


def label_images(images: Path, model: str, top: int = TOP, out: Path | None = None, device: str = "auto",
                 dtype: str = "auto") -> int:  # fmt: skip
    """Write a JSON line for each picture: file and classes, the `top` most probable as [label, p]; or file and error.

    Returns the exit code: 1 if a picture could not be read. Raises InputError before anything is loaded, HostError if
    the logits are NaN.
    """
    if not 1 <= top <= 100_000:
        raise InputError(f"--top: {top} is not a number from 1 to 100000")
    files = pictures_at(images)
    check_device(device, dtype)
    check_out(out)
    info = inspect_vision(model, ("classifier",), "--model")
    from genkit.vision.classifier import Classifier

    classifier = Classifier.from_pretrained(info, device=device, dtype=dtype)

    def look(pixels: torch.Tensor, sizes: list[tuple[int, int]]) -> list[list[tuple[str, float]]]:
        return [classifier.best(odds, top) for odds in classifier.odds(pixels)]

    failed = 0
    with output_of(out) as put:
        for file, found in looked_at(files, classifier, look):
            failed += isinstance(found, InputError)
            said = {"error": str(found)} if isinstance(found, InputError) else {"classes": found}
            put(line_of({"file": str(file), **said}))
    return EXIT_SOME_FAILED if failed else EXIT_OK
