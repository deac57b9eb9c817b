"""SHA-256 of large files, found once by the processes of a machine that start at about the same time.

Eight workers of a machine that load one model would read its gigabytes eight times over, in the same seconds. What the
first one finds is kept in the cache folder for an hour, and only as long as the file is untouched. A later start reads
the file again, so that a disk that has lost bits is found.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genkit.device.devices import cache_folder

LARGE = 2**26  # bytes; smaller files are hashed faster than looked up
FRESH = 3600.0  # seconds
SETTLED = 2.0  # seconds since a file's last change: a second change within the same tick of its clock would be hidden


def shared(path: Path, kind: str, find: Callable[[], str]) -> str:
    """Return the hash that `find()` computes, or that a process of this machine computed in the last hour.

    kind: which hash of the file it is. Processes that ask at once wait for the first. Where the cache folder
    cannot be written or locked, each computes the hash itself.
    """
    if os.stat(path).st_size < LARGE:
        return find()
    with contextlib.ExitStack() as stack:
        try:
            entry = cache_folder() / "hashes" / _name(path, kind)
            entry.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(entry, "a+b", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX)  # also let go by a process that is killed
        except (OSError, RuntimeError):  # RuntimeError: there is no home
            return find()
        if (known := _known(file, _identity(path))) is not None:
            return known
        before, began = _identity(path), time.time()
        digest = find()
        if _identity(path) == before and began - before[-1] / 1e9 > SETTLED:
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(json.dumps({"file": before, "sha256": digest, "found": time.time()}).encode())
        return digest


def _name(path: Path, kind: str) -> str:
    """Return the name of an entry: by the host, too, as nodes may share a home and not their disks."""
    key = json.dumps([platform.node(), str(path.absolute()), kind])
    return hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()[:32]


def _identity(path: Path) -> list[int]:
    """Return values that differ once a file was replaced or changed; ctime, unlike mtime, cannot be set by users."""
    s = os.stat(path)
    return [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]


def _known(file: Any, identity: list[int]) -> str | None:
    """Return the hash in an open entry; None if it is of another file, too old, or incomplete."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        fresh = 0 <= time.time() - found["found"] < FRESH
        return str(found["sha256"]) if found["file"] == identity and fresh else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
