"""Scores of the pixels alone: sharpness and brightness."""

from __future__ import annotations

import torch

LUMA = (77, 150, 29)  # of 256: Rec. 601 in integers, so that the result is the same on all devices


@torch.inference_mode()
def measures(pictures: torch.Tensor) -> list[dict[str, float]]:
    """Return {"sharpness", "brightness"} for each of (B, 3, H, W) uint8 pictures, computed on their device.

    sharpness: the variance of the Laplacian (4-neighbour, inner pixels) of the luma, 0 to 255, as with
    OpenCV: 0 for a flat picture, tens when blurred, hundreds to thousands when sharp, at most 1020**2. It grows with
    contrast and noise, and halves or more with each doubling of a picture's size. brightness: mean luma, 0 to 1.
    """
    x = pictures.int()
    luma = LUMA[0] * x[:, 0] + LUMA[1] * x[:, 1] + LUMA[2] * x[:, 2]
    sums = [luma.long().sum(dim=(1, 2))]
    inner = max(0, luma.shape[1] - 2) * max(0, luma.shape[2] - 2)
    if inner:
        around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
        edges = (4 * luma[:, 1:-1, 1:-1] - around).long()
        sums += [edges.sum(dim=(1, 2)), (edges * edges).sum(dim=(1, 2))]
    found = []
    for total, *moments in torch.stack(sums, dim=1).tolist():
        first, second = moments or (0, 0)
        variance = (inner * second - first * first) / (inner * inner * 256**2) if inner else 0.0
        brightness = total / (luma.shape[1] * luma.shape[2] * 255 * 256)
        found.append({"sharpness": round(variance, 4), "brightness": round(brightness, 6)})
    return found
