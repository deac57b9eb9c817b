"""The runs that clients started: ordinary run folders, each with a served.json, below the folder of --runs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from genkit.durable import disk, is_temporary, lock_folder, sync_folder, write_whole
from genkit.errors import HostError, InputError
from genkit.job.plan import Job
from genkit.runs.records import read_results
from genkit.runs.run import Run

log = logging.getLogger("genkit")
STATE = "served.json"
NAME = re.compile(r"[a-z0-9-]{1,64}")
FINAL = ("done", "cancelled")
NEW, GONE, INPUTS = ".new-", ".gone-", ".inputs-"  # beginnings of names; what is not accepted, or deleted, is removed


@dataclasses.dataclass
class Served:
    """A run that a client started.

    state: waiting, drawing, or one of FINAL. owner: who may see it, see `owner_of`; "" is anyone. certain, most:
    images that it has in the end, at least and at most. digest: of what was sent. reason: why it waits.
    """

    id: str
    folder: Path
    owner: str
    created: float
    name: str
    format: str
    quality: int | None
    digest: str
    rows: int
    certain: int
    most: int
    state: str = "waiting"
    reason: str | None = None
    done: int = 0
    failed: int = 0
    kept: int | None = None
    finished: float | None = None
    lock: Any = dataclasses.field(default_factory=threading.RLock, repr=False, compare=False)
    page: tuple[Any, float] = (None, 0.0)  # the records that the gallery of a run that is drawn shows, and since when

    @property
    def over(self) -> bool:
        """Whether nothing more is drawn of it."""
        return self.state in FINAL

    def seen_by(self, owner: str) -> bool:
        """Whether an owner may see it: its own, everyone on a server without keys, and any key what has no owner."""
        return owner in (self.owner, "") or not self.owner

    def to_json(self) -> dict[str, Any]:
        """Return what served.json has of it."""
        left_out = ("lock", "page", "folder", "id")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}

    def end(self, state: str) -> None:
        """Record that nothing more is drawn, unless that is recorded. Raises HostError, and then it is not over."""
        with self.lock:
            before, self.state, self.finished = self.state, self.state if self.over else state, time.time()
            try:
                self.save()
            except HostError:
                self.state, self.finished = before, None
                raise

    def count(self) -> None:
        """Count the records on the disk, of a run that is not drawn now."""
        with contextlib.suppress(InputError, HostError):
            results = read_results(self.folder)
            self.done, self.failed = (sum(r.status == status for r in results) for status in ("done", "failed"))

    def save(self) -> None:
        """Write served.json. Raises HostError."""
        kept = {**self.to_json(), "state": self.state if self.over else "waiting"}
        with disk(self.folder / STATE):
            write_whole(self.folder / STATE, (json.dumps(kept, indent=2) + "\n").encode())
            sync_folder(self.folder)


class Store:
    """The runs below a folder, which it locks: one server at a time.

    runs: by id, in the order in which they came. Raises HostError and InputError as a folder that cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.runs: dict[str, Served] = {}
        self._mutex = threading.Lock()
        with disk(folder):
            if os.path.lexists(folder) and not folder.is_dir():
                raise InputError(f"--runs: {folder} is not a folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder)
            found = [one for path in sorted(self.folder.iterdir()) if (one := self._found(path)) is not None]
            for path in self.folder.glob(f"{INPUTS}*"):
                if not (self.folder / path.name.removeprefix(INPUTS)).exists():
                    shutil.rmtree(path)
        self.runs = {one.id: one for one in sorted(found, key=lambda one: (one.created, one.id))}

    def _found(self, path: Path) -> Served | None:
        if path.name.startswith((NEW, GONE)):  # of a server that was killed: never accepted, or deleted
            shutil.rmtree(path)
        elif is_temporary(path.name):
            path.unlink()
        elif NAME.fullmatch(path.name) and (path / STATE).is_file():
            try:
                run = Served(path.name, path, **json.loads((path / STATE).read_bytes()))
            except (ValueError, TypeError) as error:
                log.warning("%s: is damaged, and its run is left alone: %s", path / STATE, error)
            else:
                if run.finished is None:
                    run.count()
                    run.finished = time.time() if run.over else None  # cancelled, and killed before it was recorded
                return run
        return None

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)

    def new_id(self, owner: str, key: str | None) -> str:
        """Return a new id; for a key that the client chose, the same for the same owner and key."""
        if key is not None:
            return f"k-{hashlib.sha256(f'{owner}/{key}'.encode()).hexdigest()[:32]}"
        return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(5)}"

    def inputs(self, run_id: str) -> Path:
        """Return the folder of the pictures that a run's rows start from."""
        return self.folder / f"{INPUTS}{run_id}"

    def accept(self, run_id: str, job: Job, config: dict[str, Any], about: dict[str, Any]) -> Served:
        """Put a run on the disk, whole, then under its name: from then on it is drawn whatever happens.

        about: owner, name, digest. Raises HostError; then there is no run.
        """
        new, o = self.folder / f"{NEW}{run_id}", job.options
        certain = sum(row.whole for row in job.rows)
        most = sum(row.max_images or row.whole for row in job.rows)
        run = Served(
            run_id, new, created=time.time(), format=o.format, quality=o.quality, rows=len(job.rows), certain=certain,
            most=most, **about,
        )  # fmt: skip
        try:
            with Run.open(new, config, job.rows):
                run.save()
            with disk(new):
                os.rename(new, self.folder / run_id)
                try:
                    sync_folder(self.folder)
                except OSError:  # the client is told that there is no run: the next start must find none
                    os.rename(self.folder / run_id, new)
                    raise
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(new)
            raise
        run.folder = self.folder / run_id
        with self._mutex:
            self.runs[run_id] = run
        return run

    def of(self, owner: str) -> list[Served]:
        """Return the runs that an owner may see."""
        with self._mutex:
            return [run for run in self.runs.values() if run.seen_by(owner)]

    def waiting(self) -> list[Served]:
        """Return the runs of which something is to be drawn."""
        with self._mutex:
            return [run for run in self.runs.values() if not run.over]

    def delete(self, run: Served) -> None:
        """Delete a run that is over, with its pictures. Raises HostError, and then it is there still."""
        gone = self.folder / f"{GONE}{run.id}"
        with run.lock, disk(run.folder):
            handle = lock_folder(run.folder)
            try:
                os.rename(run.folder, gone)  # a crash from here on leaves what the next start removes
                try:
                    sync_folder(self.folder)
                except OSError:  # the client is told that the run is there still
                    os.rename(gone, run.folder)
                    raise
            finally:
                os.close(handle)
            with self._mutex:
                del self.runs[run.id]
            for folder in (gone, self.inputs(run.id)):
                shutil.rmtree(folder, ignore_errors=True)


def owner_of(client: str, keys: list[str]) -> str:
    """Return whose a call's runs are: the key's, wherever it stands in the file; without any everyone's, ""."""
    number = client.removeprefix("key ")
    if not keys or not number.isdigit():
        return ""
    return hashlib.sha256(b"genkit run\0" + keys[int(number) - 1].encode()).hexdigest()[:16]


def unavailable(error: Exception) -> str:
    """Return why a run waits, in a line."""
    return " ".join(str(error).split())[:300] if isinstance(error, InputError | HostError) else type(error).__name__
