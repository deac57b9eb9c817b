"""`genkit caption`: captions of pictures, or answers about them, printed or written as training data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.device.devices import check_device
from genkit.durable import disk, json_line, write_whole
from genkit.errors import EXIT_OK, EXIT_SOME_FAILED, InputError, nearest, shown
from genkit.files import parse_json, place, read_text
from genkit.progress import printable
from genkit.runs.records import is_run
from genkit.studies.score import check_out, line_of, output_of, pictures_at
from genkit.studies.senses import READ, looked_at
from genkit.vision.classes import CLASSES
from genkit.vision.generation import detail_of
from genkit.vision.models import VisionInfo, inspect_vision
from genkit.vision.words import check_lengths

if TYPE_CHECKING:
    import torch

WRITES = ("txt", "jsonl")
METADATA = "metadata.jsonl"
KEYS = ("text", "caption")  # of a caption in a line of metadata.jsonl
CONTINUES = "BlipForConditionalGeneration"


def caption_images(
    images: Path, model: str, question: str | None = None, begin: str | None = None, write: str | None = None,
    overwrite: bool = False, out: Path | None = None, tokens: int | None = None, device: str = "auto",
    dtype: str = "auto", detail: str | None = None,
) -> int:  # fmt: skip
    """Print a JSON line for each picture: file and caption, or the answer to a question; returns the exit code.

    begin: the beginning of all captions. write: "txt" also writes PICTURE.txt beside each picture, "jsonl"
    metadata.jsonl in the folder; pictures that have a caption there are skipped unless `overwrite`. out: a file for the
    lines. tokens: maximum number of new tokens; default 50, or that of Florence's `detail`. Raises InputError before
    anything is loaded.
    """
    if write is not None and write not in WRITES:
        raise InputError(f"--write: {shown(write)} is not txt or jsonl{nearest(write, WRITES)}")
    if overwrite and write is None:
        raise InputError("--overwrite: needs --write txt or --write jsonl")
    if tokens is not None and not 1 <= tokens <= 1000:
        raise InputError(f"--tokens: {tokens} is not a number from 1 to 1000")
    files = pictures_at(images)
    check_device(device, dtype)
    check_out(out)
    info = inspect_vision(model, ("captioner",), "--model")
    detail_of(info.kind, info.name, detail, "--detail")
    text = _text(info, question, begin)
    there = _WRITERS[write](images, files, overwrite)
    left = [file for file in files if not there.has(file)]
    if len(left) < len(files):
        note = f"{len(files) - len(left)} of {len(files)} pictures have a caption and keep it, without --overwrite"
        print(printable(note), file=sys.stderr)
    if not left:
        return EXIT_OK
    from genkit.vision.captioner import Captioner

    captioner = Captioner.from_pretrained(info, device=device, dtype=dtype)

    def look(pixels: torch.Tensor, sizes: list[tuple[int, int]]) -> list[str]:
        return captioner.captions(pixels, text, tokens, detail)

    failed = 0
    asked = {} if question is None else {"question": question}
    with output_of(out) as put:
        try:
            for number, (file, found) in enumerate(looked_at(left, captioner, look), 1):
                if isinstance(found, InputError):
                    failed += 1
                    put(line_of({"file": str(file), "error": str(found)}))
                    continue
                there.add(file, found)
                put(line_of({"file": str(file), **asked, "caption": found}))
                if number % READ == 0:
                    there.save()
        finally:  # keeps the captions that were made before Ctrl-C
            there.save()
    return EXIT_SOME_FAILED if failed else EXIT_OK


def _text(info: VisionInfo, question: str | None, begin: str | None) -> str | None:
    """Return the text input of the model. Raises InputError for options that do not belong to its kind."""
    answers = CLASSES[info.kind].answers
    if answers and begin is not None:
        raise InputError(f"--begin: {shown(begin)}: {info.name} answers questions: give --question")
    if answers and question is None:
        raise InputError(f"--question: is missing: {info.name} answers questions, and writes no captions")
    if not answers and question is not None:
        able = " or ".join(kind for kind, about in CLASSES.items() if about.answers)
        raise InputError(f"--question: {shown(question)}: {info.name} captions; a {able} answers questions")
    if begin is not None and info.kind != CONTINUES:
        raise InputError(f"--begin: {shown(begin)}: {info.name} continues no text; a {CONTINUES} does")
    name, text = ("--question", question) if answers else ("--begin", begin)
    if text is None:
        return None
    if not text.strip() or "\x00" in text:
        raise InputError(f"{name}: {shown(text)} is no text")
    check_lengths(info, [text], name)
    return text


class Printed:
    """Captions that are only printed; base class of those that are also written."""

    def __init__(self, images: Path, files: Sequence[Path], overwrite: bool) -> None:
        pass

    def has(self, file: Path) -> bool:
        """Return whether a picture has a caption that is kept."""
        return False

    def add(self, file: Path, caption: str) -> None:
        """Take a new caption."""

    def save(self) -> None:
        """Write captions that are not on disk yet. Raises HostError."""


class Beside(Printed):
    """Captions in PICTURE.txt."""

    def __init__(self, images: Path, files: Sequence[Path], overwrite: bool) -> None:
        self.overwrite = overwrite
        names: dict[Path, Path] = {}
        for file in files:
            other = names.setdefault(file.with_suffix(".txt"), file)
            if other != file:
                raise InputError(f"--write: {place(other)} and {place(file)} would share a .txt; use --write jsonl")

    def has(self, file: Path) -> bool:
        """Return whether its .txt exists."""
        return not self.overwrite and file.with_suffix(".txt").exists()

    def add(self, file: Path, caption: str) -> None:
        """Write its .txt atomically."""
        with disk(file.with_suffix(".txt")):
            write_whole(file.with_suffix(".txt"), f"{caption}\n".encode())


class Metadata(Printed):
    """Captions in metadata.jsonl: {"file_name": below the folder, "text": caption}; other lines and keys stay.

    A line with the key "caption" gets its new caption there, since `genkit train` reads that key first.
    """

    def __init__(self, images: Path, files: Sequence[Path], overwrite: bool) -> None:
        root = images / "images" if is_run(images) else images
        self.root = root if images.is_dir() else images.parent
        self.path, self.overwrite = self.root / METADATA, overwrite
        self.records: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(read_text(self.path, 2**30).split("\n") if self.path.exists() else (), 1):
            if line.strip():
                record = parse_json(line, f"{place(self.path)}:{number}")
                name = record.get("file_name")
                if not isinstance(name, str):
                    raise InputError(f"{place(self.path)}:{number}: file_name: {shown(name)} is not the name of a file")
                name = name.replace("\\", "/").removeprefix("./")
                if name in self.records:
                    raise InputError(f"{place(self.path)}:{number}: file_name: {shown(name)} is there twice")
                self.records[name] = record

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def has(self, file: Path) -> bool:
        """Return whether the picture has a line with a caption."""
        return not self.overwrite and any(self.records.get(self._name(file), {}).get(key) for key in KEYS)

    def add(self, file: Path, caption: str) -> None:
        """Update its line."""
        name = self._name(file)
        record = {"file_name": name, **self.records.get(name, {})}
        self.records[name] = record | dict.fromkeys([key for key in KEYS if key in record] or KEYS[:1], caption)

    def save(self) -> None:
        """Write all lines atomically."""
        with disk(self.path):
            write_whole(self.path, [json_line(record).encode() for record in self.records.values()])


_WRITERS: dict[str | None, Callable[[Path, Sequence[Path], bool], Printed]] = {
    None: Printed, "txt": Beside, "jsonl": Metadata,
}  # fmt: skip
