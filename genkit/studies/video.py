"""`genkit classify-video`: the most probable label of each clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit.device.devices import check_device
from genkit.errors import EXIT_OK, EXIT_SOME_FAILED, InputError
from genkit.files import place
from genkit.progress import Progress
from genkit.rows.typed import typed
from genkit.scoring.names import check_labels
from genkit.studies.score import check_out, output_of, written
from genkit.vision.models import inspect_vision
from genkit.vision.words import check_lengths


def classify_clips(
    clips: Sequence[Path], labels: str, model: str, out: Path | None = None, device: str = "auto", dtype: str = "auto"
) -> int:
    """Write a JSON line for each clip: file, frames, label (the most probable), p. Returns the exit code.

    clips: animated GIF or WebP files, or folders of frames. labels: comma-separated texts. A clip that cannot be read,
    or has too few frames, gets a line with its error. Raises InputError before anything is loaded.
    """
    names = typed("labels", labels)
    try:
        check_labels(names)
    except InputError as error:
        raise InputError(f"--{error}") from None
    absent = next((clip for clip in clips if not clip.exists()), None)
    if absent is not None:
        raise InputError(f"{place(absent)}: there is no such file or folder")
    check_device(device, dtype)
    check_out(out)
    info = inspect_vision(model, ("video classifier",), "--model")
    texts = [name.replace("_", " ") for name in names]
    check_lengths(info, texts, "--labels")
    from genkit.vision.video import VideoClassifier

    sense = VideoClassifier.from_pretrained(info, device=device, dtype=dtype)
    failed = 0
    with output_of(out) as write, Progress(len(clips)) as progress:
        for note in info.notes:
            progress.message(note)
        for start in range(0, len(clips), sense.batch):
            found = _batch(sense, clips[start : start + sense.batch], names, texts)
            failed += written(found, len(clips), write, progress)
    return EXIT_SOME_FAILED if failed else EXIT_OK


def _batch(
    sense: Any, clips: Sequence[Path], names: Sequence[str], texts: Sequence[str]
) -> list[tuple[Path, dict[str, Any]]]:
    import torch

    read: list[Any] = []
    for clip in clips:
        try:
            read.append(sense.clip(clip))
        except InputError as error:
            read.append(error)
    whole = [one for one in read if not isinstance(one, InputError)]
    rows = iter(sense.probabilities(torch.stack([pixels for pixels, _ in whole]), texts).tolist() if whole else ())
    found: list[tuple[Path, dict[str, Any]]] = []
    for clip, one in zip(clips, read, strict=True):
        if isinstance(one, InputError):
            found.append((clip, {"error": str(one)}))
            continue
        p = {name: round(value, 6) for name, value in zip(names, next(rows), strict=True)}
        found.append((clip, {"frames": one[1], "label": max(p, key=p.__getitem__), "p": p}))
    return found
