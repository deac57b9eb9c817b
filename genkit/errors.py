"""The two exceptions that genkit raises for its users, and the exit codes."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

EXIT_OK, EXIT_SOME_FAILED, EXIT_INPUT, EXIT_HOST, EXIT_SIGINT, EXIT_SIGTERM = 0, 1, 2, 3, 130, 143


class InputError(ValueError):
    """Bad usage or input (exit code 2). One line of text: file, line, field, value and the nearest right one."""


class HostError(RuntimeError):
    """The environment does not allow the work: disk, lock or device (exit code 3). One line of text."""


def nearest(word: object, known: Iterable[str]) -> str:
    """Return " (did you mean 'prompt'?)" for the known word closest to `word`, or "" when none is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shown(value: object, limit: int = 60) -> str:
    """Return `value` for a one-line message: quoted, escaped, and cut to `limit` characters."""
    # reprlib limits levels and items, so that a deep or huge value is cheap.
    text = repr(value[: limit + 1]) if isinstance(value, str) else reprlib.repr(value)
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def reason(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
