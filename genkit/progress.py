"""Progress on standard error: a bar on a terminal, plain lines elsewhere, nothing if quiet."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_SECONDS = 10.0  # between plain lines, where there is no terminal
PAUSE = 1.0  # seconds without an image, after which a new batch begins
BATCH_SECONDS = 3.0  # from the first image of a batch until all of it are surely counted


def printable(text: str) -> str:
    """Return `text` with control characters spelled out: a prompt must not move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_json(value: Any) -> str:
    """Return `value` as JSON that moves no cursor: other than spaces, what does not print is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


class Progress:
    """Counts images against a total that may grow. Use as a context manager; `message` prints a line above the bar."""

    def __init__(self, total: int, done: int = 0, *, quiet: bool = False) -> None:
        self.total, self.done, self.earlier, self.failed, self.passed = total, done, done, 0, 0
        self.quiet = quiet
        self.about = ""  # what else the bar says
        self.began = self.last_line = time.monotonic()
        self._latest = self._batch = self.began  # when the latest image came, and the first of its batch
        self._before: float | None = None  # images a second up to the end of the batch before
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} images/s  passed {task.fields[passed]}  failed {task.fields[failed]}"),
                TextColumn("{task.fields[about]}ETA {task.fields[eta]}  elapsed"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._bar.add_task(
                "", total=self.total, completed=self.done, rate="-", eta="-", passed=0, failed=0, about=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def rate(self) -> float | None:
        """Images a second of this start, as of the end of a batch; None before the first one is counted.

        Images drawn together are counted one after the other: the first of them alone would make it look slow.
        """
        if time.monotonic() - self._batch < BATCH_SECONDS or self.done == self.earlier:
            return self._before
        return self._so_far()

    def _so_far(self) -> float:
        return (self.done - self.earlier) / max(1e-9, self._latest - self.began)

    @property
    def left(self) -> str | None:
        """Time to go at this rate."""
        return None if self.rate is None else _clock((self.total - self.done) / max(self.rate, 1e-9))

    def advance(self, failed: int, passed: int, total: int, images: int = 1) -> None:
        """Count one more image, or several; `total` is what the run now expects."""
        now = time.monotonic()
        if now - self._latest > PAUSE or self.done == self.earlier:
            self._before = self._so_far() if self.done > self.earlier else None
            self._batch = now
        self.total, self.done, self._latest = total, self.done + images, now
        self.failed += failed
        self.passed += passed
        self.show()

    def show(self) -> None:
        """Bring the bar up to date; where there is no terminal, print a line now and then."""
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                total=self.total,
                completed=self.done,
                rate="-" if self.rate is None else f"{self.rate:.2f}",
                eta=self.left or "-",
                passed=self.passed,
                failed=self.failed,
                about=f"{self.about}  " if self.about else "",
            )
        elif time.monotonic() - self.last_line >= LINE_SECONDS:
            self.last_line = time.monotonic()
            done = f"{self.done} of {self.total} images"
            rate = "" if self.rate is None else f", {self.rate:.2f} a second, {self.left} to go"
            about = f", {self.about}" if self.about else ""
            self.message(f"{done}{rate}, {self.passed} passed, {self.failed} failed{about}")

    def message(self, text: str) -> None:
        """Print one line to standard error."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False, highlight=False)
        else:
            print(printable(text), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Return "1:02:03", or "2:03" below an hour."""
    minutes, rest = divmod(round(min(seconds, 360_000)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Steps:
    """Progress of work other than images: called with (done, total, what is being done). Use as a context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet, self.last_line = quiet, 0.0
        self._began: tuple[int, float] | None = None
        self._bar: Bar | None = None

    def __enter__(self) -> Steps:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (BarColumn(), TextColumn("{task.percentage:3.0f} %  {task.description}  ETA"))
            self._bar = Progress(*columns, TimeRemainingColumn(), TimeElapsedColumn(), console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        self._began = first, began = self._began or (done, now)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=text)
        elif not self.quiet and (done == total or now - self.last_line > LINE_SECONDS):
            self.last_line = now
            left = f", {_clock((total - done) * (now - began) / (done - first))} to go" if first < done < total else ""
            print(f"{100 * done // max(1, total):3d} %  {text}{left}", file=sys.stderr, flush=True)
