"""Child processes that tests send Ctrl-C to."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

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
