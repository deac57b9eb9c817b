"""Scores relative to other captions: clip_margin and clip_z, which are comparable between prompts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.scoring.captions import GENERAL

if TYPE_CHECKING:
    from genkit.scoring.clip import ClipScorer

MOST = 256  # captions; each is embedded once
FEW = 16  # with fewer other prompts general captions are added, for a meaningful standard deviation


class Yardstick:
    """The reference captions that every picture of a run is compared with, besides its own prompt.

    They are the run's other distinct prompts. Of more than MOST, those with the smallest SHA-256 are chosen, so that
    the choice depends neither on the order of the rows nor on what is already drawn. If there are fewer than FEW, the
    captions of GENERAL that share no word with the picture's prompt are added.
    """

    def __init__(self, clip: ClipScorer, prompts: Iterable[str]) -> None:
        distinct = {_key(p): p for p in sorted(set(prompts)) if p.strip()}
        chosen = sorted(distinct, key=lambda key: hashlib.sha256(key.encode("utf-8", "replace")).digest())[:MOST]
        self.clip = clip
        self.keys = chosen if len(chosen) > FEW else [*chosen, *(c for c in GENERAL if _key(c) not in distinct)]
        self.captions = [distinct.get(key, key) for key in self.keys]
        self.own = len(chosen)  # the rest are of GENERAL
        self._vectors: np.ndarray | None = None
        self._others: dict[str, np.ndarray] = {}

    def __call__(self, image: np.ndarray, prompt: str) -> dict[str, float]:
        """Return clip, clip_margin and clip_z of a picture's unit embedding (width,) float64.

        clip: cosine with the prompt. clip_margin: clip minus the largest cosine with another caption. clip_z: clip
        minus the mean of those cosines, divided by their standard deviation; absent if that is 0.
        """
        own = float(image @ self.text(prompt))
        found = {"clip": round(own, 6)}
        others = self.vectors[self.others(prompt)] @ image
        if len(others):
            found["clip_margin"] = round(own - float(others.max()), 6)
        if len(others) >= 3 and others.std() > 1e-6:
            found["clip_z"] = round((own - float(others.mean())) / float(others.std()), 4)
        return found

    @property
    def vectors(self) -> np.ndarray:
        """The captions' unit embeddings, (len(captions), width) float64, computed on first use."""
        if self._vectors is None:
            self._vectors = self.clip.embed_texts(self.captions).cpu().numpy().astype(np.float64)
        return self._vectors

    def text(self, prompt: str) -> np.ndarray:
        """Return the unit embedding of a prompt, (width,) float64."""
        return self.clip.embed_texts([prompt])[0].cpu().numpy().astype(np.float64)

    def others(self, prompt: str) -> np.ndarray:
        """Return the indices of the captions that `prompt` is compared with."""
        if prompt not in self._others:
            if len(self._others) >= 4 * MOST:
                self._others.clear()
            key, words = _key(prompt), _words(prompt)
            general = (n for n in range(self.own, len(self.keys)) if not words & _words(self.keys[n]))
            kept = [*(n for n in range(self.own) if self.keys[n] != key), *general]
            self._others[prompt] = np.array(kept, dtype=int)
        return self._others[prompt]


def _key(prompt: str) -> str:
    """Return the prompt in lower case with single spaces."""
    return " ".join(prompt.lower().split())


def _words(text: str) -> set[Any]:
    return set(re.findall(r"\w{3,}", text.lower())) - {"the", "with", "and", "for", "some"}
