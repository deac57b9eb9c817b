"""The report of the data set doctor: facts and findings, as lines of text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from genkit.datasets.duplicates import Fingerprint
from genkit.datasets.example import Example
from genkit.progress import printable

NAMED = 3  # pictures named in a line


@dataclasses.dataclass(frozen=True)
class Finding:
    """An "error" or a "warning" of one line, and the pictures concerned, as groups of indices."""

    level: str
    text: str
    groups: Sequence[Sequence[int]] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """The doctor's report on a data set: facts by name, and findings, errors first.

    pictures: the training set, `train` pictures, then the validation set. buckets: indices of the pictures that are
    trained at each size (width, height).
    """

    pictures: Sequence[Example]
    fingerprints: Sequence[Fingerprint]
    train: int
    buckets: Mapping[tuple[int, int], Sequence[int]]
    facts: dict[str, Any]
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        """Findings that must be fixed before training."""
        return [f for f in self.findings if f.level == "error"]

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        width = max(map(len, self.facts))
        told = [f"{name:<{width}}  {value}" for name, value in self.facts.items()]
        told += [f"{f.level:<{width}}  {f.text}" for f in self.findings]
        if any(len(f.groups) > NAMED for f in self.findings):
            told.append(f"{'':<{width}}  --json names all of them, -o PAGE.html shows them")
        return [printable(line) for line in told] + ([] if self.findings else ["nothing is wrong"])

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        found = [
            {"level": f.level, "text": f.text, "pictures": [[self.pictures[i].key for i in g] for g in f.groups]}
            for f in self.findings
        ]
        counts = {"pictures": len(self.pictures), "held_out": len(self.pictures) - self.train}
        buckets = {f"{w}x{h}": len(members) for (w, h), members in self.buckets.items()}
        return {**counts, "buckets": buckets, "facts": self.facts, "findings": found}
