"""The main colour of each box, one of the 11 basic colour terms (Berlin and Kay 1969), by hue and lightness.

A pixel with values 0 to 1, V the largest and m the smallest of its channels, L = (V + m) / 2, C = V - m:

    black   V < 0.2
    grey    C < 0.12 or C / V < 0.15: of these white from L = 0.85 on, and black below 0.15
    hue     red to 15 degrees and from 340 on, orange to 42, yellow to 70, green to 165, blue to 255, purple to 300,
            pink
    pink    red and purple with L > 0.7
    brown   red with V < 0.4, orange with V < 0.7, yellow with V < 0.5

The colour of a box is the one that most of its pixels have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from genkit.scoring.boxes import COLORS, Corners

_HUES = (
    (15, "red"),
    (42, "orange"),
    (70, "yellow"),
    (165, "green"),
    (255, "blue"),
    (300, "purple"),
    (340, "pink"),
    (361, "red"),
)
_DARK = {"red": 0.4, "orange": 0.7, "yellow": 0.5}  # with V below this, the colour is brown


def color_map(picture: torch.Tensor) -> torch.Tensor:
    """Return the index in COLORS of the colour of each pixel of a uint8 picture (3, H, W): (H, W) int64."""
    red, green, blue = rgb = picture.float() / 255
    value, low = rgb.amax(dim=0), rgb.amin(dim=0)
    chroma, lightness = value - low, (value + low) / 2
    safe = chroma.clamp(min=1e-6)
    hue = torch.where(
        value == red,
        ((green - blue) / safe) % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = hue * 60
    found = torch.zeros_like(hue, dtype=torch.int64)
    start = 0.0
    for end, name in _HUES:
        found[(hue >= start) & (hue < end)] = COLORS.index(name)
        start = end
    for name, least in _DARK.items():
        found[(found == COLORS.index(name)) & (value < least)] = COLORS.index("brown")
    for name in ("red", "purple"):
        found[(found == COLORS.index(name)) & (lightness > 0.7)] = COLORS.index("pink")
    plain = (chroma < 0.12) | (chroma < 0.15 * value)
    found[plain] = COLORS.index("grey")
    found[plain & (lightness >= 0.85)] = COLORS.index("white")
    found[(value < 0.2) | (plain & (lightness < 0.15))] = COLORS.index("black")
    return found


def colors_of(picture: torch.Tensor, boxes: Sequence[Corners]) -> list[str]:
    """Return the main colour of each box (x0, y0, x1, y1) in pixels of a uint8 picture (3, H, W)."""
    if not boxes:
        return []
    found = color_map(picture)
    height, width = found.shape
    names = []
    for x0, y0, x1, y1 in boxes:
        left, top = min(int(x0), width - 1), min(int(y0), height - 1)
        inside = found[top : max(top + 1, math.ceil(y1)), left : max(left + 1, math.ceil(x1))]
        names.append(COLORS[int(torch.bincount(inside.flatten(), minlength=len(COLORS)).argmax())])
    return names
