"""Checkpoints: written to a temporary folder, verified, renamed; only then an older one is deleted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from genkit.components.weights import sha256
from genkit.durable import TEMP_PREFIX, TEMP_SUFFIX, disk, is_temporary, json_line, sync_folder, sync_tree, write_whole
from genkit.errors import HostError, InputError, shown
from genkit.files import place, read_json
from genkit.training.recipe import Save
from genkit.training.state import State

MANIFEST = "checkpoint.json"
KEYS = {"step", "seconds", "scores", "scaler", "files"}  # of a manifest


class Checkpoints:
    """The checkpoints of a run, FOLDER/<step>/: weights, ema, optimizer as safetensors, and a manifest with hashes."""

    def __init__(self, folder: Path, save: Save, lower_is_better: bool, metric: str) -> None:
        self.folder, self.save, self.metric = folder, save, metric
        self.sign = 1 if lower_is_better else -1

    def steps(self) -> list[int]:
        """The steps of the existing checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

    def sweep(self) -> None:
        """Delete unfinished checkpoints of an earlier start; only the main process may call this."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if is_temporary(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def write(
        self, state: State, scaler: dict[str, Any] | None, tensors: dict[str, dict[str, Any]] | None = None
    ) -> Path:
        """Save `state`, verify it by reading it back, then delete checkpoints that are not kept. Raises HostError.

        tensors: those of the state, if they are already gathered from the processes.
        """
        from safetensors.torch import save_file

        final = self.folder / f"{state.step:06d}"
        if final.exists():
            with contextlib.suppress(InputError), disk(final):
                manifest, scores = _read(final)[0], json.loads(json_line(state.scores))
                if manifest["scores"] != scores:  # it was evaluated after a restart
                    write_whole(final / MANIFEST, json_line(manifest | {"scores": scores}).encode())
                return final
        temporary = self.folder / f"{TEMP_PREFIX}{final.name}{TEMP_SUFFIX}"
        try:
            with disk(final):
                temporary.mkdir(parents=True)
                tensors = state.tensors() if tensors is None else tensors
                for name, group in tensors.items():
                    contiguous = {key: value.contiguous() for key, value in group.items()}
                    save_file(contiguous, temporary / f"{name}.safetensors", metadata={"format": "pt"})
                manifest = {
                    "step": state.step, "seconds": state.seconds, "scores": state.scores, "scaler": scaler,
                    "files": {f"{name}.safetensors": sha256(temporary / f"{name}.safetensors") for name in tensors},
                }  # fmt: skip
                write_whole(temporary / MANIFEST, json_line(manifest).encode())
                sync_tree(temporary)
                _read(temporary)
                if final.exists():  # but damaged: see above
                    shutil.rmtree(final)
                os.rename(temporary, final)
                sync_folder(self.folder)
        except Exception as error:  # older checkpoints are kept
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, HostError):
                raise
            raise HostError(f"{place(final)}: was not saved: {shown(str(error), 200)}") from error
        self._drop(state)
        return final

    def _drop(self, state: State) -> None:
        steps = self.steps()
        keep = set(steps[-self.save.keep_last :])
        if self.save.keep_every:
            keep |= {step for step in steps if step % self.save.keep_every == 0}
        keep |= set(self.ranked(state, steps)[: self.save.keep_best])
        for step in set(steps) - keep:
            shutil.rmtree(self.folder / f"{step:06d}", ignore_errors=True)

    def ranked(self, state: State, steps: list[int]) -> list[int]:
        """Return those of `steps` that have the metric, best first."""
        scored = {step: m for step in steps if (m := state.scores.get(step, {}).get(self.metric)) is not None}
        return sorted(scored, key=lambda step: (self.sign * scored[step], step))

    def restore(self, state: State, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Load the newest intact checkpoint into `state`; return its manifest, or None without one.

        Damaged checkpoints are reported and skipped. Raises InputError for one of another architecture, and if all are
        damaged.
        """
        steps = self.steps()
        for number in reversed(steps):
            path = self.folder / f"{number:06d}"
            try:
                manifest, tensors = _read(path)
            except (InputError, OSError) as error:
                say(f"checkpoint {number} is damaged and passed over: {error}")
                continue
            _load(state, manifest, tensors, path)
            return manifest
        if steps:
            raise InputError(
                f"{place(self.folder)}: all {len(steps)} checkpoints are damaged; move them away to begin anew"
            )
        return None

    def restore_best(self, state: State, step: int) -> None:
        """Load the checkpoint of `step`, the best one, into `state`. Raises InputError if it is damaged."""
        path = self.folder / f"{step:06d}"
        try:
            manifest, tensors = _read(path)
        except (InputError, OSError) as error:
            raise InputError(
                f"{error}: step {step} is the best by {self.metric}; move {place(path)} away and run the same command"
                " again, which writes the next best"
            ) from None
        _load(state, manifest, tensors, path)


def _load(state: State, manifest: dict[str, Any], tensors: dict[str, dict[str, Any]], path: Path) -> None:
    state.check({n: tuple(t.shape) for n, t in tensors["weights"].items()}, place(path))
    missing = [f for f in ("weights", *(["ema"] if state.ema else [])) if f not in tensors]
    if missing:
        raise InputError(f"{place(path)}: has no {missing[0]}, which the recipe asks for")
    state.load(tensors)
    state.step, state.seconds = manifest["step"], manifest["seconds"]
    state.scores = {int(key): value for key, value in manifest["scores"].items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return a checkpoint's manifest and tensors. Raises InputError for damaged files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = read_json(path / MANIFEST, limit=2**26)
    if not manifest.keys() >= KEYS or not isinstance(manifest["files"], dict):
        raise InputError(f"{place(path / MANIFEST)}: is not the manifest of a checkpoint")
    found = {}
    for name, digest in manifest["files"].items():
        if sha256(path / name) != digest:
            raise InputError(f"{place(path / name)}: is not as it was written")
        try:
            found[name.removesuffix(".safetensors")] = load_file(path / name)
        except SafetensorError as error:
            raise InputError(f"{place(path / name)}: {shown(str(error), 200)}") from None
    return manifest, found


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log.jsonl."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


@contextlib.contextmanager
def open_log(path: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that appends to a log. Lines after `step` are removed first, since those steps are repeated."""
    with disk(path):
        kept = [line for line in read_log(path) if line["step"] <= step]
        write_whole(path, "".join(map(json_line, kept)).encode())
        with open(path, "a", encoding="utf-8", buffering=1) as file:
            yield lambda values: print(json_line(values), end="", file=file)
