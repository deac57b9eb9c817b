"""All scorers of a run together: CLIP, an aesthetic head, measures of the pixels, plugins, other vision models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genkit.errors import reason
from genkit.scoring.measures import measures
from genkit.scoring.names import known_scores
from genkit.scoring.plugins import Plugin
from genkit.scoring.relative import Yardstick
from genkit.scoring.senses import Asked, Senses

if TYPE_CHECKING:
    import torch

    from genkit.scoring.aesthetic import Head
    from genkit.scoring.clip import ClipScorer


class Panel:
    """The scorers of a run. prompts: those of all rows, for the relative scores. senses: other vision models.

    notes: messages about failed plugins that `news` has not returned yet.
    """

    def __init__(
        self,
        clip: ClipScorer | None = None,
        prompts: Iterable[str] = (),
        head: Head | None = None,
        scorers: Sequence[Plugin] = (),
        senses: Senses | None = None,
    ) -> None:
        self.clip, self.head, self.scorers, self.senses = clip, head, scorers, senses or Senses()
        self.yardstick = None if clip is None else Yardstick(clip, prompts)
        self.notes: list[str] = []
        self._failed: set[str] = set()

    def news(self) -> list[str]:
        """Return and clear the new notes. A gate that uses the score of a failed plugin passes nothing."""
        new = []
        for notes in (self.notes, self.senses.notes):
            taken = list(notes)
            del notes[: len(taken)]  # another thread may append meanwhile
            new += taken
        return new

    def unload(self) -> None:
        """Free the weights. Nothing can be scored afterwards."""
        if self.clip is not None:
            self.clip.model.to("meta")
        self.senses = Senses()

    @property
    def names(self) -> frozenset[str]:
        """The names of the computed scores, for expressions."""
        others = [name for plugin in self.scorers for name in plugin.names]
        return known_scores(self.clip is not None, self.head is not None, others)

    def scores(
        self, pictures: torch.Tensor, prompts: Sequence[str], labels: Sequence[Sequence[str] | None],
        asked: Sequence[Asked] = (),
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Return the scores of each of (B, 3, H, W) uint8 pictures, which are independent of the rest of the batch.

        asked: the requests to vision models for each picture; none by default. With a CLIP model there is also
        "embedding", a unit vector (width,) float16.
        """
        found: list[dict[str, Any]] = [*measures(pictures)]
        if self.clip is not None:
            vectors = half(self.clip.embed_images(pictures))
            for scores, vector, prompt, names in zip(found, vectors, prompts, labels, strict=True):
                scores.update(self.of_embedding(vector, prompt, names), embedding=vector)
        for scores, others in zip(found, self.plugged_in(pictures, prompts), strict=True):
            scores.update(others)
        for scores, seen in zip(found, self.senses.look(pictures, asked), strict=True) if asked else ():
            scores.update(seen)
        return found

    def of_embedding(self, vector: np.ndarray, prompt: str, labels: Sequence[str] | None) -> dict[str, Any]:
        """Return the CLIP scores of a picture from its float16 embedding (width,).

        The embedding is stored with the run; in float64 the same scores are computed from it again later.
        """
        if self.clip is None or self.yardstick is None:
            return {}
        image = vector.astype(np.float64)
        image /= np.linalg.norm(image)
        found: dict[str, Any] = self.yardstick(image, prompt) if prompt else {}
        if labels:
            from genkit.scoring.clip import probabilities

            cosines = self.clip.directions(labels).cpu().numpy().astype(np.float64) @ image
            found["p"] = dict(zip(labels, probabilities(self.clip, cosines).round(6).tolist(), strict=True))
        if self.head is not None:
            found["aesthetic"] = self.head(image)
        return found

    def plugged_in(self, pictures: torch.Tensor, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Return the scores of the plugins. A plugin that raises gets null for the whole batch, and a note, once."""
        found: list[dict[str, Any]] = [{} for _ in prompts]
        for plugin in self.scorers:
            columns: dict[str, Any] = {name: [None] * len(prompts) for name in plugin.names}
            try:
                columns = plugin(pictures.clone(), prompts)  # it may write on its copy
            except Exception as error:
                if plugin.name not in self._failed:
                    self._failed.add(plugin.name)
                    self.notes.append(f"scorer {plugin.name}: {type(error).__name__}: {reason(error)}; no such score")
            for name, column in columns.items():
                for scores, value in zip(found, column, strict=True):
                    scores[name] = value
        return found


def half(embedded: torch.Tensor) -> np.ndarray:
    """Return unit embeddings (B, width) as they are stored: float16, on the CPU."""
    return embedded.half().cpu().numpy()
