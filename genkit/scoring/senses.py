"""The detector, classifier and captioner of a run, and their boxes, classes and answers for its pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from genkit.scoring.said import stored_classes

if TYPE_CHECKING:
    import torch

NAMES = ("detector", "classifier", "captioner")
_BROKEN = {  # messages for models whose outputs are NaN
    "detector": "scores are no numbers; such pictures have no boxes",
    "classifier": "scores are no numbers; such pictures have no classes",
    "captioner": "scores are no numbers; such pictures have no answers",
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """The requests to vision models for a picture: words to detect, questions, and whether to classify it."""

    words: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    classify: bool = True

    def __bool__(self) -> bool:
        return bool(self.words or self.questions or self.classify)


class Senses:
    """The detector, classifier and captioner of a run (classes of genkit.vision), each of which may be None.

    notes: messages for the user that have not been shown yet.
    """

    def __init__(self, detector: Any = None, classifier: Any = None, captioner: Any = None) -> None:
        self.detector, self.classifier, self.captioner = detector, classifier, captioner
        self.notes: list[str] = []
        self._said: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the models that the run has."""
        return tuple(name for name in NAMES if getattr(self, name) is not None)

    @property
    def labels(self) -> Sequence[str] | None:
        """The classifier's labels, if there is one."""
        return None if self.classifier is None else self.classifier.labels

    def look(
        self, pictures: Sequence[torch.Tensor] | torch.Tensor, asked: Sequence[Asked]
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Return for each uint8 picture (3, H, W) "boxes" and "detected", "classes", "answers", as far as requested.

        Their forms are in boxes.py and said.py. A NaN output becomes null, which passes no gate, with one note a model.
        """
        found: list[dict[str, Any]] = [{} for _ in asked]
        if self.detector is not None:
            self._detect(pictures, asked, found)
        if self.classifier is not None:
            self._classify(pictures, asked, found)
        if self.captioner is not None:
            self._ask(pictures, asked, found)
        return found

    def _detect(self, pictures: Any, asked: Sequence[Asked], found: list[dict[str, Any]]) -> None:
        places = [n for n, one in enumerate(asked) if one.words]
        some = [pictures[n] for n in places]
        for n, seen in zip(places, self.detector.see(some, [asked[n].words for n in places]), strict=True):
            height, width = pictures[n].shape[-2:]
            found[n]["boxes"] = None if seen.broken else [box.to_json() for box in seen.boxes]
            found[n]["detected"] = {
                "words": list(asked[n].words), "size": [width, height], "threshold": self.detector.threshold,
                "floor": seen.floor,
            }  # fmt: skip
            self._note("detector", seen.broken)

    def _classify(self, pictures: Any, asked: Sequence[Asked], found: list[dict[str, Any]]) -> None:
        for places, batch in _alike(pictures, [n for n, one in enumerate(asked) if one.classify]):
            for n, odds in zip(places, self.classifier(batch).tolist(), strict=True):
                found[n]["classes"] = stored_classes(self.classifier.labels, odds)
                self._note("classifier", found[n]["classes"] is None)

    def _ask(self, pictures: Any, asked: Sequence[Asked], found: list[dict[str, Any]]) -> None:
        for places, batch in _alike(pictures, [n for n, one in enumerate(asked) if one.questions]):
            answers = self.captioner.answers(batch, [asked[n].questions for n in places])
            for n, texts in zip(places, answers, strict=True):
                found[n]["answers"] = dict(zip(asked[n].questions, texts, strict=True))
                self._note("captioner", None in texts)

    def _note(self, name: str, broken: bool) -> None:
        if broken and name not in self._said:
            self._said.add(name)
            self.notes.append(f"{name} {getattr(self, name).name}: {_BROKEN[name]}")


def _alike(pictures: Any, places: Sequence[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield batches of pictures of one shape: their indices, and a tensor (B, 3, H, W)."""
    import torch

    groups: dict[tuple[int, ...], list[int]] = {}
    for n in places:
        groups.setdefault(tuple(pictures[n].shape), []).append(n)
    for some in groups.values():
        yield some, torch.stack([pictures[n] for n in some])
