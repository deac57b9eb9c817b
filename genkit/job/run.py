"""Draw what is missing of a job into its folder, decide what is kept, and write the gallery."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from genkit.errors import EXIT_OK, EXIT_SOME_FAILED
from genkit.job.load import hashes, load, run_config
from genkit.job.masks import write_masks
from genkit.job.origin import origin_of
from genkit.job.plan import Job
from genkit.pages.gallery import write_gallery
from genkit.phases import phase
from genkit.pictures.encoders import encoding
from genkit.progress import Progress
from genkit.rows.request import Request
from genkit.runs.destination import check_rights
from genkit.runs.embeddings import Store
from genkit.runs.redetect import redetect, unseen
from genkit.runs.rescore import rescore
from genkit.runs.run import Run, read_config
from genkit.runs.writers import Writers
from genkit.sampling.draws import Draws
from genkit.scoring.gates import Expression, passes
from genkit.selection.choose import read_known
from genkit.selection.decide import decide, hard_lines, write_selection
from genkit.signals import Interrupted, Signals


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended. exit_code: of the command."""

    folder: str
    rows: int
    images: int
    new: int
    kept: int
    failed: int
    seconds: float
    exit_code: int
    stopped: bool = False
    hard_rows: int = 0  # rows that drew max_images, and of which fewer than `keep` pass
    slots_full: float | None = None  # share of the slots in use while there was more to draw

    @property
    def images_per_second(self) -> float:
        """New images over the whole wall time, loading included."""
        return self.new / self.seconds if self.seconds else 0.0


def run_job(job: Job, out: Path) -> Summary:
    """Draw the missing images of the job in folder `out`, then decide what is kept, and write the gallery."""
    began = time.monotonic()
    check_rights(out)
    recorded = read_config(out)
    # The first start loads before it writes, so that it leaves nothing behind if the weights do not fit. A later one
    # scans the folder first: another process may hold the lock, or nothing may be left to do.
    with ThreadPoolExecutor(1, "genkit-hash") as pool:  # reads gigabytes, while the networks are built
        weights = pool.submit(hashes, job)
        loaded = load(job, recorded, job.rows) if recorded is None else None
        with phase("hash weights"):
            config = run_config(job, loaded, recorded, weights.result())
    with Run.open(out, config, job.rows) as run:
        until = None if job.options.max_seconds is None else began + job.options.max_seconds
        draws = Draws(job.rows, run.done, job.options.max_total_images, until)
        stopped = EXIT_OK
        with Progress(draws.total, len(run.done), quiet=job.options.quiet) as progress:
            for line in (*job.notes, *run.notes):
                progress.message(line)
            changed = unseen(run)
            if draws.has_next() or changed or (run.stale and job.clip is not None):
                loaded = loaded or load(job, recorded, [row for row in job.rows if _lacks(row, run)])
                for line in write_masks(out, job.rows):
                    progress.message(line)
                again = rescore(run, loaded[1])
                if again:
                    progress.message(
                        f"{again} images scored again, from their embeddings: labels or other prompts changed"
                    )
                    draws = Draws(job.rows, run.done, job.options.max_total_images, until)
                stopped = _look_again(run, loaded[1], changed, progress) if changed else EXIT_OK
                if changed and not stopped:
                    draws = Draws(job.rows, run.done, job.options.max_total_images, until)
                if not stopped and draws.has_next():
                    stopped = _draw(job, run, draws, progress, loaded)
        results = list(run.results.values())
        known = read_known(out, run.config, results, job.options.picking, [row.rank_by for row in job.rows])
        selection = decide(job.rows, results, picking=job.options.picking, known=known)
        write_selection(out, selection)
        write_gallery(out, job.rows, results, selection, run.config)
    for line in hard_lines(selection):
        progress.message(line)
    lacking = 0 if stopped else draws.lacking
    if lacking and draws.short:
        limit = f"--{draws.short.replace('_', '-')}"
        progress.message(f"{limit} is reached and {lacking} rows lack images; the same command, with more, goes on")
    failed = sum(r.status == "failed" for r in results)
    return Summary(
        folder=str(out),
        rows=len(job.rows),
        images=len(results) - failed,
        new=progress.done - progress.earlier - progress.failed,
        kept=sum(image["kept"] for image in selection["images"].values()),
        failed=failed,
        seconds=round(time.monotonic() - began, 2),
        exit_code=stopped or (EXIT_SOME_FAILED if failed or lacking else EXIT_OK),
        stopped=bool(stopped or lacking),
        hard_rows=len(selection["hard"]),
        slots_full=None if draws.slots_full is None else round(draws.slots_full, 4),
    )


