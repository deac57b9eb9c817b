"""Ctrl-C and SIGTERM: finish what is being written and leave with their exit code."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, ClassVar

from genkit.errors import EXIT_OK, EXIT_SIGINT, EXIT_SIGTERM


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived: finish what is being written and leave."""


class Signals:
    """While open and `armed`, the first SIGINT or SIGTERM sets `exit_code`; a second one leaves at once.

    interrupt: the first one raises Interrupted too. Only the main thread may catch signals: elsewhere this does
    nothing.
    """

    CODES: ClassVar = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}

    def __init__(self, *, interrupt: bool = False) -> None:
        self.interrupt, self.armed, self.exit_code = interrupt, not interrupt, EXIT_OK
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
        if self.armed:
            self.armed, self.exit_code = False, self.CODES[signal.Signals(number)]
            if self.interrupt:
                raise Interrupted
