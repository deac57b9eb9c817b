"""Small pictures with captions, for training: a colour is what they show and what their caption says."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def colour_folder(folder: Path, count: int = 20, side: int = 16) -> Path:
    """Write `count` PNGs, red and blue by turns, a little different each, with captions in .txt files beside them."""
    folder.mkdir(parents=True)
    lot = random.Random(0)
    for n in range(count):
        name = list(COLOURS)[n % 2]
        ground = tuple(max(0, min(255, level + lot.randint(-20, 20))) for level in COLOURS[name])
        picture = Image.new("RGB", (side, side), ground)
        picture.putpixel((n % side, n // side), (255, 255, 255))
        picture.save(folder / f"{n:03d}.png")
        (folder / f"{n:03d}.txt").write_text(f"a {name} picture\n")
    return folder
