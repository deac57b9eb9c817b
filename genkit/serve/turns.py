"""Several models on one device: whose turn it is, and which of them is in memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol

PATIENCE = 10.0  # seconds that a model draws on while another one waits, so that loading is not most of the work


class Drawer(Protocol):
    """As much of a ServingEngine as takes turns. line: its Line. loaded: whether it is in memory."""

    line: Any
    loaded: bool

    def unload(self) -> None:
        """Leave memory."""


class Turns:
    """Engines draw one at a time, in the order in which they were asked for; at most `loaded` of them are in memory.

    The one that drew least recently leaves. One that has nothing to draw gives way at once, another one after
    `patience` seconds, with what is in flight finished and the rest of its rows kept.
    """

    def __init__(self, loaded: int = 1, patience: float = PATIENCE) -> None:
        self.loaded, self.patience, self.closed = loaded, patience, False
        self._came = threading.Condition()
        self._waiting: list[Drawer] = []
        self._holder: Drawer | None = None
        self._since = 0.0  # when the holder began to draw, or the first of the others came
        self._recent: OrderedDict[Drawer, None] = OrderedDict()  # in memory, the latest last

    def ask(self, engine: Drawer) -> None:
        """Put an engine that has something to draw in the line, unless it draws or waits."""
        with self._came:
            if engine in self._waiting or engine is self._holder:
                return
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting.append(engine)
            holder = self._holder
            self._came.notify_all()
        if holder is not None:
            holder.line.nudge()

    def gives_way(self, engine: Drawer, busy: bool) -> bool:
        """Whether the one whose turn it is has to end it. busy: whether it has something to draw."""
        with self._came:
            if engine is not self._holder or not self._waiting:
                return False
            return not busy or time.monotonic() - self._since >= self.patience

    @contextlib.contextmanager
    def turn(self, engine: Drawer) -> Iterator[bool]:
        """Wait until it is the engine's turn, with room in memory for it; False where the server ends instead."""
        with self._came:
            self._came.wait_for(lambda: self.closed or (self._holder is None and self._waiting[:1] == [engine]))
            if self.closed:
                leaving = None
            else:
                self._waiting.pop(0)
                self._holder = engine
                self._recent[engine] = None
                self._recent.move_to_end(engine)
                leaving = [other for other in list(self._recent)[: -self.loaded] if other is not engine]
                for other in leaving:
                    del self._recent[other]
        if leaving is None:
            yield False
            return
        try:
            for other in leaving:
                other.unload()
            yield True
        finally:
            with self._came:
                self._holder = None
                if not engine.loaded:  # as loading failed
                    del self._recent[engine]
                self._came.notify_all()

    def begin(self) -> None:
        """Count patience from now on: the one whose turn it is has loaded, and draws something before it leaves."""
        with self._came:
            self._since = time.monotonic()

    def close(self) -> None:
        """Let those that wait end."""
        with self._came:
            self.closed = True
            self._came.notify_all()
