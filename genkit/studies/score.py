"""`genkit score` and `genkit classify`: score pictures of any folder or run, in bounded memory."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from genkit.components import inspect_model
from genkit.device.devices import check_device
from genkit.errors import EXIT_OK, EXIT_SOME_FAILED, InputError, nearest, shown
from genkit.files import local
from genkit.pictures.images import check_image, list_images, read_image
from genkit.progress import Progress, printable, printable_json
from genkit.rows.prompts import read_prompts, typed
from genkit.rows.result import Result
from genkit.runs.records import finished, is_run, read_rows
from genkit.runs.rescore import Stored
from genkit.scoring.aesthetic import Head, check_head
from genkit.scoring.names import check_labels
from genkit.scoring.plugins import find_scorers
from genkit.studies.accuracy import Confusion
from genkit.studies.senses import named

if TYPE_CHECKING:
    import torch

    from genkit.components import ModelInfo
    from genkit.scoring.panel import Panel

BATCH = 32  # pictures embedded together; only one is in memory at full size at a time
MAX_LABELS = 1000
STRANGERS = 5  # folders without a label that are named in a message


def score_images(
    images: Path, prompts: Path | None, prompt: str | None, labels: str | None, out: Path | None,
    clip: str, device: str, dtype: str, aesthetic: str | None = None, scorers: Sequence[Any] = (),
) -> int:  # fmt: skip
    """Write a JSON line for each picture: file, prompt, scores (clip, p, …). Returns the exit code.

    Prompts come from `prompt`, from row k of `prompts` for picture k, or from the run folder's records. For a run that
    was scored with the same CLIP model, only missing embeddings are computed, and stored with the run.
    """
    if prompts is not None and prompt is not None:
        raise InputError("--prompts, --prompt: give one of them, not both")
    files = pictures_at(images)
    names = None if labels is None else _labels(typed("labels", labels))
    records = finished(images)
    texts = _texts(images, files, prompts, prompt, records)
    if names is None and not any(texts):
        raise InputError("--prompt: nothing to score against; give --prompt, --prompts or --labels")
    check_device(device, dtype)
    check_out(out)
    info = _clip_model(clip)
    if aesthetic is not None:
        check_head(Path(aesthetic), info.embedding_width)
    others = [row.plain_prompt for row in read_rows(images)] if is_run(images) else texts
    panel = _panel(info, device, dtype, others, aesthetic, scorers)
    failed = 0
    with output_of(out) as write, Stored(images, info, records) as stored:
        for file, found in judged(files, texts, names, panel, stored):
            failed += "error" in found
            write(line_of({"file": str(file), **found}))
    return EXIT_SOME_FAILED if failed else EXIT_OK


def classify_images(
    images: Path, labels: str | None, out: Path | None, clip: str, device: str, dtype: str, as_json: bool
) -> int:
    """Print each picture's most probable label, and the count of each label; returns the exit code.

    For pictures in folders named like the labels, a confusion table and the accuracy follow.
    """
    files = pictures_at(images)
    truths = [_folder(images, file) for file in files]
    names = sorted({t for t in truths if t is not None}) if labels is None else typed("labels", labels)
    if labels is None and not 2 <= len(names) <= MAX_LABELS:
        raise InputError(
            f"--labels: missing, and {shown(str(images))} has {len(names)} subfolders with pictures to take them from; "
            f"give --labels, or a folder for each of 2 to {MAX_LABELS} labels"
        )
    by_name = {_text(name): name for name in _labels(names)}  # the text that CLIP reads -> label
    check_device(device, dtype)
    check_out(out)
    panel = _panel(_clip_model(clip), device, dtype, (), None, ())
    confusion, chosen = Confusion(names), Counter[str]()
    strangers = Counter(truth for truth in truths if truth is not None and _text(truth) not in by_name)
    lines = as_json or out is not None
    with output_of(out) as write:
        for (file, found), truth in zip(judged(files, [""] * len(files), list(by_name), panel), truths, strict=True):
            if "error" in found:
                chosen["(failed)"] += 1
                continue
            p = {by_name[text]: value for text, value in found["scores"]["p"].items()}
            best = max(p, key=p.__getitem__)
            chosen[best] += 1
            if truth is not None and _text(truth) in by_name:
                confusion.add(by_name[_text(truth)], best)
            record = {"file": str(file), "label": best, **({} if truth is None else {"folder": truth}), "p": p}
            write(line_of(record) if lines else printable(f"{p[best]:6.1%}  {best}  {file}") + "\n")
        if confusion.of and lines:
            write(line_of(confusion.summary()))
    if confusion.of and not as_json:
        print("\n".join(confusion.lines()))
    if strangers and (confusion.of or any(nearest(truth, names) for truth in strangers)):
        named = ", ".join(f"{shown(t)} ({n}){nearest(t, names)}" for t, n in strangers.most_common(STRANGERS))
        more = f" and {len(strangers) - STRANGERS} more" if len(strangers) > STRANGERS else ""
        print(f"in no label's folder, and not counted: {named}{more}", file=sys.stderr)
    print(printable("  ".join(f"{label}: {n}" for label, n in chosen.most_common())), file=sys.stderr)
    return EXIT_SOME_FAILED if chosen["(failed)"] else EXIT_OK


def judged(
    files: Sequence[Path], texts: Sequence[str], labels: list[str] | None, panel: Panel, stored: Stored | None = None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (file, {"prompt", "scores"} or {"error"}) in order, BATCH files at a time."""
    with Progress(len(files)) as progress:
        for i in range(0, len(files), BATCH):
            part = slice(i, i + BATCH)
            for file, found in _batch(panel, files[part], texts[part], labels, stored or Stored(None)):
                if "error" in found:
                    progress.message(found["error"])
                progress.advance("error" in found, True, len(files))
                for note in panel.news():
                    progress.message(note)
                yield file, found


