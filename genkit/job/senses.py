"""The vision models that look at a run's pictures: checked for all rows, bound to the run, loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError, shown
from genkit.options import Options
from genkit.phases import phase
from genkit.rows.detecting import used_by
from genkit.rows.request import Request
from genkit.scoring.senses import NAMES, Senses
from genkit.vision.classes import CLASSES
from genkit.vision.models import VisionInfo, inspect_vision
from genkit.vision.words import Lengths, check_lengths

if TYPE_CHECKING:
    import torch


def find_senses(options: Options) -> dict[str, VisionInfo]:
    """Return the models of --detector, --classifier and --captioner that are given, by those names.

    Raises InputError for a folder that is none.
    """
    found = {}
    for name in NAMES:
        stated = getattr(options, name)
        if stated is not None:
            found[name] = inspect_vision(stated, (name,), f"--{name}")
    captioner = found.get("captioner")
    if captioner is not None and not CLASSES[captioner.kind].answers:
        able = " or ".join(kind for kind, about in CLASSES.items() if about.answers)
        raise InputError(f"--captioner: {captioner.name} captions, and answers no questions: take a {able}")
    return found


class Checks:
    """Checks what rows ask of vision models; texts are tokenized once."""

    def __init__(self, senses: Mapping[str, VisionInfo]) -> None:
        self.senses = senses
        self._lengths = None if "detector" not in senses else Lengths(senses["detector"])
        self._questions = None if "captioner" not in senses else Lengths(senses["captioner"])
        self._asked: set[str] = set()

    @property
    def labels(self) -> Sequence[str] | None:
        """The classifier's labels, if there is one."""
        return None if "classifier" not in self.senses else self.senses["classifier"].labels

    def check(self, row: Request) -> None:
        """Raise InputError for what nothing looks for or answers, and where pruning would ask of unfinished pictures.

        Also for words and questions that are longer than a model reads.
        """
        if self._lengths is not None:
            self._lengths.check(row.sought)
        elif row.detect is not None:
            raise InputError(f"detect: {shown(row.detect[0])} needs a detector, and there is none: give --detector")
        if "captioner" in self.senses:
            new = [question for question in row.questions if question not in self._asked]
            for question in new:
                field = "ask" if question in (row.ask or ()) else "answer"
                check_lengths(self.senses["captioner"], [question], field, self._questions)
            self._asked.update(new)
        elif row.ask is not None:
            raise InputError(
                f"ask: {shown(row.ask[0])} needs a model that answers, and there is none: give --captioner"
            )
        if row.prune is not None and row.rank_by is not None:
            used = used_by(row.rank_by, None if row.labels is None else tuple(row.labels))
            what = "no boxes are looked for" if used.words else "nothing is classified, and nothing asked"
            if used.senses:
                raise InputError(f"prune: ranks unfinished pictures, in which {what}: rank_by cannot read them")


def idle_notes(senses: Mapping[str, VisionInfo], rows: Sequence[Request]) -> list[str]:
    """Return notes on models that no row uses."""
    asked = {"detector": any(row.sought for row in rows), "captioner": any(row.questions for row in rows)}
    field = {"detector": "detect", "captioner": "ask"}
    return [
        f"--{name}: no row asks it anything: see the field `{field[name]}`"
        for name, used in asked.items()
        if name in senses and not used
    ]


def load_senses(
    infos: Mapping[str, VisionInfo], rows: Sequence[Request], device: torch.device, dtype: Any,
    in_ram: Collection[str] = (),
) -> Senses:  # fmt: skip
    """Load the models of a run onto its device, or into RAM. Raises InputError and HostError as `load_model` does.

    in_ram: those that come to the device only for their work; each one's `hold` has to bring it.
    """
    senses = Senses()
    for name, info in infos.items():
        from genkit.vision.models import load_model

        with phase(f"{name}: read weights"):
            sense = _class(name)(load_model(info, (name,), "cpu" if name in in_ram else device, dtype, name in in_ram))
        sense.device = device
        setattr(senses, name, sense)
    if senses.detector is not None:
        senses.detector.check_words(word for row in rows for word in row.sought)
    if senses.captioner is not None:
        senses.captioner.check_questions(question for row in rows for question in row.questions)
    return senses


def _class(name: str) -> Any:
    from genkit.vision.captioner import Captioner
    from genkit.vision.classifier import Classifier
    from genkit.vision.detector import Detector

    return {"detector": Detector, "classifier": Classifier, "captioner": Captioner}[name]
