"""What clients do with runs: begin, cancel, choose again, delete. None of it waits for the network."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genkit.durable import json_line
from genkit.errors import HostError, InputError, shown
from genkit.pages.gallery import write_gallery
from genkit.pictures.encoders import encoding
from genkit.runs.records import GALLERY, RESULTS, SELECTION, read_config, read_results, read_rows
from genkit.selection.decide import decide, image_name
from genkit.serve.engine import Full
from genkit.serve.feeder import Feeder, config_of, run_options
from genkit.serve.rows import Intake
from genkit.serve.store import Served, Store
from genkit.serve.uploads import Upload
from genkit.studies.filter import refilter

MOST_WAITING = 256  # runs of an owner of which something is to be drawn
EVERY = 3.0  # seconds between two galleries of a run that is drawn, or
REST = 3  # times as long as writing one took: records wait for it
WAIT = 10.0  # seconds after which a client may try again to begin one


class Conflict(Exception):
    """The state of a run does not allow what was asked for."""


class Runs:
    """The runs below a folder, and what draws them. Raises HostError and InputError as Store."""

    def __init__(self, folder: Path, intake: Intake) -> None:
        self.intake, self.engine = intake, intake.engine
        self.store = Store(folder)
        self.feeder = Feeder(self.engine, self.store)
        self._accepting = threading.Lock()

    def close(self) -> None:
        """End the drawing, and release the folder."""
        self.feeder.close()
        self.store.close()

    def accept(
        self, owner: str, name: str, data: bytes, form: str = "auto", seed: int = 0, picture_format: str = "png",
        quality: int | None = None, key: str | None = None,
    ) -> tuple[Served, bool]:  # fmt: skip
        """Check a prompt file, and put its run on the disk; return it, and whether it is new.

        key: of the client's choice: a second call with it returns the run of the first. Raises InputError for the file,
        Conflict for a key of another file, Full where too many wait, and HostError for the disk.
        """
        options = json.dumps([name, form, seed, picture_format, quality])
        digest = hashlib.sha256(options.encode() + b"\0" + data).hexdigest()
        run_id = self.store.new_id(owner, key)
        if key is not None and (there := self._same(run_id, digest)) is not None:
            return there, False
        if sum(not run.over for run in self.store.of(owner)) >= MOST_WAITING:
            raise Full(WAIT)
        try:
            encoding(picture_format, quality)
        except InputError as error:
            raise InputError(str(error).replace("--", "", 1)) from None
        upload = Upload(name, data, form, self.intake, self.store.inputs(run_id))
        try:
            job = upload.job(run_options(self.engine, seed, picture_format, quality))
            with self._accepting:
                if key is not None and (there := self._same(run_id, digest)) is not None:
                    return there, False
                about = {"owner": owner, "name": name, "digest": digest}
                run = self.store.accept(run_id, job, config_of(job, self.engine), about)
        except BaseException:
            if run_id not in self.store.runs:
                shutil.rmtree(self.store.inputs(run_id), ignore_errors=True)
            raise
        self.feeder.wake()
        return run, True

    def _same(self, run_id: str, digest: str) -> Served | None:
        run = self.store.runs.get(run_id)
        if run is not None and run.digest != digest:
            raise Conflict("this Idempotency-Key was sent with another prompt file or other settings")
        return run

    def cancel(self, run: Served) -> None:
        """Draw no more of a run; what is drawn stays. Does nothing to one that is over. Raises HostError."""
        with run.lock:
            if run.over:
                return
            if run.id not in self.feeder.active:
                run.end("cancelled")
                return
            run.state = "cancelled"
            try:
                run.save()
            except HostError:
                run.state = "drawing"
                raise
        self.feeder.wake()

    def refilter(
        self, run: Served, where: str | None = None, rank_by: str | None = None, keep: int | None = None
    ) -> dict[str, Any]:
        """Decide again what is kept of what is drawn; return counts and the names. Raises InputError."""
        with run.lock:
            try:
                counts = refilter(run.folder, where, rank_by, keep)
            except InputError as error:
                named = str(error).removeprefix("--").replace("rank-by:", "rank_by:", 1)
                raise InputError(named.replace(f"{run.folder}: ", "")) from None
            run.kept = counts["kept"]
            if run.over:
                run.save()
            images = self.selection(run)
        kept = [name for name, image in images.items() if image["kept"]]
        return {name: counts[name] for name in ("rows", "images", "kept")} | {"names": kept}

    def delete(self, run: Served) -> None:
        """Delete a run that is over, with its pictures. Raises Conflict for one that is drawn, HostError."""
        with run.lock:
            if not run.over or run.id in self.feeder.active:
                raise Conflict("the run is being drawn: cancel it first")
            self.store.delete(run)

    def page(self, run: Served) -> Path:
        """Return the gallery of a run; of one that is being drawn it may lack the newest images, see EVERY and REST."""
        path = run.folder / GALLERY
        with run.lock:
            if path.is_file() and (run.over or not self._is_old(run)):
                return path
            records, began = _records(run), time.monotonic()
            config = read_config(run.folder)
            assert config is not None
            rows, results = read_rows(run.folder), read_results(run.folder)
            write_gallery(run.folder, rows, results, decide(rows, results), config)
            now = time.monotonic()
            run.page = records, now + REST * (now - began)
        return path

    def _is_old(self, run: Served) -> bool:
        """Whether records came since the gallery was written, and it is time to write it again."""
        shown, since = run.page
        return shown is None or (time.monotonic() - since >= EVERY and _records(run) != shown)

    def selection(self, run: Served) -> dict[str, Any]:
        """Return what selection.json says of each image; nothing before it is written."""
        path = run.folder / SELECTION
        with run.lock:
            return json.loads(path.read_bytes())["images"] if path.is_file() else {}

    def results(self, run: Served) -> Iterator[str]:
        """Yield the record of each image as a line of JSON, with `kept`, `rank` and `why` once that is decided."""
        images = self.selection(run)
        for result in read_results(run.folder):
            verdict = images.get(image_name(result), {})
            told = {"kept": verdict.get("kept"), "rank": verdict.get("rank"), "why": verdict.get("reason")}
            yield json_line(result.to_json() | told)


def _records(run: Served) -> tuple[int, int] | None:
    """Return size and time of the records of a run, which change with each record."""
    try:
        found = (run.folder / RESULTS).stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def check_name(name: str) -> str:
    """Return the last part of a file's name. Raises InputError for one that is none."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1].strip()
    if not last or len(last) > 200 or not last.isprintable():
        raise InputError(f"name: {shown(name)} is no name of a file")
    return last


__all__ = ["Conflict", "Runs", "check_name"]