def _batch(
    panel: Panel, files: Sequence[Path], texts: Sequence[str], labels: list[str] | None, stored: Stored
) -> list[tuple[Path, dict[str, Any]]]:
    import torch

    from genkit.scoring.panel import half

    assert panel.clip is not None
    found: dict[Path, dict[str, Any]] = {}
    vectors: dict[Path, Any] = {file: vector for file in files if (vector := stored.vector(file)) is not None}
    pixels: dict[Path, torch.Tensor] = {}  # preprocessed, so small
    for file, text in zip(files, texts, strict=True):
        measured = stored.measures(file) if file in vectors and not panel.scorers else None
        try:
            if measured is None:
                measured, ready = _measured(panel, file, text)
                if file not in vectors:
                    pixels[file] = ready
            found[file] = {"prompt": text, "scores": measured}
        except InputError as error:
            found[file] = {"error": str(named(file, error))}
    if pixels:
        new = half(panel.clip.embed_pixels(torch.cat(list(pixels.values()))))
        for file, vector in zip(pixels, new, strict=True):
            vectors[file] = vector
            stored.add(file, vector)
    for file, text in zip(files, texts, strict=True):
        if "error" not in found[file]:
            found[file]["scores"] |= panel.of_embedding(vectors[file], text, labels)
    return [(file, found[file]) for file in files]


def _measured(panel: Panel, file: Path, text: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the scores of the pixels and plugins, and the picture preprocessed for CLIP."""
    from genkit.scoring.clip import as_tensor
    from genkit.scoring.measures import measures

    assert panel.clip is not None
    picture = read_image(file)
    extrema: Any = picture.getextrema()  # a (low, high) pair for each channel
    flat = all(high - low <= 2 for low, high in extrema)
    pixels = as_tensor(picture)
    found = {**measures(pixels)[0], "nan": False, "flat": flat, **panel.plugged_in(pixels, [text])[0]}
    return found, panel.clip.preprocess(pixels)


def check_out(out: Path | None) -> None:
    """Raise InputError if `out` cannot be written, before the work starts."""
    local(out)
    if out is not None and out.is_dir():
        raise InputError(f"--out: {shown(str(out))} is a folder; name a file")
    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"--out: {shown(str(out.parent))} is no folder")


def _clip_model(clip: str) -> ModelInfo:
    info = inspect_model(clip)
    if info.kind != "clip":
        raise InputError(f"--clip: {clip} is a model of kind {info.kind}, not a CLIP model")
    return info


def _panel(
    info: ModelInfo, device: str, dtype: str, prompts: Sequence[str], aesthetic: str | None, scorers: Sequence[Any]
) -> Panel:
    plugins = find_scorers(scorers)
    from genkit.components import load_components
    from genkit.device.devices import pick_device
    from genkit.scoring.clip import ClipScorer
    from genkit.scoring.panel import Panel

    target, precision = pick_device(device, dtype)
    clip = ClipScorer.from_components(load_components(info, device=target, dtype=precision))
    head = None if aesthetic is None else Head.load(Path(aesthetic))
    return Panel(clip, prompts, head, plugins)


def pictures_at(images: Path) -> list[Path]:
    """Return the pictures at `images`: a file, a run folder (its finished images) or any folder, sorted by name."""
    if images.is_dir():
        files = list_images(images / "images" if is_run(images) else images)
        if not files:
            raise InputError(f"{images}: holds no PNG, JPEG, WebP or JPEG XL picture")
        return files
    check_image(images)
    return [images]


def _folder(images: Path, file: Path) -> str | None:
    """Return the subfolder of `images` that contains a picture; None for a run, whose subfolders are not labels."""
    if not images.is_dir() or is_run(images):
        return None
    parts = file.relative_to(images).parts
    return parts[0] if len(parts) > 1 else None


def _labels(names: list[str]) -> list[str]:
    try:
        check_labels(names)
    except InputError as error:
        raise InputError(f"--{error}") from None
    return names


def _text(label: str) -> str:
    """Return a label or folder name as text for CLIP, with spaces for _."""
    return label.replace("_", " ").encode("utf-8", "replace").decode()


def _texts(
    images: Path, files: list[Path], prompts: Path | None, prompt: str | None, records: Mapping[Path, Result]
) -> list[str]:
    if prompt is not None:
        return [prompt] * len(files)
    if prompts is not None:
        rows = read_prompts(prompts)
        if len(rows) != len(files):
            raise InputError(f"{prompts}: has {len(rows)} rows for {len(files)} pictures in {images}")
        return [row.plain_prompt for row in rows]
    return [records[file].prompt if file in records else "" for file in files]


def line_of(record: dict[str, Any]) -> str:
    """Return a record as a line of JSON, escaped for a terminal."""
    return printable_json(record) + "\n"


def written(
    found: Iterable[tuple[Path, dict[str, Any]]], total: int, write: Callable[[str], None], progress: Progress
) -> int:
    """Write a JSON line for each file, and advance the progress; return how many have an error."""
    failed = 0
    for file, said in found:
        failed += "error" in said
        if "error" in said:
            progress.message(said["error"])
        progress.advance("error" in said, True, total)
        write(line_of({"file": str(file), **said}))
    return failed


@contextlib.contextmanager
def output_of(out: Path | None) -> Iterator[Any]:
    """Yield a function that writes text to standard output, or to a file that appears only when complete."""
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
