"""Who does the work of a job: the networks in this process, or, with the same methods, many workers (cluster/)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from genkit.job.drawing import Drawing, logged
from genkit.job.load import load, run_config
from genkit.job.masks import write_masks
from genkit.job.plan import Job
from genkit.progress import Progress
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.look_again import look_again
from genkit.runs.rescore import rescore
from genkit.runs.run import Run
from genkit.sampling.draws import Draws
from genkit.signals import Signals


class Crew(Protocol):
    """The work that `run_job` delegates: loading networks, scoring, drawing."""

    def load(self, recorded: dict[str, Any] | None, rows: Sequence[Request]) -> None:
        """Load the networks, unless they are loaded. rows: those whose masks in words have to be found."""

    def config(self, recorded: dict[str, Any] | None, weights: dict[str, dict[str, str]]) -> dict[str, Any]:
        """Return run.json; see `run_config`."""

    def masks(self, folder: Path) -> list[str]:
        """Write the masks that were found; return notes on empty ones."""

    def rescore(self, run: Run) -> int:
        """Score images again from their embeddings; return how many changed."""

    def look_again(self, run: Run, changed: list[Result], progress: Progress) -> int:
        """Look for what rows newly ask of finished images; return 0, or the exit code of the signal that stopped it."""

    def draw(self, run: Run, draws: Draws, progress: Progress) -> int:
        """Draw the missing images; return 0, or the exit code of the signal that stopped it."""

    def close(self) -> None:
        """End the workers, if there are any."""

    @property
    def slots_full(self) -> float | None:
        """Share of the slots in use while there was more to draw."""


class Alone:
    """This process, with its own networks."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.parts: tuple[Any, Any] | None = None
        self.slots_full: float | None = None

    def load(self, recorded: dict[str, Any] | None, rows: Sequence[Request]) -> None:
        self.parts = self.parts or load(self.job, recorded, rows)

    def config(self, recorded: dict[str, Any] | None, weights: dict[str, dict[str, str]]) -> dict[str, Any]:
        return run_config(self.job, self.parts, recorded, weights)

    def masks(self, folder: Path) -> list[str]:
        return write_masks(folder, self.job.rows)

    def rescore(self, run: Run) -> int:
        assert self.parts is not None
        return rescore(run, self.parts[1])

    def look_again(self, run: Run, changed: list[Result], progress: Progress) -> int:
        assert self.parts is not None
        with Signals() as signals:
            for _ in look_again(run, self.parts[1], changed):
                if signals.exit_code:
                    progress.message("stopped while looking at images again; run the same command again to continue")
                    break
        for note in self.parts[1].news():
            progress.message(note)
        return signals.exit_code

    def draw(self, run: Run, draws: Draws, progress: Progress) -> int:
        assert self.parts is not None
        generator = self.parts[0]
        note = generator.budget.line(generator.device, self.job.options.memory)
        if note:
            progress.message(note)
        drawing = Drawing(self.job, run, run.config["binding"], self.parts)
        for note in drawing.notes():
            progress.message(note)
        with Signals(draws.stop) as signals, logged(progress.message):
            results = drawing.results(draws)
            try:
                for result in results:
                    progress.advance(result.status == "failed", drawing.passed(result), draws.total)
                    if result.status == "failed":
                        progress.message(f"row {result.id}, image {result.index}: failed: {result.reason}")
                    for note in drawing.notes():
                        progress.message(note)
                if signals.exit_code:
                    progress.message("stopping: writing what is finished")
            finally:
                results.close()  # type: ignore[attr-defined]
                drawing.writers.close()
                self.slots_full = draws.slots_full
        if signals.exit_code:
            saved = f"{len(run.done)} of {progress.total} images saved"
            progress.message(f"stopped with {saved}; run the same command again to continue")
        for note in drawing.last_notes():
            progress.message(note)
        return signals.exit_code

    def close(self) -> None:
        pass
