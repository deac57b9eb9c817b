"""Child processes that tests send signals to.

    python -m tests.children 3,5 generate …

is `genkit generate …` that waits once 3 pictures were handed to the writers, and again after 5, until a signal comes;
SIGUSR1 lets it go on and does nothing else. However late a test is, it finds the command at work.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a command that SIGINT ends, also where whoever started the tests ignores it, as a shell does for `… &`.

    A child inherits an ignored signal, but not a handler: that becomes the default at its exec.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def holding(*pictures: int) -> list[str]:
    """Return the command `genkit` that waits for a signal after so many pictures."""
    return [sys.executable, "-m", "tests.children", ",".join(map(str, pictures))]


def main(pictures: Sequence[int], arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    from genkit import cli
    from genkit.runs.writers import Writers

    came: list[int] = []  # signals; an Event could not be set while the same thread waits for it
    set_handler, put, handed = signal.signal, Writers.put, itertools.count(1)

    def noting(number: Any, handler: Any) -> Any:
        def note(signalled: int, frame: Any) -> None:
            came.append(signalled)
            handler(signalled, frame)

        return set_handler(number, note if callable(handler) else handler)

    def hold(self: Writers, result: Any) -> None:
        put(self, result)
        if next(handed) in pictures:
            while not came:
                time.sleep(0.02)
            came.pop(0)

    signal.signal, Writers.put = noting, hold  # type: ignore[assignment, method-assign]
    signal.signal(signal.SIGUSR1, lambda *_: None)
    return cli.run(arguments)


if __name__ == "__main__":
    sys.exit(main([int(number) for number in sys.argv[1].split(",")], sys.argv[2:]))
