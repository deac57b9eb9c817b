"""`genkit depth`: depth maps for pictures of any folder or run."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.device.devices import check_device
from genkit.durable import disk, json_line, write_whole
from genkit.errors import EXIT_OK, EXIT_SOME_FAILED, InputError, shown
from genkit.files import parse_json, place, read_text
from genkit.progress import printable, printable_json
from genkit.studies.score import pictures_at
from genkit.studies.senses import READ, check_folder, looked_at, made_folder, names_of, write_png
from genkit.vision.models import VisionInfo, inspect_vision

if TYPE_CHECKING:
    import numpy as np
    import torch

LINES = "depth.jsonl"
SHADES = 1024
# The colour map inferno of matplotlib (CC0), from low to high in equal steps
COLOURS = ((0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
           (249, 201, 50), (252, 255, 164))  # fmt: skip


def depth_images(
    images: Path, model: str, out: Path, npy: bool = False, draw: bool = False, overwrite: bool = False,
    device: str = "auto", dtype: str = "auto",
) -> int:  # fmt: skip
    """Write NAME.depth.png, 16 bits of grey, for each picture, and a line each to depth.jsonl; returns the exit code.

    The smallest depth of a picture is black, the largest white; a line has file, width, height, min, max, depth (the
    file written), model and weights. npy: write NAME.depth.npy, the float32 values, instead of the PNG. draw: also
    write NAME.drawn.png in colours. Pictures whose files exist are skipped unless `overwrite`. Raises InputError before
    anything is loaded.
    """
    files = pictures_at(images)
    check_folder(out, files)
    check_device(device, dtype)
    info = inspect_vision(model, ("depth estimator",), "--model")
    done = Done(out, info, dict(zip(files, names_of(files, images), strict=True)), npy, draw)
    left = files if overwrite else [file for file in files if not done.has(file)]
    if len(left) < len(files):
        note = f"{len(files) - len(left)} of {len(files)} pictures have their depth and keep it, without --overwrite"
        print(printable(note), file=sys.stderr)
    if not left:
        return EXIT_OK
    from genkit.vision.depth import Depth

    sense = Depth.from_pretrained(info, device=device, dtype=dtype)

    def look(pixels: torch.Tensor, sizes: list[tuple[int, int]]) -> list[tuple[torch.Tensor, tuple[int, int]] | Any]:
        found = zip(sense.maps(pixels), sizes, strict=True)
        bad = InputError(str(sense.nan_error()))
        return [(one, size) if bool(one.isfinite().all()) else bad for one, size in found]

    made_folder(out)
    failed = 0
    try:
        for number, (file, found) in enumerate(looked_at(left, sense, look), 1):
            if isinstance(found, InputError):
                failed += 1
                done.fail(file, str(found))
            else:  # resized one by one, so that only one full-size map is in memory
                print(printable_json(done.add(file, sense.at_size(found[0][None], found[1])[0].numpy())))
            if number % READ == 0:
                done.save()
    finally:  # keeps the lines that were made before Ctrl-C
        done.save()
    return EXIT_SOME_FAILED if failed else EXIT_OK


class Done:
    """The depth files in the output folder, and their lines."""

    def __init__(self, out: Path, info: VisionInfo, names: dict[Path, str], npy: bool, draw: bool) -> None:
        self.out, self.info, self.names, self.npy, self.draw = out, info, names, npy, draw
        self.weights = hashlib.sha256(repr(sorted(info.hashes.items())).encode()).hexdigest()[:16]
        self.records = {Path(str(record.get("file"))).resolve(): record for record in _lines(out / LINES)}
        self.owners = {str(record["depth"]): file for file, record in self.records.items() if "depth" in record}

    def has(self, file: Path) -> bool:
        """Return whether all requested files exist. Raises InputError if they are of another model or picture."""
        depth, drawn = self._paths(file)
        owner = self.owners.get(str(depth), file.resolve())
        if owner != file.resolve():
            raise InputError(
                f"--out: {place(depth)} is the depth of {place(owner)}; name another folder, or --overwrite"
            )
        record = self.records.get(file.resolve(), {})
        if record.get("weights", self.weights) != self.weights:
            by = shown(record.get("model"))
            raise InputError(f"--out: {place(depth)} is by another model, {by}; name another folder, or --overwrite")
        return record.get("depth") == str(depth) and depth.exists() and (drawn.exists() or not self.draw)

    def add(self, file: Path, depth: np.ndarray) -> dict[str, Any]:
        """Write the depth (H, W) float32 of a picture; return its line. Raises HostError."""
        path, drawn = self._paths(file)
        made_folder(path.parent)
        low, high = float(depth.min()), float(depth.max())
        share = (depth - depth.min()) / max(high - low, 1e-30)  # all 0 for a constant depth
        _write(path, depth if self.npy else (share * 65535).round().astype("uint16"))
        if self.draw:
            _write(drawn, _coloured(share))
        size = {"width": depth.shape[1], "height": depth.shape[0], "min": _short(low), "max": _short(high)}
        by = {"model": self.info.name, "weights": self.weights}
        self.records[file.resolve()] = {"file": str(file), **size, "depth": str(path), **by}
        return self.records[file.resolve()]

    def fail(self, file: Path, why: str) -> None:
        """Record why a picture has no depth."""
        self.records[file.resolve()] = {"file": str(file), "error": why}

    def save(self) -> None:
        """Write all lines. Raises HostError."""
        with disk(self.out / LINES):
            write_whole(self.out / LINES, [json_line(record).encode() for record in self.records.values()])

    def _paths(self, file: Path) -> tuple[Path, Path]:
        name = self.names[file]
        return self.out / f"{name}.depth.{'npy' if self.npy else 'png'}", self.out / f"{name}.drawn.png"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of earlier calls. Raises InputError for a line that is not a JSON object."""
    if not path.exists():
        return []
    lines = enumerate(read_text(path, 2**30).split("\n"), 1)
    return [parse_json(line, f"{place(path)}:{number}") for number, line in lines if line.strip()]


def _short(value: float) -> float:
    return float(f"{value:.8g}")


def _coloured(share: np.ndarray) -> np.ndarray:
    """Return values (H, W) from 0 to 1 as colours (H, W, 3) uint8."""
    import numpy as np

    steps = np.linspace(0, 1, len(COLOURS))
    fine = np.linspace(0, 1, SHADES)
    table = np.stack([np.interp(fine, steps, channel) for channel in zip(*COLOURS, strict=True)], axis=-1)
    return table.round().astype(np.uint8)[(share * (SHADES - 1)).round().astype(np.uint16)]


def _write(path: Path, values: np.ndarray) -> None:
    import numpy as np

    if path.suffix != ".npy":
        write_png(path, values)
        return
    data = io.BytesIO()
    np.save(data, values)
    with disk(path):
        write_whole(path, data.getvalue())
