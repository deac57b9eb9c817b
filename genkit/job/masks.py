"""Masks in words: which segmenter finds them, and the masks themselves, before anything is drawn."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.device.memory import Look, at_once
from genkit.durable import disk, sync_folder, write_whole
from genkit.errors import InputError, shown
from genkit.options import Options
from genkit.pictures.images import read_image
from genkit.rows.inputs import MASK_DEFAULTS
from genkit.rows.request import Request
from genkit.vision.models import VisionInfo, inspect_vision
from genkit.vision.words import check_lengths

if TYPE_CHECKING:
    import torch

    from genkit.vision.segmenter import Segmenter

FOLDER = "masks"  # of a run: a PNG for each row
PICTURES = 32  # encoded before their masks are made


def find_segmenter(
    rows: Sequence[Request], options: Options, defaults: Mapping[str, Any]
) -> tuple[VisionInfo | None, list[str]]:
    """Return the segmenter that finds the rows' masks in words, and notes on it; rows get the hash of its weights.

    It is None where no row has such a mask. Raises InputError, naming the row, where one has and there is no segmenter.
    """
    masked = [row for row in rows if row.mask is not None]
    idle = [
        f"{name}: is not used: no row has a mask in words" for name in MASK_DEFAULTS if name in defaults and not masked
    ]
    if options.segmenter is None:
        if masked:
            where = masked[0].source or f"row {masked[0].id}"
            raise InputError(
                f"{where}: mask: {shown(masked[0].mask)} needs --segmenter, a CLIPSeg model that finds it; a picture's "
                "name ends with .png or the like"
            )
        return None, idle
    info = inspect_vision(options.segmenter, ("segmenter",), "--segmenter")
    if not masked:
        return None, ["--segmenter: is not used: no row has a mask in words", *idle]
    for row in masked:
        check_lengths(info, [str(row.mask)], f"{row.source or f'row {row.id}'}: mask")
    hashes = info.hashes
    whole = next(iter(hashes.values()))
    if len(hashes) > 1:
        whole = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    for row in masked:
        row._segmenter, row._found = whole, None  # not one of another segmenter, or of another size
    return info, list(info.notes)


def most_texts(rows: Sequence[Request]) -> int:
    """Return how many different masks in words rows ask of one picture, at most."""
    groups = (group for some in _by_picture([row for row in rows if row.mask is not None]) for group in some)
    return max((len({row.mask for row in group}) for group in groups), default=0)


def without_mask(rows: Sequence[Request]) -> list[Request]:
    """Return the rows whose masks in words are still to be found."""
    return [row for row in rows if row.mask is not None and row._found is None]


def find_masks(rows: Sequence[Request], segmenter: Segmenter) -> None:
    """Find the masks in words of `rows`, which hold them from then on.

    A picture is encoded once for all its rows, together with others of which the same is asked. Masks are of the size
    at which a row is drawn, or of its picture's.
    """
    import torch

    for some in _by_picture([row for row in rows if row.mask is not None]):
        alike: dict[tuple[str, ...], list[int]] = {}
        for k, group in enumerate(some):
            alike.setdefault(tuple(dict.fromkeys(str(row.mask) for row in group)), []).append(k)
        pixels, sizes = _read(some, segmenter)
        for words, members in alike.items():
            for k, maps in zip(members, segmenter.maps(torch.cat([pixels[k] for k in members]), words), strict=True):
                for row in some[k]:
                    _mask(row, maps[words.index(str(row.mask))], sizes[k])


def _by_picture(rows: Sequence[Request]) -> Iterator[list[list[Request]]]:
    """Yield up to PICTURES groups of rows; the rows of a group begin with the same picture."""
    groups: dict[Any, list[Request]] = {}
    for row in rows:
        key = str(row.image) if isinstance(row.image, str | Path) else id(row.image)
        groups.setdefault(key, []).append(row)
    found = list(groups.values())
    yield from (found[start : start + PICTURES] for start in range(0, len(found), PICTURES))


def _read(
    groups: Sequence[Sequence[Request]], segmenter: Segmenter
) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    """Return the prepared picture of each group, (1, 3, h, w), and its own (height, width)."""
    from genkit.scoring.clip import as_tensor

    pixels, sizes = [], []
    for group in groups:
        picture = as_tensor(read_image(group[0].image))
        pixels.append(segmenter.pixels(picture))
        sizes.append((picture.shape[-2], picture.shape[-1]))
    return pixels, sizes


def _mask(row: Request, levels: torch.Tensor, size: tuple[int, int]) -> None:
    """Set a row's mask from probabilities (h, w), and the note on it if it is empty."""
    from PIL import Image

    from genkit.vision.segmenter import binary, enlarged

    n: dict[str, Any] = {k: usual if (v := getattr(row, k)) is None else v for k, usual in MASK_DEFAULTS.items()}
    whole = enlarged(levels[None, None], (row.height or size[0], row.width or size[1]))
    mask = binary(whole, n["mask_threshold"], n["mask_grow"], n["mask_invert"])[0, 0]
    data = io.BytesIO()
    Image.fromarray((mask.cpu() * 255).byte().numpy()).convert("1").save(data, "PNG")
    row._found = data.getvalue()
    if not bool(mask.any()):
        most = "everywhere" if n["mask_invert"] else f"nowhere more probable than {float(whole.max()):.2g}"
        row._empty = f"row {row.id}: mask: {shown(row.mask)} is {most}: nothing is drawn anew; see mask_threshold"


def prepare_masks(rows: Sequence[Request], info: VisionInfo | None, device: Any, look: Look, free: float) -> None:
    """Find the masks of rows that have none yet with a segmenter that is alone on the device: it is freed again.

    look: the memory that it takes; free: bytes of the device, which limit how many pictures it takes at once.
    """
    lacking = without_mask(rows)
    if info is None or not lacking:
        return
    import torch

    from genkit.device.outofmemory import release
    from genkit.phases import phase
    from genkit.vision.models import load_model
    from genkit.vision.segmenter import Segmenter

    with phase("find masks"):
        segmenter = Segmenter(load_model(info, (Segmenter.sense,), device, torch.float32))
        segmenter.batch = at_once(look, free, str(device), segmenter.batch)
        try:
            find_masks(lacking, segmenter)
        finally:
            del segmenter
            release()


def write_masks(folder: Path, rows: Sequence[Request]) -> list[str]:
    """Write the masks that were found to masks/ROW.png in a run folder, as far as they are not there.

    Returns what to say of empty ones, a line each. Raises HostError.
    """
    found = [(folder / FOLDER / f"{row.id}.png", row._found) for row in rows if row._found is not None]
    with disk(folder / FOLDER):
        for path, data in found:
            path.parent.mkdir(exist_ok=True)
            if not path.is_file() or path.read_bytes() != data:
                write_whole(path, data)
        if found:
            sync_folder(folder / FOLDER)
    return [row._empty for row in rows if row._empty]


def recall_masks(folder: Path, rows: Sequence[Request]) -> None:
    """Give rows the masks that a run recorded. Raises InputError for one that is gone."""
    for row in rows:
        if row.mask is not None:
            path = folder / FOLDER / f"{row.id}.png"
            if not path.is_file():
                raise InputError(f"{path}: is absent: the mask of row {row.id}")
            row._found = path.read_bytes()
