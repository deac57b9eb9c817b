"""Scores of plain pictures by their pixels: colours of thing and background, and how many pieces the thing has.

Made for emoji-like pictures, a thing on a background of one colour; of photographs they say nothing. `pixel_scores` is
a scorer as those of scoring/plugins.py are, which `genkit evaluate` runs for suites that name its scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
# Hues in degrees at which a colour begins; red goes on from 345 round to 15. GREY: less saturation, or less value.
STARTS = (("red", 0), ("orange", 15), ("yellow", 42), ("green", 70), ("blue", 170), ("purple", 255), ("pink", 310))
RED_AGAIN = 345
GREY = 0.25, 0.2
SIDE = 128  # larger pictures are made as small as that first
FRAME, APART = 6, 40  # of those: pixels of the edge that are background; levels that tell the thing from it
FAINT = 0.1  # share of a thing that is coloured at least, for it to have a colour
LEAST = 0.01  # share of the picture that a piece has at least


def pixel_scores(pictures: torch.Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the scores of uint8 pictures (B, 3, H, W), each a list of B numbers.

    thing_COLOUR: the share, 0 to 1, that a colour has of what is coloured of the thing; white, grey and black, as
    outlines and wheels have it, are no colour, and a thing with less than FAINT of colours has none. back_COLOUR: the
    share of the frame of the picture. thing_area: the share of the picture that is no background: that is further than
    APART levels from the frame's commonest colour. pieces: how many parts of it, that touch nowhere, have LEAST of the
    picture or more.
    """
    import torch

    small = _small(pictures)
    hues = _colours(small)  # (B, H, W): place in COLOURS, -1 for grey
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
    """Return the place in COLOURS of each pixel's hue, (B, H, W), -1 for grey, black and white."""
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
    """Return which pixels of a picture (3, H, W) are not of the colour that its frame mostly has, (H, W)."""
    common = hue[frame].mode().values
    middle = picture[:, frame & (hue == common)].float().median(dim=1).values
    return (picture.float() - middle[:, None, None]).abs().amax(dim=0) > APART


def _pieces(thing: np.ndarray) -> int:
    """Return how many connected parts (8 neighbours) a mask (H, W) has, of LEAST of the picture or more.

    Runs of set pixels are joined with those of the row above that they touch: union-find, the first scan line first.
    """
    parents: list[int] = []
    sizes: list[int] = []

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    above: list[tuple[int, int, int]] = []  # start, end, number of each run of the row above
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
