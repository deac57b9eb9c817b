"""Accuracy of a classification: a confusion table, and the confidence interval of the accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from genkit.progress import printable
from genkit.selection.intervals import wilson

WIDE = 10  # labels; a table with more columns does not fit a terminal
CUT = 14  # characters of a column's heading


class Confusion:
    """Counts of (true label, chosen label)."""

    def __init__(self, labels: Iterable[str]) -> None:
        self.labels = list(labels)
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, truth: str, chosen: str) -> None:
        """Count one picture."""
        self.counts[truth, chosen] += 1

    @property
    def of(self) -> int:
        """The number of pictures counted."""
        return self.counts.total()

    @property
    def right(self) -> int:
        """The number of correct predictions."""
        return sum(n for (truth, chosen), n in self.counts.items() if truth == chosen)

    def summary(self) -> dict[str, Any]:
        """Return accuracy, its 95 % interval, and the table as {true label: {predicted label: count}}."""
        table: dict[str, dict[str, int]] = {}
        for truth in self.labels:
            row = {chosen: self.counts[truth, chosen] for chosen in self.labels if self.counts[truth, chosen]}
            table |= {truth: row} if row else {}
        interval = [round(end, 6) for end in wilson(self.right, self.of)]
        accuracy = round(self.right / self.of, 6) if self.of else None
        return {
            "accuracy": accuracy, "interval": interval, "right": self.right, "of": self.of, "confusion": table,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """Return the table as text, true labels down and predicted ones across, and the accuracy."""
        names = {label: printable(label) for label in self.labels}
        truths = [t for t in self.labels if any(self.counts[t, c] for c in self.labels)]
        left = max([4, *(min(40, len(names[t])) for t in truths)])
        low, high = wilson(self.right, self.of)
        rows = self._matrix(truths, names, left) if len(self.labels) <= WIDE else self._digest(truths, names, left)
        share = f"{self.right / self.of:.1%}" if self.of else "unknown"
        return [*rows, f"accuracy {share} ({self.right} of {self.of}; 95 % interval {low:.1%} to {high:.1%})"]

    def _matrix(self, truths: list[str], names: dict[str, str], left: int) -> list[str]:
        heads = [names[c][:CUT] for c in self.labels]
        lines = ["  ".join([f"{'true':<{left}}", *heads, "right"])]
        for t in truths:
            cells = [f"{self.counts[t, c]:>{len(head)}}" for c, head in zip(self.labels, heads, strict=True)]
            lines.append("  ".join([f"{names[t][:left]:<{left}}", *cells, f"{self._share(t):5.0%}"]))
        return lines

    def _digest(self, truths: list[str], names: dict[str, str], left: int) -> list[str]:
        """Return a line for each true label: count, share correct, and the most frequent wrong predictions."""
        lines = [f"{'true':<{left}}  {'n':>6}  right  most often taken for"]
        for t in truths:
            wrong = Counter({c: self.counts[t, c] for c in self.labels if c != t and self.counts[t, c]}).most_common(3)
            others = ", ".join(f"{names[c][:40]} {n}" for c, n in wrong)
            lines.append(f"{names[t][:left]:<{left}}  {self._all(t):6}  {self._share(t):5.0%}  {others}".rstrip())
        return lines

    def _all(self, truth: str) -> int:
        return sum(self.counts[truth, c] for c in self.labels)

    def _share(self, truth: str) -> float:
        return self.counts[truth, truth] / self._all(truth)
