"""`genkit score` and `genkit classify`: CLIP over any folder of pictures, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from genkit.components import inspect_model
from genkit.device import check_device
from genkit.errors import EXIT_OK, EXIT_SOME_FAILED, InputError
from genkit.images import check_image, list_images, read_image
from genkit.progress import Progress
from genkit.prompts import read_prompts, typed
from genkit.request import Result
from genkit.run import read_results

if TYPE_CHECKING:
    from genkit.scoring.clip import ClipScorer

BATCH = 32  # pictures in memory at a time


def score_images(
    images: Path, prompts: Path | None, prompt: str | None, labels: str | None, out: Path | None,
    clip: str, device: str, dtype: str,
) -> int:  # fmt: skip
    """Write a JSON line for each picture: file, prompt, scores (clip, p). Returns the exit code.

    Prompts come from `prompt`, from row k of `prompts` for picture k, or from the run folder's own records.
    """
    if prompts is not None and prompt is not None:
        raise InputError("--prompts, --prompt: give one of them, not both")
    files = _pictures(images)
    names = None if labels is None else typed("labels", labels)
    texts = _texts(images, files, prompts, prompt)
    if names is None and not any(texts):
        raise InputError("--prompt: nothing to score against; give --prompt, --prompts or --labels")
    failed = 0
    with _output(out) as write:
        for file, found in _judged(files, texts, names, clip, device, dtype):
            failed += "error" in found
            write(json.dumps({"file": str(file), **found}, ensure_ascii=False) + "\n")
    return EXIT_SOME_FAILED if failed else EXIT_OK


def classify_images(
    images: Path, labels: str, out: Path | None, clip: str, device: str, dtype: str, as_json: bool
) -> int:
    """Print each picture's likeliest label and how many fell to each; returns the exit code."""
    files = _pictures(images)
    names = typed("labels", labels)
    if len(names) < 2:
        raise InputError(f"--labels: {labels!r} is a single label; a choice needs two")
    counts: Counter[str] = Counter()
    with _output(out) as write:
        for file, found in _judged(files, [""] * len(files), names, clip, device, dtype):
            if "error" in found:
                counts["(failed)"] += 1
                continue
            best = max(found["scores"]["p"], key=found["scores"]["p"].get)
            counts[best] += 1
            if as_json or out is not None:
                write(
                    json.dumps({"file": str(file), "label": best, "p": found["scores"]["p"]}, ensure_ascii=False) + "\n"
                )
            else:
                write(f"{found['scores']['p'][best]:6.1%}  {best}  {file}\n")
    print("  ".join(f"{label}: {n}" for label, n in counts.most_common()), file=sys.stderr)
    return EXIT_SOME_FAILED if counts["(failed)"] else EXIT_OK


def _pictures(images: Path) -> list[Path]:
    """Return the pictures at `images`: a file, a run folder (its finished images) or any folder, sorted by name."""
    if images.is_dir():
        files = list_images(images / "images" if (images / "results.jsonl").is_file() else images)
        if not files:
            raise InputError(f"{images}: holds no PNG, JPEG, WebP or JPEG XL picture")
        return files
    check_image(images)
    return [images]


def _texts(images: Path, files: list[Path], prompts: Path | None, prompt: str | None) -> list[str]:
    if prompt is not None:
        return [prompt] * len(files)
    if prompts is not None:
        rows = read_prompts(prompts)
        if len(rows) != len(files):
            raise InputError(f"{prompts}: has {len(rows)} rows for {len(files)} pictures in {images}")
        return [row.prompt for row in rows]
    known = {r.file: r.prompt for r in _records(images)}
    return [known.get(str(file.relative_to(images)) if images.is_dir() else "", "") for file in files]


def _records(folder: Path) -> list[Result]:
    return read_results(folder) if (folder / "results.jsonl").is_file() else []


def _judged(
    files: list[Path], texts: list[str], labels: list[str] | None, clip: str, device: str, dtype: str
) -> Iterator[tuple[Path, dict[str, Any]]]:
    check_device(device, dtype)
    info = inspect_model(clip)
    if info.kind != "clip":
        raise InputError(f"--clip: {clip} is a model of kind {info.kind}, not a CLIP model")
    from genkit.scoring.clip import ClipScorer

    scorer = ClipScorer.from_pretrained(clip, device=device, dtype=dtype)
    with Progress(len(files)) as progress:
        for i in range(0, len(files), BATCH):
            part = slice(i, i + BATCH)
            for judged in _batch(scorer, files[part], texts[part], labels):
                if "error" in judged[1]:
                    progress.say(judged[1]["error"])
                progress.advance(
                    Result(str(judged[0]), 0, 0, "failed" if "error" in judged[1] else "done"), True, len(files)
                )
                yield judged


def _batch(
    scorer: ClipScorer, files: list[Path], texts: list[str], labels: list[str] | None
) -> list[tuple[Path, dict[str, Any]]]:
    opened: dict[Path, Any] = {}
    found: dict[Path, dict[str, Any]] = {}
    for file in files:
        try:
            opened[file] = read_image(file)
        except InputError as error:
            found[file] = {"error": str(error)}
    prompts = [text for file, text in zip(files, texts, strict=True) if file in opened]
    scored = scorer.scores(list(opened.values()), prompts, [labels] * len(opened)) if opened else []
    for (file, picture), text, scores in zip(opened.items(), prompts, scored, strict=True):
        flat = all(high - low <= 2 for low, high in picture.getextrema())
        found[file] = {"prompt": text, "scores": {**scores, "nan": False, "flat": flat}}
    return [(file, found[file]) for file in files]


@contextlib.contextmanager
def _output(out: Path | None) -> Iterator[Any]:
    """Give a function that writes text to standard output, or to a file that appears only when it is whole."""
    if out is None:
        yield sys.stdout.write
        return
    partial = out.with_name(out.name + ".part")
    try:
        file: IO[str]
        with open(partial, "w", encoding="utf-8") as file:
            yield file.write
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