def _look_again(run: Run, panel: Any, changed: list[Any], progress: Progress) -> int:
    """Look for the rows' new words in finished images; return 0, or the exit code of the signal that stopped it."""
    progress.message(f"{len(changed)} images are looked at again: the words to detect in them changed")
    with Signals() as signals:
        for _ in redetect(run, panel, changed):
            if signals.exit_code:
                progress.message("stopped while looking at images again; the same command goes on from here")
                break
    for note in panel.news():
        progress.message(note)
    return signals.exit_code


def _lacks(row: Request, run: Run) -> bool:
    """Whether images of a row may be drawn."""
    return any((str(row.id), index) not in run.done for index in range(row.max_images or row.num_images))


def _draw(job: Job, run: Run, draws: Draws, progress: Progress, parts: tuple[Any, Any]) -> int:
    """Draw the missing images; return 0, or the exit code of the signal that stopped it."""
    generator, scorer = parts
    note = generator.budget.line(generator.device, job.options.memory)
    if note:
        progress.message(note)
    store = None if job.clip is None else Store(run.folder, job.clip.embedding_width)
    form = encoding(job.options.format, job.options.quality)
    origin = None if job.options.no_metadata else origin_of(job, run.config["binding"], generator)
    writers = Writers(run, job.rows, form, origin, store, job.inversions.of_rows())
    gates = {r.id: Expression(r.gate, r.labels, names=None) for r in job.rows if r.gate is not None}
    stream = generator.stream(draws, scorer=scorer, slots=job.options.batch_size, seed=job.options.seed)
    said = list(generator.attention.notes)
    for note in said:
        progress.message(note)
    with Signals(interrupt=True) as signals, _notes(progress):
        try:
            signals.armed = True
            for result in stream:
                writers.put(result)
                passed = result.status == "done" and passes(gates.get(result.id), result.scores)
                progress.advance(result.status == "failed", passed, draws.total)
                if result.status == "failed":
                    progress.message(f"row {result.id}, image {result.index}: failed: {result.reason}")
                for note in scorer.news():
                    progress.message(note)
            signals.armed = False
        except Interrupted:
            progress.message("stopping: writing what is finished")
        finally:
            stream.close()
            writers.close()
    stopped = signals.exit_code
    if stopped:
        progress.message(
            f"stopped with {len(run.done)} of {progress.total} images saved; the same command goes on from here"
        )
    for note in [*generator.attention.notes[len(said) :], *_graphs(generator), *scorer.news()]:
        progress.message(note)
    text = getattr(generator, "text", None)
    for prompt in sorted(text.truncated if text is not None else ()):
        progress.message(f"prompt longer than the model reads, its end had no say: {prompt[:80]}")
    return stopped


def _graphs(generator: Any) -> list[str]:
    """Return what both networks' denoisers have to say."""
    refiner = generator.refiner
    return [*generator.denoiser.notes, *([] if refiner is None else refiner.denoiser.notes)]


@contextlib.contextmanager
def _notes(progress: Progress) -> Iterator[None]:
    """Show what genkit logs as lines of the progress, e.g. that memory ran out and how work was split."""
    handler, log = logging.Handler(), logging.getLogger("genkit")
    handler.emit = lambda record: progress.message(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
