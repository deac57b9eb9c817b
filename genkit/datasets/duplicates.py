"""Duplicates and near-duplicates: perceptual hashes of all pictures are compared, and confirmed by colours."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from genkit.datasets.example import Example
from genkit.device.devices import usable_cores
from genkit.errors import InputError
from genkit.progress import Steps

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

HASH = 8  # rows and columns of the hash: 64 bits (dHash, N. Krawetz 2013)
PATCHES = 16  # rows and columns of the downscaled colours that confirm a match of hashes
# Largest differences of near-duplicates: bits of the hash, and levels of 255 in any patch. Of 400 emoji that were
# resized by 0.5 or 2, saved as JPEG with quality 50, brightened or cropped by a pixel, 95 to 100 % are found.
NEAR_BITS, NEAR_COLOUR = 6, 32
MOST = 40_000  # up to this number all pairs are compared, in 30 s; of more pictures only those with equal hashes


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of a picture: SHA-256, size, perceptual hash (64 bits), 16x16 colours; or why it is unreadable."""

    digest: str = ""
    size: tuple[int, int] = (0, 0)
    transparent: bool = False
    bits: bytes = b""
    colours: bytes = b""
    problem: str = ""


def fingerprint_all(pictures: Sequence[Example], quiet: bool = True) -> list[Fingerprint]:
    """Decode every picture, on all cores; errors are in `Fingerprint.problem`."""
    fingerprints: list[Fingerprint] = []
    with ThreadPoolExecutor(usable_cores(), "genkit-doctor") as threads, Steps(quiet=quiet) as progress:
        for found in threads.map(_fingerprint, pictures):
            fingerprints.append(found)
            if len(fingerprints) % 100 == 0 or len(fingerprints) == len(pictures):
                progress(len(fingerprints), len(pictures), f"looked at {len(fingerprints)} of {len(pictures)} pictures")
    return fingerprints


def _fingerprint(example: Example) -> Fingerprint:
    from PIL import Image

    from genkit.pictures.images import decode_image

    try:
        data = example.data()
        picture = decode_image(data, example.key)
        if example.conditioning is not None:
            example.conditioning.read()
    except InputError as error:
        return Fingerprint(problem=str(error))
    plain = on_grey(picture)
    grey = plain.convert("L").resize((HASH + 1, HASH), Image.Resampling.BOX).tobytes()
    rows = [grey[i : i + HASH + 1] for i in range(0, len(grey), HASH + 1)]
    bits = bytes(row[i] < row[i + 1] for row in rows for i in range(HASH))
    colours = plain.resize((PATCHES, PATCHES), Image.Resampling.BOX).tobytes()
    return Fingerprint(hashlib.sha256(data).hexdigest(), picture.size, picture.mode == "RGBA", bits, colours)


def on_grey(picture: Image.Image) -> Image.Image:
    """Return a picture as RGB, on grey where it is transparent, so that white on transparent stays visible."""
    from PIL import Image

    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, (128, 128, 128, 255)), picture).convert("RGB")


def alike(fingerprints: Sequence[Fingerprint]) -> list[tuple[int, int]]:
    """Return the pairs of near-duplicates with different bytes; see NEAR_BITS and NEAR_COLOUR."""
    import numpy as np

    first = {found.digest: i for i, found in reversed(list(enumerate(fingerprints))) if not found.problem}
    numbers = np.array(sorted(first.values()), dtype=np.int64)
    if len(numbers) < 2:
        return []
    bits = np.frombuffer(b"".join(fingerprints[i].bits for i in numbers), np.uint8).reshape(-1, HASH * HASH)
    colours = np.frombuffer(b"".join(fingerprints[i].colours for i in numbers), np.uint8).reshape(len(numbers), -1)
    found = []
    for a, b in _close(bits):
        near = np.abs(colours[a].astype(np.int16) - colours[b]).max(axis=1) <= NEAR_COLOUR
        found += list(zip(numbers[a[near]].tolist(), numbers[b[near]].tolist(), strict=True))
    return found


def _close(bits: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, block by block, the index pairs (a < b) of hashes (N, 64) that differ in at most NEAR_BITS bits."""
    import numpy as np

    if len(bits) > MOST:
        _, group = np.unique(bits, axis=0, return_inverse=True)
        order = np.argsort(group.ravel(), kind="stable")
        same = group.ravel()[order][1:] == group.ravel()[order][:-1]
        yield order[:-1][same], order[1:][same]
        return
    signs = bits.astype(np.float32) * 2 - 1
    for start in range(0, len(bits), 1024):
        a, b = np.nonzero(signs[start : start + 1024] @ signs.T >= HASH * HASH - 2 * NEAR_BITS - 0.5)
        later = a + start < b
        yield a[later] + start, b[later]


def joined(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the connected groups of pairs, largest first."""
    group: dict[int, list[int]] = {}
    for a, b in pairs:
        one, other = group.get(a, [a]), group.get(b, [b])
        if one is not other:
            one += other
            group |= dict.fromkeys(one, one)
    return sorted({id(g): sorted(g) for g in group.values()}.values(), key=lambda g: (-len(g), g))
