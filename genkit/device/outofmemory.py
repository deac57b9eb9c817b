"""What to do when memory runs out: let go of what the failed call had made, then try less, and remember how much."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

log = logging.getLogger("genkit")
# What lack of memory is called where it is no torch.OutOfMemoryError; the last two are oneDNN's.
_WORDS = (
    "can't allocate memory", "not enough memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED", "could not create a memory", "could not create a primitive",
)  # fmt: skip


def attempt(call: Callable[[], T]) -> T | None:
    """Return call(), or None when memory ran out: by then the error, its frames and all that they held are gone.

    To try again within `except` would be to try beside the tensors of the failed call, which the traceback keeps.
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
    """Give what nobody holds back to the device."""
    if torch.cuda.is_initialized():
        gc.collect()  # tensors in reference cycles
        torch.cuda.empty_cache()


def in_parts(count: int, most: int, call: Callable[[slice], T], what: str) -> tuple[list[T], int]:
    """Return `call` over slices of at most `most` of `count` things, and the size that fitted in the end.

    The size halves whenever memory runs out. what: the things, for the line that says so. Raises OutOfMemoryError when
    not even one of them fits.
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
