"""The two ways genkit refuses to go on, and the exit codes that scripts rely on."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

EXIT_OK, EXIT_SOME_FAILED, EXIT_INPUT, EXIT_HOST, EXIT_SIGINT, EXIT_SIGTERM = 0, 1, 2, 3, 130, 143


class InputError(ValueError):
    """Bad usage or input (exit code 2). One line of text: file, line, field, value and the nearest right one."""


class HostError(RuntimeError):
    """The environment does not allow the work: disk, lock or device (exit code 3). The text is one line."""


def nearest(word: object, known: Iterable[str]) -> str:
    """Return " (did you mean 'prompt'?)" for the known word closest to `word`, or "" when none is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shown(value: object, limit: int = 60) -> str:
    """Return `value` as it may stand in a one-line message: quoted, escaped, and cut to `limit` characters."""
    # reprlib stops at a few levels and items: a deep or huge value costs no more than its message.
    text = repr(value[: limit + 1]) if isinstance(value, str) else reprlib.repr(value)
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def reason(error: BaseException) -> str:
    """Return the first line of what another library's exception says, or its kind when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
