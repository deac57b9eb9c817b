"""What the pages of `genkit label` ask about, one thing after the other, and the answers so far."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from genkit.rows.result import Result
from genkit.selection.votes import UNDO

LONG = 2000  # characters of a prompt that are shown


class Desk(ABC):
    """Things that wait for an answer, by number. Threads share it.

    page: the name of the template. asks: what a thing is called in answers and states. words: the answers. keys: how to
    give them. files: the pictures, which the page names by their place here.
    """

    page: ClassVar[str]
    asks: ClassVar[str]
    words: ClassVar[tuple[str, ...]]
    keys: ClassVar[str]

    def __init__(self, files: Sequence[Path], count: int, answered: Iterable[int]) -> None:
        """answered: those of the `count` things that have an answer, the latest last."""
        self.files, self._lock = files, threading.Lock()
        self._history = [*answered]
        known = {*self._history}
        self._waiting = deque(k for k in range(count) if k not in known)

    def take(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Take {asks: number, "vote": one of `words`, "later" (the end of the queue) or "undo" (the last answer)}.

        A second answer to the same question, as of a key held down, changes nothing. Returns the state. Raises
        ValueError, TypeError or KeyError for what is no answer, HostError if it cannot be stored.
        """
        number, word = answer[self.asks], answer["vote"]
        if word not in (*self.words, "later", UNDO) or type(number) is not int:
            raise ValueError("not a vote")
        with self._lock:
            if word in ("later", UNDO) and number in self._waiting:
                self._put_off(number, answer)
            if word == UNDO and self._history:
                self._undo(self._history[-1])
                self._waiting.appendleft(self._history.pop())
            elif word == "later" and number in self._waiting:
                self._waiting.remove(number)
                self._waiting.append(number)
            elif word in self.words and number in self._waiting:
                self._store(number, answer)
                self._waiting.remove(number)
                self._history.append(number)
            return self._state()

    def state(self) -> dict[str, Any]:
        """Return what the page shows."""
        with self._lock:
            return self._state()

    @abstractmethod
    def _store(self, number: int, answer: Mapping[str, Any]) -> None:
        """Write an answer to the disk."""

    @abstractmethod
    def _undo(self, number: int) -> None:
        """Write to the disk that an answer is taken back."""

    def _put_off(self, number: int, answer: Mapping[str, Any]) -> None:  # noqa: B027 (not all have anything to remember)
        """Remember what an answer says so far, of something that is asked about again."""

    def _state(self) -> dict[str, Any]:
        return {"done": len(self._history), "left": len(self._waiting), "undo": bool(self._history)}


def place_of(seed: int, name: str) -> bytes:
    """Return what to sort by for a random order; each name's is its own: what comes later goes in between."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def prompt_of(r: Result) -> str:
    """Return a prompt as the page shows it."""
    return r.prompt if len(r.prompt) <= LONG else r.prompt[:LONG] + "…"
