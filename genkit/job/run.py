"""Draw what is missing of a job into its folder, decide what is kept, and write the gallery."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from genkit.errors import EXIT_OK, EXIT_SOME_FAILED
from genkit.job.crew import Alone, Crew
from genkit.job.load import hashes
from genkit.job.plan import Job
from genkit.pages.gallery import write_gallery
from genkit.pages.outcome import LARGE, write_outcome
from genkit.phases import phase
from genkit.progress import Progress
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.destination import check_rights
from genkit.runs.look_again import unseen
from genkit.runs.records import read_config
from genkit.runs.run import Run
from genkit.sampling.draws import Draws
from genkit.selection.choose import read_known
from genkit.selection.decide import decide, hard_lines, write_selection
from genkit.selection.verdicts import Question, select


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


def run_job(job: Job, out: Path, crew: Crew | None = None) -> Summary:
    """Draw the missing images of the job in folder `out`, then decide what is kept, and write the gallery.

    crew: who loads networks and draws; by default this process.
    """
    began = time.monotonic()
    crew = crew or Alone(job)
    try:
        return _run_job(job, out, crew, began)
    finally:
        crew.close()


def _run_job(job: Job, out: Path, crew: Crew, began: float) -> Summary:
    check_rights(out)
    recorded = read_config(out)
    # The first start loads before it writes, so that it leaves nothing behind if the weights do not fit. A later one
    # scans the folder first: another process may hold the lock, or nothing may be left to do.
    with ThreadPoolExecutor(1, "genkit-hash") as pool:  # reads gigabytes, while the networks are built
        weights = pool.submit(hashes, job)
        if recorded is None:
            crew.load(recorded, job.rows)
        with phase("hash weights"):
            config = crew.config(recorded, weights.result())
    with Run.open(out, config, job.rows) as run:
        until = None if job.options.max_seconds is None else began + job.options.max_seconds
        draws = Draws(job.rows, run.done, job.options.max_total_images, until)
        stopped = EXIT_OK
        with Progress(draws.total, len(run.done), quiet=job.options.quiet) as progress:
            for line in (*job.notes, *run.notes):
                progress.message(line)
            changed = unseen(run)
            if draws.has_next() or changed or (run.stale and job.clip is not None):
                crew.load(recorded, [row for row in job.rows if _lacks(row, run)])
                stopped, draws = _work(job, run, crew, changed, draws, progress)
        results, kept, hard = conclude(job, run)
    for line in hard_lines(hard):
        progress.message(line)
    lacking = 0 if stopped else draws.lacking
    if lacking and draws.short:
        limit = f"--{draws.short.replace('_', '-')}"
        progress.message(
            f"{limit} is reached and {lacking} rows lack images; run the same command with a higher limit to continue"
        )
    failed = sum(r.status == "failed" for r in results)
    return Summary(
        folder=str(out),
        rows=len(job.rows),
        images=len(results) - failed,
        new=progress.done - progress.earlier - progress.failed,
        kept=kept,
        failed=failed,
        seconds=round(time.monotonic() - began, 2),
        exit_code=stopped or (EXIT_SOME_FAILED if failed or lacking else EXIT_OK),
        stopped=bool(stopped or lacking),
        hard_rows=len(hard),
        slots_full=None if crew.slots_full is None else round(crew.slots_full, 4),
    )


def conclude(job: Job, run: Run) -> tuple[list[Result], int, list[dict[str, Any]]]:
    """Write selection.json and the gallery of a run; return its results, how many are kept, and the hard rows."""
    results = list(run.results.values())
    if len(results) > LARGE:  # in columns, as `genkit filter` does it
        columns = select(run.folder, run.config, Question(picking=job.options.picking))
        write_outcome(run.folder, columns, run.config)
        return results, columns.count, columns.hard
    known = read_known(run.folder, run.config, results, job.options.picking, [row.rank_by for row in job.rows])
    selection = decide(job.rows, results, picking=job.options.picking, known=known)
    write_selection(run.folder, selection)
    write_gallery(run.folder, job.rows, results, selection, run.config)
    return results, selection["kept"], selection["hard"]


def _work(job: Job, run: Run, crew: Crew, changed: list[Result], draws: Draws, progress: Progress) -> tuple[int, Draws]:
    """Bring the scores up to date, then draw; return 0 or the exit code of a signal, and the draws as they ended."""
    for line in crew.masks(run.folder):
        progress.message(line)
    again = crew.rescore(run)
    if again:
        progress.message(f"{again} images scored again, from their embeddings: labels or other prompts changed")
    stopped = EXIT_OK
    if changed:
        progress.message(f"{len(changed)} images are looked at again: rows ask other words or questions about them")
        stopped = crew.look_again(run, changed, progress)
    if again or changed:
        draws = draws.anew(run.done)
    if not stopped and draws.has_next():
        stopped = crew.draw(run, draws, progress)
    return stopped, draws


def _lacks(row: Request, run: Run) -> bool:
    """Whether images of a row may be drawn."""
    return any((str(row.id), index) not in run.done for index in range(row.max_images or row.num_images))
