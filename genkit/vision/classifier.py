"""Image classifiers: the probability of each label of a closed set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from genkit.errors import InputError
from genkit.vision.models import Loaded, Sense


class Classifier(Sense):
    """An image classifier of transformers or timm.

    labels: in the order of its logits. several: multi-label, that is a sigmoid of each logit instead of a softmax.
    """

    sense = "classifier"

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self.labels = loaded.info.labels
        stated = loaded.info.part.config.get("problem_type")
        self.several = stated == "multi_label_classification" or len(self.labels) == 1

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the probabilities (B, len(labels)) of uint8 pictures (B, 3, H, W), float32 on the CPU.

        They are NaN where the logits are NaN.
        """
        return self.odds(self.pixels(pictures))

    def odds(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the same for pictures (B, 3, h, w) that `pixels` has prepared.

        A softmax; a sigmoid if `problem_type` is multi_label_classification, as in transformers' pipeline.
        """
        found = self.in_batches(len(pixels), lambda part: self._logits(pixels[part]))
        logits = torch.cat(found) if found else torch.empty(0, len(self.labels))
        return logits.sigmoid() if self.several else logits.softmax(dim=-1)

    def classify(self, pictures: Sequence[Any], top: int = 5) -> list[list[tuple[str, float]]]:
        """Return the `top` most probable (label, probability) of each picture: a path, a PIL image or an array.

        Raises HostError if the logits are NaN.
        """
        if top < 1:
            raise InputError(f"top: {top} is not 1 or more")
        from genkit.scoring.clip import as_tensor

        return [self.best(self(as_tensor(picture))[0], top) for picture in pictures]

    def best(self, odds: torch.Tensor, top: int) -> list[tuple[str, float]]:
        """Return the `top` most probable (label, probability) of one picture. odds: (len(labels),)."""
        if bool(odds.isnan().any()):
            raise self.nan_error()
        order = torch.argsort(-odds, stable=True)[:top].tolist()
        return [(self.labels[n], round(float(odds[n]), 6)) for n in order]

    def _logits(self, pixels: torch.Tensor) -> torch.Tensor:
        found = self.model(pixels.to(self.device))
        logits: torch.Tensor = getattr(found, "logits", found)  # timm returns the logits themselves
        return logits.float().cpu()
