"""`genkit segment`: masks of the objects that texts name, for pictures of any folder or run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.device.devices import check_device
from genkit.durable import disk, json_line, write_whole
from genkit.errors import EXIT_OK, EXIT_SOME_FAILED, InputError, shown
from genkit.progress import printable_json
from genkit.studies.score import pictures_at
from genkit.studies.senses import check_folder, looked_at, made_folder, names_of, slugs, write_png
from genkit.vision.models import inspect_vision
from genkit.vision.words import check_lengths

if TYPE_CHECKING:
    import numpy as np
    import torch

LINES = "segments.jsonl"
MOST_GROWN = 512  # pixels
COLOURS = ((230, 25, 75), (60, 180, 75), (0, 130, 200), (255, 225, 25), (245, 130, 48), (145, 30, 180), (70, 240, 240))


def segment_images(
    images: Path, words: str, model: str, out: Path, threshold: float = 0.5, grow: int = 0, invert: bool = False,
    soft: bool = False, draw: bool = False, device: str = "auto", dtype: str = "auto",
) -> int:  # fmt: skip
    """Write a mask for each picture and text, and a JSON line each to segments.jsonl; returns the exit code.

    words: comma-separated texts. threshold: of the probability. grow: pixels of dilation. soft: write probabilities, 0
    to 255, instead of black and white. draw: also write the picture with its masks in colour. A line has file, word,
    mask, area (the mask's share of the picture) and the largest probability. Raises InputError before anything is
    loaded.
    """
    from genkit.rows.typed import typed

    texts = typed("labels", words)
    _check(texts, threshold, grow)
    if soft and (grow or invert):
        raise InputError("--soft: writes probabilities, which are neither grown nor inverted")
    files = pictures_at(images)
    check_folder(out, files)
    check_device(device, dtype)
    info = inspect_vision(model, ("segmenter",), "--model")
    check_lengths(info, texts, "--words")
    from genkit.vision.segmenter import Segmenter, binary, enlarged

    segmenter = Segmenter.from_pretrained(info, device=device, dtype=dtype)

    def look(pixels: torch.Tensor, sizes: list[tuple[int, int]]) -> list[tuple[np.ndarray, list[float], list[float]]]:
        found = []
        for maps, size in zip(segmenter.maps(pixels, texts), sizes, strict=True):
            whole = enlarged(maps[None], size)
            masks = binary(whole, threshold, grow, invert)[0]
            levels = (whole[0] * 255).round() if soft else masks * 255
            areas, peaks = masks.float().mean(dim=(1, 2)).tolist(), whole[0].amax(dim=(1, 2)).tolist()
            found.append((levels.byte().cpu().numpy(), areas, peaks))
        return found

    names = dict(zip(files, names_of(files, images), strict=True))
    parts = slugs(["drawn", *texts])[1:]
    records: list[dict[str, Any]] = []
    failed = 0
    made_folder(out)
    try:
        for file, one in looked_at(files, segmenter, look):
            if isinstance(one, InputError):
                failed += 1
                records.append({"file": str(file), "error": str(one)})
                continue
            for word, slug, mask, area, peak in zip(texts, parts, *one, strict=True):
                path = out / f"{names[file]}.{slug}.png"
                made_folder(path.parent)
                write_png(path, mask)
                sizes = {"area": round(area, 6), "most": round(peak, 6)}
                records.append({"file": str(file), "word": word, "mask": str(path), **sizes})
                print(printable_json(records[-1]))
            if draw:
                write_png(out / f"{names[file]}.drawn.png", _drawn(file, one[0]))
    finally:  # keeps the lines that were made before Ctrl-C
        with disk(out):
            write_whole(out / LINES, "".join(map(json_line, records)).encode())
    return EXIT_SOME_FAILED if failed else EXIT_OK


def _check(texts: Sequence[str], threshold: float, grow: int) -> None:
    if not 1 <= len(texts) <= 100 or not all(text.strip() and "\x00" not in text for text in texts):
        raise InputError(f"--words: {shown(', '.join(texts))}: name 1 to 100 texts, with commas between")
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise InputError(f"--words: {shown(twice)} is named twice")
    if not 0 < threshold < 1:
        raise InputError(f"--threshold: {threshold:g} is not more than 0 and less than 1")
    if not 0 <= grow <= MOST_GROWN:
        raise InputError(f"--grow: {grow} is not a number of pixels from 0 to {MOST_GROWN}")


def _drawn(file: Path, masks: np.ndarray) -> np.ndarray:
    """Return the picture (H, W, 3) tinted by its masks (N, H, W), one colour each."""
    import numpy as np

    from genkit.pictures.images import read_image

    found = np.asarray(read_image(file)).astype(np.float32)
    for number, mask in enumerate(masks):
        share = mask[..., None] / 255 * 0.5
        found = found * (1 - share) + np.array(COLOURS[number % len(COLOURS)], dtype=np.float32) * share
    return found.round().astype(np.uint8)
