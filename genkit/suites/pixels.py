"""Scores of simple pictures from their pixels: colours of object and background, and the number of pieces.

They are made for emoji-like pictures, an object on a plain background, and mean nothing for photographs. `pixel_scores`
is a plugin scorer (scoring/plugins.py), which `genkit evaluate` runs for suites that use its scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
# Hues in degrees at which a colour begins; red is 345 to 15. GREY: a pixel with less saturation, or less value (HSV).
STARTS = (("red", 0), ("orange", 15), ("yellow", 42), ("green", 70), ("blue", 170), ("purple", 255), ("pink", 310))
RED_AGAIN = 345
GREY = 0.25, 0.2
SIDE = 128  # larger pictures are first downscaled to this
FRAME, APART = 6, 40  # width of the frame that is background; least difference in levels of the object from it
FAINT = 0.1  # least share of coloured pixels for an object to have a colour
LEAST = 0.01  # least share of the picture for a piece


def pixel_scores(pictures: torch.Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the scores of uint8 pictures (B, 3, H, W), each a list of B numbers.

    The object is all that differs by more than APART levels from the most common colour of the picture's frame.
    thing_COLOUR: the share of a colour, 0 to 1, among the coloured pixels of the object (white, grey and black are not
    counted, since outlines and wheels have them); 0 if less than FAINT of the object is coloured. back_COLOUR: the
    share of a colour in the frame. thing_area: the share of the object in the picture. pieces: the number of the
    object's connected parts with at least LEAST of the picture.
    """
    import torch

    small = _small(pictures)
    hues = _colours(small)  # (B, H, W): index in COLOURS, -1 for grey
    frame = torch.ones(small.shape[2:], dtype=torch.bool, device=small.device)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    found: dict[str, list[float]] = {name: [] for name in pixel_scores.names}  # type: ignore[attr-defined]
    for picture, hue in zip(small, hues, strict=True):
        thing = _thing(picture, hue, frame)
        for where, inside in (("thing", thing), ("back", frame)):
            grey, *counts = torch.bincount(hue[inside] + 1, minlength=len(COLOURS) + 1).tolist()
            whole = sum(counts) + (grey if where == "back" else 0)
            shares = [n / max(1, whole) if whole >= FAINT * int(inside.sum()) else 0.0 for n in counts]
            for colour, share in zip(COLOURS, shares, strict=True):
                found[f"{where}_{colour}"].append(round(share, 4))
        found["thing_area"].append(round(float(thing.float().mean()), 4))
        found["pieces"].append(_pieces(thing.cpu().numpy()))
    return found


pixel_scores.names = (  # type: ignore[attr-defined]
    *(f"{where}_{colour}" for where in ("thing", "back") for colour in COLOURS), "thing_area", "pieces",
)  # fmt: skip
NAMES: tuple[str, ...] = pixel_scores.names  # type: ignore[attr-defined]


def _small(pictures: torch.Tensor) -> torch.Tensor:
    """Return (B, 3, H, W) uint8 pictures with no side longer than SIDE."""
    import torch

    height, width = pictures.shape[2:]
    scale = SIDE / max(height, width)
    if scale >= 1:
        return pictures
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return torch.nn.functional.interpolate(pictures.float(), size, mode="area").round().byte()


def _colours(pictures: torch.Tensor) -> torch.Tensor:
    """Return the index in COLOURS of each pixel's hue, (B, H, W), -1 for grey, black and white."""
    import torch

    x = pictures.float() / 255
    high, at = x.max(dim=1)
    spread = high - x.amin(dim=1)
    red, green, blue = x.unbind(1)
    safe = spread.clamp(min=1e-9)
    sectors = torch.stack([(green - blue) / safe % 6, (blue - red) / safe + 2, (red - green) / safe + 4])
    hue = sectors.gather(0, at[None])[0] * 60
    starts = torch.tensor([start for _, start in STARTS], device=hue.device, dtype=hue.dtype)
    place = (torch.bucketize(hue, starts, right=True) - 1).where(hue < RED_AGAIN, 0)
    return place.where((spread >= GREY[0] * high) & (high >= GREY[1]), -1)


def _thing(picture: torch.Tensor, hue: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """Return a mask (H, W) of the pixels of a picture (3, H, W) that differ from the main colour of its frame."""
    common = hue[frame].mode().values
    middle = picture[:, frame & (hue == common)].float().median(dim=1).values
    return (picture.float() - middle[:, None, None]).abs().amax(dim=0) > APART


def _pieces(thing: np.ndarray) -> int:
    """Return the number of connected components (8 neighbours) of a mask (H, W) with at least LEAST of the picture.

    Row by row, runs of set pixels are joined with the runs of the row above that they touch (union-find).
    """
    parents: list[int] = []
    sizes: list[int] = []

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    above: list[tuple[int, int, int]] = []  # (start, end, index) of the runs of the row above
    for row in np.pad(thing, ((0, 0), (1, 1))).astype(np.int8):
        edges = np.flatnonzero(np.diff(row)).tolist()
        here = []
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            number = len(parents)
            parents.append(number)
            sizes.append(end - start)
            for left, right, other in above:
                if left <= end and start <= right and root(other) != root(number):
                    one, two = root(other), root(number)
                    parents[one] = two
                    sizes[two] += sizes[one]
            here.append((start, end, number))
        above = here
    return sum(parents[k] == k and sizes[k] >= LEAST * thing.size for k in range(len(parents)))
