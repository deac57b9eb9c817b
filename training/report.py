"""What a training run looks like: a line at its end, and index.html with losses and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def described(outcome: Any, folder: Path) -> str:
    """Return the end of a run for people to read."""
    lines = [f"step {outcome.step}: {outcome.reason}; {outcome.rate:.1f} images/s"]
    figures = [f"{k} {v:.4g}" for k, v in outcome.scores.items() if isinstance(v, float)]
    lines += [f"best: step {outcome.scores['step']}: {', '.join(figures)}"] if figures else []
    lines += [f"the same command goes on from step {outcome.step}"] if outcome.exit_code else [f"model in {folder}"]
    return "\n".join(lines)
