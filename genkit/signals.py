"""Ctrl-C and SIGTERM: finish what is being written and leave with their exit code."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from genkit.errors import EXIT_OK, EXIT_SIGINT, EXIT_SIGTERM


class Signals:
    """While open, the first SIGINT or SIGTERM sets `exit_code` and calls `then`; a second one leaves at once.

    then: runs between any two instructions of the main thread, so it may set a flag and no more. Raising there instead
    would leave locks of thread pools and of the terminal held. Only the main thread may catch signals: elsewhere this
    does nothing.
    """

    CODES: ClassVar = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.then, self.exit_code = then, EXIT_OK
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)

    def _handle(self, number: int, _frame: object) -> None:
        if self.exit_code:
            os._exit(self.exit_code)
        self.exit_code = self.CODES[signal.Signals(number)]
        self.then()


def leave_as_first_process() -> None:
    """Let SIGTERM end a command that is a container's first process, and does not catch it.

    The kernel sends that process no signal without a handler, so that `docker stop` would wait in vain.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(EXIT_SIGTERM))
