"""Shared by the commands of vision models: reading pictures ahead, names of output files, atomic PNGs."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from genkit.device.devices import usable_cores
from genkit.durable import disk, write_whole
from genkit.errors import HostError, InputError, shown
from genkit.files import local, place
from genkit.progress import Progress
from genkit.rows.pictures import check_apart
from genkit.runs.records import is_run
from genkit.vision.preprocess import read_size

if TYPE_CHECKING:
    import numpy as np
    import torch

    from genkit.vision.models import Sense

T = TypeVar("T")
R = TypeVar("R")

READ = 16  # pictures of a batch; as many are prepared ahead, with one at full size for each thread
THREADS = 4


def check_folder(out: Path, files: Sequence[Path]) -> None:
    """Raise InputError if `out` is not a folder, or contains one of the pictures."""
    local(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {shown(str(out))} is not a folder")
    check_apart(files, out)


def made_folder(folder: Path) -> Path:
    """Create a folder if it is absent, and return it. Raises HostError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"{place(folder)}: cannot be made: {error.strerror or error}") from None
    return folder


def names_of(files: Sequence[Path], source: Path) -> list[str]:
    """Return for each picture its path relative to `source` without the suffix; with it where two would be equal.

    source: a picture, a folder, or a run.
    """
    inside = source / "images" if is_run(source) else source
    root = inside if source.is_dir() else source.parent
    plain = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    count = Counter(plain)
    return [
        name if count[name] == 1 else file.relative_to(root).as_posix() for file, name in zip(files, plain, strict=True)
    ]


def slugs(texts: Sequence[str]) -> list[str]:
    """Return texts as distinct parts of file names."""
    found: list[str] = []
    for text in texts:
        name = re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:60].strip("-") or "text"
        number = 1
        while (name if number == 1 else f"{name}-{number}") in found:
            number += 1
        found.append(name if number == 1 else f"{name}-{number}")
    return found


def looked_at(
    files: Sequence[Path],
    sense: Sense,
    look: Callable[[torch.Tensor, list[tuple[int, int]]], Sequence[T | InputError]],
) -> Iterator[tuple[Path, T | InputError]]:
    """Yield (file, result of `look` or the error of reading it) in order, with a line of progress.

    look: a function of prepared pictures (B, 3, h, w) of one shape and the original (height, width) of each, which
    returns a result or an error for each. B is at most READ, or the model's batch size if all pictures have one shape.
    Pictures are read and prepared in threads.
    """
    import torch

    processor = sense.loaded.processor_config
    alike = read_size(100, 200, processor) == read_size(200, 100, processor)
    with Progress(len(files)) as progress:
        for note in sense.loaded.notes:
            progress.message(note)
        for part in read_ahead(files, lambda file: _prepared(file, sense), min(READ, sense.batch) if alike else READ):
            found: dict[Path, T | InputError] = {}
            ready: dict[tuple[int, ...], list[tuple[Path, torch.Tensor, tuple[int, int]]]] = {}
            for file, read in part:
                if isinstance(read, InputError):
                    found[file] = read
                else:
                    ready.setdefault(tuple(read[0].shape), []).append((file, *read))
            several = [file for file, _ in part]
            part.clear()
            for group in ready.values():
                paths, sizes = [file for file, _, _ in group], [size for _, _, size in group]
                pixels = torch.cat([pixels for _, pixels, _ in group])
                group.clear()  # free the unstacked copies
                found |= {file: named(file, one) for file, one in zip(paths, look(pixels, sizes), strict=True)}
                del pixels
            for file in several:
                one = found[file]
                if isinstance(one, InputError):
                    progress.message(str(one))
                progress.advance(isinstance(one, InputError), True, len(files))
                yield file, one


def read_ahead(files: Sequence[Path], read: Callable[[Path], R], count: int) -> Iterator[list[tuple[Path, R]]]:
    """Yield lists of `count` (file, read(file)); the next list is read meanwhile, in threads."""
    pool = ThreadPoolExecutor(min(THREADS, usable_cores()), "genkit-read")
    try:
        ahead: list[tuple[Path, Future[R]]] = []
        for start in range(0, len(files) + count, count):
            part, ahead = ahead, [(file, pool.submit(read, file)) for file in files[start : start + count]]
            found = [(file, future.result()) for file, future in part]
            part.clear()  # keep no reference, so that the caller can free what was read
            if found:
                yield found
    finally:
        pool.shutdown(cancel_futures=True)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write pixels as a PNG file atomically. Raises HostError."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    with disk(path):
        write_whole(path, data.getvalue())


def named(file: Path, found: T) -> T | InputError:
    """Return a result as it is, and an error with the file's name in front."""
    if isinstance(found, InputError) and not str(found).startswith(place(file)):
        return InputError(f"{place(file)}: {found}")
    return found


def _prepared(file: Path, sense: Sense) -> tuple[torch.Tensor, tuple[int, int]] | InputError:
    import numpy as np
    import torch

    from genkit.pictures.images import read_image

    try:
        picture = torch.from_numpy(np.array(read_image(file))).permute(2, 0, 1)[
            None
        ]  # channels last in memory, as in Pillow
        return sense.pixels(picture), (picture.shape[-2], picture.shape[-1])
    except InputError as error:
        return named(file, error)
