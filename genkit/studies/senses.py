"""What the commands that look at pictures share: which pictures, how they are read, and names for what is written."""

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

READ = 16  # pictures that the model is given; as many are prepared ahead, and of those at full size one a thread
THREADS = 4


def check_folder(out: Path, files: Sequence[Path]) -> None:
    """Raise InputError unless `out` is, or can become, a folder that holds none of the pictures."""
    local(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {shown(str(out))} is not a folder")
    check_apart(files, out)


def made_folder(folder: Path) -> Path:
    """Return a folder, which is made if it is absent. Raises HostError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"{place(folder)}: cannot be made: {error.strerror or error}") from None
    return folder


def names_of(files: Sequence[Path], source: Path) -> list[str]:
    """Return for each picture its path below `source` without suffix; with it where two would be alike.

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
    """Return texts as parts of file names, all different."""
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
    """Yield (file, what `look` says of it, or why it cannot be read) in order, with a line of progress.

    look: is given up to READ prepared pictures (B, 3, h, w) of one shape, or as many as the model takes at once where
    all have one, and the (height, width) of each; it returns one result for each, or what is wrong with it. Pictures
    are read and prepared in threads.
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
                group.clear()  # so that there is one copy of what is prepared
                found |= {file: named(file, one) for file, one in zip(paths, look(pixels, sizes), strict=True)}
                del pixels
            for file in several:
                one = found[file]
                if isinstance(one, InputError):
                    progress.message(str(one))
                progress.advance(isinstance(one, InputError), True, len(files))
                yield file, one


def read_ahead(files: Sequence[Path], read: Callable[[Path], R], count: int) -> Iterator[list[tuple[Path, R]]]:
    """Yield `count` files at a time with what `read` returns of each; the next ones are read meanwhile, in threads."""
    pool = ThreadPoolExecutor(min(THREADS, usable_cores()), "genkit-read")
    try:
        ahead: list[tuple[Path, Future[R]]] = []
        for start in range(0, len(files) + count, count):
            part, ahead = ahead, [(file, pool.submit(read, file)) for file in files[start : start + count]]
            found = [(file, future.result()) for file, future in part]
            part.clear()  # what was read is gone as soon as whoever takes it lets go
            if found:
                yield found
    finally:
        pool.shutdown(cancel_futures=True)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write pixels as a PNG file, whole or not at all. Raises HostError."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    with disk(path):
        write_whole(path, data.getvalue())


def named(file: Path, found: T) -> T | InputError:
    """Return a result, or an error that names the file."""
    if isinstance(found, InputError) and not str(found).startswith(place(file)):
        return InputError(f"{place(file)}: {found}")
    return found


def _prepared(file: Path, sense: Sense) -> tuple[torch.Tensor, tuple[int, int]] | InputError:
    import numpy as np
    import torch

    from genkit.pictures.images import read_image

    try:
        picture = torch.from_numpy(np.array(read_image(file))).permute(2, 0, 1)[None]  # colours last, as Pillow has it
        return sense.pixels(picture), (picture.shape[-2], picture.shape[-1])
    except InputError as error:
        return named(file, error)
