"""What draws and writes in one process, whether it is alone or one of many workers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from genkit.job.origin import origin_of
from genkit.job.plan import Job
from genkit.pictures.encoders import encoding
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.embeddings import Store
from genkit.runs.recorder import Recorder
from genkit.runs.writers import Writers
from genkit.sampling.draws import Draws
from genkit.scoring.gates import Expression, passes


class Drawing:
    """Networks that draw into a run folder. A context manager, whose end is that of the writing."""

    def __init__(
        self, job: Job, recorder: Recorder, binding: Mapping[str, Any], parts: tuple[Any, Any],
        worker: str | None = None, written: Callable[[Result], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """parts: as from `load`. binding: of run.json. worker, written: of one of many, see Store and Writers."""
        self.job, (self.generator, self.panel) = job, parts
        store = None if job.clip is None else Store(recorder.folder, job.clip.embedding_width, worker)
        form = encoding(job.options.format, job.options.quality)
        origin = None if job.options.no_metadata else origin_of(job, dict(binding), self.generator)
        self.writers = Writers(recorder, job.rows, form, origin, store, job.inversions.of_rows(), written)
        self.passed = passing(job.rows)
        self._said = 0

    def results(self, draws: Draws) -> Iterator[Result]:
        """Draw, and yield each result after it is handed to the writers. Raises HostError when the disk is full."""
        o = self.job.options
        stream = self.generator.stream(draws, scorer=self.panel, slots=o.batch_size, seed=o.seed)
        try:
            for result in stream:
                self.writers.put(result)
                yield result
        finally:
            stream.close()

    def notes(self) -> list[str]:
        """Return the notes since the last call."""
        said = list(self.generator.attention.notes)
        new, self._said = said[self._said :], len(said)
        return [*new, *self.panel.news()]

    def last_notes(self) -> list[str]:
        """Return the notes at the end of the drawing."""
        refiner, text = self.generator.refiner, getattr(self.generator, "text", None)
        lines = [*self.notes(), *self.generator.denoiser.notes, *([] if refiner is None else refiner.denoiser.notes)]
        cut = sorted(text.truncated if text is not None else ())
        return lines + [
            f"prompt longer than the text encoder reads, its end was cut off: {prompt[:80]}" for prompt in cut
        ]

    def __enter__(self) -> Drawing:
        return self

    def __exit__(self, *_: object) -> None:
        self.writers.close()


def passing(rows: Sequence[Request]) -> Callable[[Result], bool]:
    """Return a function that says whether an image is done and passes its row's gate."""
    gates = {r.id: Expression(r.gate, r.labels, names=None) for r in rows if r.gate is not None}
    return lambda result: result.status == "done" and passes(gates.get(result.id), result.scores)


@contextlib.contextmanager
def logged(say: Callable[[str], None]) -> Iterator[None]:
    """Hand what genkit logs to `say`, a line each, e.g. that memory ran out and how work was split."""
    handler, log = logging.Handler(), logging.getLogger("genkit")
    handler.emit = lambda record: say(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
