"""Out of memory: free what the failed call allocated, retry with less, and remember the size that fits."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

log = logging.getLogger("genkit")
# Messages of other exceptions that mean out of memory; the last two are oneDNN's.
_WORDS = (
    "can't allocate memory", "not enough memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED", "could not create a memory", "could not create a primitive",
)  # fmt: skip


def attempt(call: Callable[[], T]) -> T | None:
    """Return call(), or None if memory ran out; the error and the tensors that its traceback keeps are freed by then.

    A retry inside `except` would run while the traceback still holds the tensors of the failed call.
    """
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(words in str(error) for words in _WORDS):
            raise
    release()
    return None


def release() -> None:
    """Return unused cached memory to the device."""
    if torch.cuda.is_initialized():
        gc.collect()  # tensors in reference cycles
        torch.cuda.empty_cache()


def in_parts(count: int, most: int, call: Callable[[slice], T], what: str) -> tuple[list[T], int]:
    """Call `call` on slices that cover range(count), each at most `most` long; return the results and the last size.

    The size is halved whenever memory runs out. what: the items, for the log message. Raises OutOfMemoryError if not
    even one item fits.
    """
    found: list[T] = []
    done = 0
    while done < count:
        size = min(most, count - done)
        got = attempt(lambda part=slice(done, done + size): call(part))  # type: ignore[misc]
        if got is not None:
            found.append(got)
            done += size
        elif size == 1:
            raise torch.OutOfMemoryError(f"out of memory at one of the {what}")
        else:
            most = size // 2
            log.warning("out of memory at %d %s: from now on at most %d at once", size, what, most)
    return found, most
