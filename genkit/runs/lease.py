"""One process at a time for a run folder: a lock of the file system, or, on storage, an object that is kept fresh.

On storage the holder puts `.lock-N`, if there is none of that name, and changes it every BEAT seconds. A process that
finds it unchanged for STALE seconds, by its own clock, puts `.lock-N+1`, which only one process can. A holder that was
suspended finds the higher number when it wakes up, and stops. The lock of a process of the same machine that has ended
is taken over at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from genkit.durable import lock_folder
from genkit.errors import HostError
from genkit.storage import StoragePath

BEAT, STALE = 5.0, 30.0  # seconds
_log = logging.getLogger("genkit")
_NAME = re.compile(r"\.lock-([0-9]{6})")


def hold(folder: Path) -> Hold | Lease:
    """Take a folder for this process. Raises HostError when another one has it."""
    return Lease(folder) if isinstance(folder, StoragePath) else Hold(folder)


class Hold:
    """A lock on a local folder, which ends with the process."""

    def __init__(self, folder: Path) -> None:
        self._handle = lock_folder(folder)

    def close(self) -> None:
        """Let others have the folder."""
        os.close(self._handle)


class Lease:
    """A folder on storage, held until `close`, or until others saw no sign of this process for STALE seconds."""

    def __init__(self, folder: Path) -> None:
        """Take it. Raises HostError when another process has it, which takes up to STALE seconds to find."""
        assert isinstance(folder, StoragePath)
        self.folder = folder
        self._own = {
            "process": os.getpid(), "host": platform.node(), "machine": _machine(), "began": _began(os.getpid()),
            "token": secrets.token_hex(8),
        }  # fmt: skip
        self._lost: str | None = None
        self._ended = threading.Event()
        number = self._after_others()
        self.path = folder / f".lock-{number:06d}"
        if not self.path.put_new(self._content(0)):
            raise HostError(f"{folder}: in use by another genkit, which was faster; one at a time")
        self._fresh = time.monotonic()  # when the lock was last changed
        for path in _locks(folder):
            if path != self.path and path != folder / f".lock-{number - 1:06d}":  # came since the last look
                self.path.unlink(missing_ok=True)
                raise HostError(f"{folder}: in use by another genkit, which came at the same moment; one at a time")
        if number:
            (folder / f".lock-{number - 1:06d}").unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._keep, name="genkit-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise HostError if another process has taken the folder over."""
        if self._lost is not None:
            raise HostError(f"{self.folder}: {self._lost}; run the same command again to continue")

    def close(self) -> None:
        """Let others have the folder."""
        self._ended.set()
        self._thread.join(max(STALE, 10.0))  # a beat that is under way must not come after the lock is deleted
        if time.monotonic() - self._fresh > 2 * STALE:  # storage does not answer: the lock goes stale
            return
        with contextlib.suppress(HostError):  # it goes stale
            if self._is_own(_newest(self.folder)):
                self.path.unlink(missing_ok=True)

    def _after_others(self) -> int:
        """Return the number of the lock to take, after the holder's lock, if there is one, has gone stale."""
        found = _newest(self.folder)
        if found is None:
            return 0
        number, content = found
        holder = _holder(content)
        if holder.get("machine") == self._own["machine"] is not None:
            if _alive(holder):
                raise _in_use(self.folder, holder)
            return number + 1
        _log.warning(f"{self.folder}: locked by {_who(holder)}; waiting up to {STALE:.0f} s for a sign of it")
        until = time.monotonic() + STALE
        while time.monotonic() < until:
            time.sleep(min(1.0, STALE / 5))
            now = _newest(self.folder)
            if now is None:  # ended
                return 0
            if now != found:
                raise _in_use(self.folder, _holder(now[1]))
        return number + 1

    def _content(self, beat: int) -> bytes:
        return json.dumps({**self._own, "beat": beat}).encode()

    def _is_own(self, found: tuple[int, bytes] | None) -> bool:
        return found is not None and _holder(found[1]).get("token") == self._own["token"]

    def _keep(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT):
            beat += 1
            try:
                if not self._is_own(_newest(self.folder)):
                    self._lost = "another genkit has taken it over, or its lock was deleted"
                    return
                self.path.write_bytes(self._content(beat))
                self._fresh = time.monotonic()
            except (HostError, OSError) as error:
                if time.monotonic() - self._fresh > 4 * STALE:
                    self._lost = f"its lock cannot be kept: {error}"
                    return


def _locks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(".lock-*") if _NAME.fullmatch(path.name))


def _newest(folder: Path) -> tuple[int, bytes] | None:
    """Return number and content of the lock that counts, or None."""
    paths = _locks(folder)
    if not paths:
        return None
    try:
        return int(paths[-1].name.removeprefix(".lock-")), paths[-1].read_bytes()
    except FileNotFoundError:  # deleted meanwhile
        return _newest(folder)


def _holder(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _in_use(folder: Path, holder: dict[str, Any]) -> HostError:
    return HostError(f"{folder}: in use by another genkit ({_who(holder)}); one at a time")


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process', 'unknown')} on {holder.get('host', 'an unknown host')}"


def _machine() -> str | None:
    """Return a name within which process numbers mean one process: of this boot and namespace; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _alive(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine still runs: one of its number that began when it did."""
    return holder.get("began") is not None and _began(holder.get("process")) == holder["began"]


def _began(process: Any) -> str | None:
    """Return when a process began, in ticks since the boot; None for one that has ended."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in ("Z", "X") else fields[18]
