"""Prompt files that clients send, of any format, to checked rows: nothing in them may name a file."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.durable import disk, sync_folder, write_whole
from genkit.errors import InputError
from genkit.files import place, user_path
from genkit.job.plan import Job, plan_job
from genkit.rows.controls import FLAT
from genkit.rows.inputs import is_picture
from genkit.rows.prompting import PROMPTS
from genkit.rows.prompts import Rows, checked_rows
from genkit.rows.request import field_name
from genkit.rows.rowfiles import open_rows
from genkit.rows.syntax import lora_tags
from genkit.rows.wildcards import combinations
from genkit.serve.rows import NOT_SERVED, PICTURES, Intake, check_scheduler, picture

MOST_IMAGES = 100_000  # of a run
SUFFIXES = {  # of a prompt file, by the type of what is sent
    "text/plain": ".txt", "text/csv": ".csv", "application/json": ".json",
    **dict.fromkeys(("application/jsonl", "application/x-ndjson", "application/ndjson"), ".jsonl"),
    **dict.fromkeys(("application/yaml", "application/x-yaml", "text/yaml"), ".yaml"),
}  # fmt: skip


class Upload:
    """A prompt file that a client sent. inputs: where the pictures of its rows go, which are sent inline."""

    def __init__(self, name: str, data: bytes, form: str, intake: Intake, inputs: Path) -> None:
        self.name, self.data, self.form, self.intake, self.inputs = name, data, form, intake, inputs

    def job(self, options: Any) -> Job:
        """Return the checked work, as `genkit generate` plans it. Raises InputError naming line and field."""
        engine = self.intake.engine
        rows = self._rows()
        self._check_count(rows)
        try:
            job = plan_job(rows, options, engine.defaults, engine.models)
        except InputError as error:
            raise InputError(self.intake.without_folders(str(error))) from None
        most = sum(row.max_images or row.num_images for row in job.rows)
        if most > MOST_IMAGES:
            raise InputError(f"{self.name}: asks for {most} pictures; a run has {MOST_IMAGES} at most")
        for row in job.rows:
            try:
                self.intake.check(row)
            except InputError as error:
                raise InputError(f"{row.source}: {error}") from None
        return job

    def _rows(self) -> Rows:
        with tempfile.TemporaryDirectory(prefix="genkit-upload-") as folder:
            path = Path(folder) / f"prompts{Path(self.name).suffix.lower()}"
            path.write_bytes(self.data)
            try:
                file = open_rows(path, self.form)
                rows = ((line, self._located(path, line, fields)) for line, fields in file.rows)
                defaults = self._located(path, file.defaults_line, file.defaults)
                found = checked_rows(dataclasses.replace(file, rows=rows, defaults=defaults), path)
            except InputError as error:
                raise InputError(self._renamed(str(error), path).replace("--format-in", "format_in")) from None
            found.notes = tuple(self._renamed(note, path) for note in found.notes)
            for row in found:
                row._source = self._renamed(row.source, path)
            return found

    def _renamed(self, text: str, path: Path) -> str:
        return text.replace(place(path), place(self.name))

    def _located(self, path: Path, line: int, fields: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._served(fields)
        except InputError as error:
            raise InputError(f"{place(path)}:{line}: {error}") from None

    def _served(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a row with nothing in them that names a file of a client's choice."""
        found = dict(fields)
        named = {field_name(key): key for key in fields}
        for key, value in fields.items():
            name = field_name(key)
            name = "mask_image" if name == "mask" and is_picture(value) else name
            if value is None or value == "":
                continue
            if name in NOT_SERVED and name != "expansions":
                raise InputError(f"{name}: {NOT_SERVED[name]}")
            if name in PICTURES:
                found[key] = self._kept(name, picture(name, value))
            elif name == "scheduler":
                check_scheduler(value)
            elif name in FLAT:
                found[key] = self._control(FLAT[name], value)
            elif name == "controls":
                found[key] = self.intake.controls_of(value, self._kept)
            elif name == "loras":
                found[key] = self.intake.loras_of([value] if isinstance(value, str) else value)
        syntax = fields.get(named.get("syntax", "syntax"), self.intake.engine.defaults.get("syntax"))
        if syntax == "a1111" and isinstance(fields.get(named.get("prompt", "prompt")), str):
            self._untagged(found, named)
        return found

    def _control(self, key: str, value: Any) -> Any:
        """Return what a row has for a field of its only ControlNet: the path of a named network, or of a picture."""
        if key == "image":
            return self._kept("control_image", picture("control_image", value))
        return self.intake.control_file(value) if key == "file" and value != "none" else value

    def _untagged(self, found: dict[str, Any], named: Mapping[str, Any]) -> None:
        """Move the LoRA tags of a prompt into the field `loras`; in a template they stay, and have been checked."""
        prompt = found[named["prompt"]]
        text, tags = lora_tags(prompt)
        loras = [{"file": self.intake.file_of(n), "weight": w, "text_weight": t} for n, w, t in tags]
        if loras and "{" not in prompt and "__" not in prompt:
            found[named["prompt"]] = text.strip()
            key = named.get("loras", "loras")
            found[key] = [*(found.get(key) or ()), *loras]

    def _kept(self, name: str, image: Any) -> str:
        """Write a picture that was sent inline to the run's inputs; return its path. Raises HostError."""
        data = io.BytesIO()
        image.save(data, "PNG")
        path = self.inputs / f"{hashlib.sha256(data.getvalue()).hexdigest()[:32]}.png"
        with disk(path):
            self.inputs.mkdir(exist_ok=True)
            if not path.exists():
                write_whole(path, data.getvalue())
                sync_folder(self.inputs)
        return str(path)

    def _check_count(self, rows: Rows) -> None:
        """Raise InputError for templates that stand for more rows than a run has pictures, before they are drawn."""
        folder = self.intake.engine.options.wildcards
        wildcards = None if folder is None else user_path(folder)
        count = 0
        for row in rows:
            count += (row.max_images or row.num_images) * _texts(row, wildcards)
            if count > MOST_IMAGES:
                raise InputError(
                    f"{row.source}: with it the file asks for more than the {MOST_IMAGES} pictures of a run"
                )


def _texts(row: Any, wildcards: Path | None) -> int:
    many = row.expansions or 1
    for name in PROMPTS if row.syntax == "a1111" else ():
        try:
            many *= len(combinations(getattr(row, name), wildcards, MOST_IMAGES))
        except InputError as error:
            raise InputError(f"{row.source}: {name}: {error}") from None
    return many
