"""The durable run folder: every image is written, synced and renamed before its record is appended and synced."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit.durable import Journal, disk, is_temporary, json_line, read_lines, sync_folder, write_whole
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.destination import check_binding, check_folder
from genkit.runs.embeddings import read_embeddings
from genkit.runs.folding import fold
from genkit.runs.gather import gather
from genkit.runs.lease import Hold, Lease, hold
from genkit.runs.outdated import NEW_LABELS, announcements, damaged, outdated
from genkit.runs.recorder import Recorder
from genkit.runs.records import CONFIG, PICTURE, REPLACED, RESULTS, ROWS, Key, newest, read_config
from genkit.runs.segments import Segments
from genkit.scoring.senses import NAMES as SENSES
from genkit.storage import StoragePath

SHOWN = 10  # notes of one kind


class Run(Recorder):
    """A run folder locked by this process: a context manager, made by `Run.open`.

    notes: messages about what was found changed, damaged or unfinished; stale: whether scores may be based on other
    labels or prompts than the current ones; config: run.json. `save` and `fail` are thread-safe.
    """

    def __init__(self, folder: Path, config: dict[str, Any], rows: Sequence[Request], lock: Hold | Lease) -> None:
        """For `Run.open`, which checks the folder and takes the lock."""
        super().__init__(folder, rows)
        self.config, self._lock = config, lock
        self._fingerprints = {row_id: row.fingerprint() for row_id, row in self.rows.items()}
        self.notes: list[str] = []
        self.stale = False

    @classmethod
    def open(cls, folder: Path, config: dict[str, Any], rows: Sequence[Request]) -> Run:
        """Start a run in a new or empty folder, or resume the one that is there.

        config: {"binding": what every later start must agree with, "info": the rest}; written once. Raises InputError
        for a folder that is not a run folder or has another binding, HostError if the disk or a lock does not allow it.
        """
        check_folder(folder)
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = hold(folder)
            try:
                recorded = read_config(folder)
                if recorded is not None:
                    check_binding(folder, recorded["binding"], config["binding"])
                    config = {**recorded, "binding": {**recorded["binding"], **_places(config["binding"])}}
                if config != recorded:  # a new run, or one whose models have moved
                    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
                    write_whole(folder / CONFIG, text.encode("utf-8", "backslashreplace"))  # paths may be no UTF-8
                    sync_folder(folder.absolute().parent)
                run = cls(folder, config, rows, lock)
                run._begin()
                return run
            except BaseException:
                lock.close()
                raise

    def rescore(self, results: Sequence[Result]) -> None:
        """Record new scores of finished images. Raises HostError."""
        with disk(self._journal.path):
            self._journal.append([r.to_json() for r in results])
        for r in results:
            self._count(r)

    def fold(self) -> None:
        """Take over what other writers, which have ended, left in parts of their own. Raises HostError."""
        records: dict[Key, Result] = {}
        self._note(fold(self.folder, self._journal, records))
        for result in records.values():
            if result.id in self.rows and result.status != REPLACED:
                self._count(result)
        if not isinstance(self.folder, StoragePath):  # of writers that were killed
            for path in _files(self.folder / "images"):
                if is_temporary(path.name):
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock. Everything saved is on disk already."""
        self._journal.close()
        self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and isinstance(self.folder, StoragePath):  # so that others read one object
                gather(self.folder, self._journal, {})
        finally:
            self.close()

    def _begin(self) -> None:
        """Check what is there, move damaged and outdated images aside, and write the rows."""
        for name in self.blocks():
            (self.folder / "images" / name).mkdir(exist_ok=True)
        sync_folder(self.folder / "images")
        self._journal = self._opened()
        try:
            records, bad = newest(self._journal.lines)
            self._journal.lines.clear()
            self._note(f"{RESULTS}:{line}: damaged; its image is drawn again" for line in bad)
            self._note(fold(self.folder, self._journal, records))
            self._tidy({r.file for r in records.values() if r.status == "done"})
            self._take_stock([r for r in records.values() if r.id in self.rows and r.status != REPLACED])
            data = "".join(json_line(row.to_json()) for row in self.rows.values()).encode()
            if not (self.folder / ROWS).is_file() or (self.folder / ROWS).read_bytes() != data:
                write_whole(self.folder / ROWS, data)
            sync_folder(self.folder)
        except BaseException:
            self._journal.close()
            raise

    def _opened(self) -> Journal | Segments:
        if not isinstance(self.folder, StoragePath):
            return Journal(self.folder / RESULTS)
        assert isinstance(self._lock, Lease)
        journal = Segments(self.folder, "run", self.folder / RESULTS)
        journal.before.append(self._lock.check)
        return journal

    def _tidy(self, recorded: set[str | None]) -> None:
        """Remove temporary files, and move aside pictures without a record, left when a run was killed."""
        stray = []
        for path in [*self.folder.iterdir(), *_files(self.folder / "images")]:
            name = path.relative_to(self.folder).as_posix()
            if is_temporary(path.name):
                path.unlink()
            elif PICTURE.fullmatch(name) and name not in recorded:
                stray.append(f"{name}: finished but not recorded; now {self._set_aside(path)}")
        self._note(stray)

    def _take_stock(self, records: Sequence[Result]) -> None:
        """Sort the records of the current rows into valid ones and those whose images must be drawn again."""
        old = outdated(records, self.rows, self._fingerprints)
        if NEW_LABELS in old.values():
            embedded, _ = read_embeddings(self.folder, records)
            old = {key: why for key, why in old.items() if why != NEW_LABELS or key not in embedded}
            self.stale = True
        prompts = {row.get("prompt", "") for row in self._recorded_rows().values()}
        self.stale |= bool(prompts) and prompts != {row.prompt for row in self.rows.values()}
        if old:
            self._note(announcements(old, self._recorded_rows(), self.rows))
        done = [r for r in records if r.status == "done" and (r.id, r.index) not in old]
        bad, hashed = damaged(self.folder, done)
        if hashed < len(done):
            self.notes.append(f"checked the size of {len(done)} images and the SHA-256 of the newest {hashed}")
        self._note(f"row {row_id}, image {n}: its file {text}; drawn again" for (row_id, n), text in bad.items())
        self._retire(records, {**old, **bad})
        for r in records:
            if (r.id, r.index) not in old and (r.id, r.index) not in bad:
                self._count(r)

    def _retire(self, records: Sequence[Result], why: Mapping[Key, str]) -> None:
        """Move the pictures of invalid records to replaced/, and record that."""
        gone, folders = [], set()
        for r in records:
            if (r.id, r.index) not in why:
                continue
            path, moved = self.folder / str(r.file), None
            if r.status == "done" and _is_there(path):
                moved = self._set_aside(path)
                folders |= {path.parent, self.folder / REPLACED}
            text = why[r.id, r.index]
            gone.append(dataclasses.replace(r, status=REPLACED, reason=text, file=moved).to_json())
        if gone:
            self._journal.append(gone, folders)

    def _set_aside(self, path: Path) -> str:
        """Move a picture to the first free name in replaced/; return that name, relative to the run folder."""
        (self.folder / REPLACED).mkdir(exist_ok=True)
        n = 1
        while _is_there(target := self.folder / REPLACED / f"{path.stem}.{n}{path.suffix}"):
            n += 1
        path.rename(target)
        return target.relative_to(self.folder).as_posix()

    def _recorded_rows(self) -> dict[str, dict[str, Any]]:
        path = self.folder / ROWS
        lines = read_lines(path)[0] if path.is_file() else []
        return {str(line.get("id")): line for line in lines if isinstance(line, dict)}

    def _note(self, lines: Iterator[str] | Sequence[str]) -> None:
        found = list(lines)
        self.notes += found[:SHOWN]
        if len(found) > SHOWN:
            self.notes.append(f"… and {len(found) - SHOWN} more like this")


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files in images/ and in its numbered subfolders."""
    if isinstance(folder, StoragePath):
        yield from (folder / name for name in folder.sizes())
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and entry.name.isdigit():
                yield from _files(Path(entry.path))
            else:
                yield Path(entry.path)


def _is_there(path: Path) -> bool:
    return path.exists() if isinstance(path, StoragePath) else os.path.lexists(path)


def _places(binding: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of models and embeddings, which say where they lie now."""
    return {part: binding[part] for part in ("model", "clip", *SENSES, "segmenter", "embeddings") if part in binding}
