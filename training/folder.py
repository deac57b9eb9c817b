"""The folder of a training run: its lock, and the check that a resumed run is the same one."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genkit.components import ModelInfo, weight_hashes
from genkit.datasets.example import Example
from genkit.durable import disk, json_line, lock_folder, write_whole
from genkit.errors import InputError, shown
from genkit.files import place, read_json
from genkit.training.processes import passes_of, rank
from genkit.training.recipe import Recipe

log = logging.getLogger("genkit")
# Keys that may change when a run is resumed; all others determine its result.
FREE = ("train.steps", "train.max_seconds", "save", "evaluate", "data.workers", "data.cache_folder", "data.broken",
        "train.sharding", "train.gradient_accumulation_steps")  # fmt: skip
# Locations of data and model may change too: their contents are compared by hashes.
PLACES = ("data.path", "model", "prior.path", "data.validation")

_HELD: set[int] = set()  # file descriptors of locks
# Forked loader processes close them, so that they do not keep the folder locked if this process is killed.
os.register_at_fork(after_in_child=lambda: collections.deque(map(os.close, _HELD), maxlen=0))


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the folder; of several processes only the first does. Raises HostError if another run holds it."""
    if rank() != 0:
        yield
        return
    with disk(out):
        handle = lock_folder(out)
    _HELD.add(handle)
    try:
        yield
    finally:
        _HELD.discard(handle)
        os.close(handle)


def free_or_own(out: Path) -> None:
    """Raise InputError for a folder that holds something other than a training run."""
    others = ("model_index.json", "checkpoints", "results.jsonl")
    path = out / "run.json"
    own = "recipe" in read_json(path) if path.exists() else not any((out / name).exists() for name in others)
    if not own:
        raise InputError(f"{place(out)}: holds something else than a training run: take another folder")


def facts_of(recipe: Recipe, info: ModelInfo, examples: list[Example]) -> dict[str, Any]:
    """Return what identifies a run: the recipe, and hashes of weights and data."""
    data = hashlib.sha256()
    for e in examples:
        more = [list(e.captions), e.repeat] if e.captions or e.repeat > 1 else []
        data.update(json.dumps([e.key, e.caption, e.fields, *more], default=str).encode())
    return {
        "recipe": recipe.plain, "weights": weight_hashes(info), "pictures": len(examples), "data": data.hexdigest(),
    }  # fmt: skip


def alike(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that must be equal in all processes, by name: all but locations and loader settings."""
    told: dict[str, Any] = {k: v for k, v in facts.items() if k != "recipe"}
    for name, section in facts["recipe"].items():
        parts = {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {}
        told |= parts or {name: section}
    return {k: v for k, v in told.items() if k not in (*PLACES, "data.workers", "data.cache_folder")}


def same_run(out: Path, recipe: Recipe, now: dict[str, Any], processes: int) -> int:
    """Write run.json, or raise InputError if its recipe or data differ from `now`; return the passes of a step.

    now: the result of `facts_of`.
    """
    path = out / "run.json"
    if path.exists():
        before = read_json(path)
        differs = _difference({k: v for k, v in before.items() if k in now}, now)
        if differs is not None:
            key, old, new = differs
            raise InputError(
                f"{place(path)}: {key}: was {shown(old)}, is now {shown(new)}: take another folder, or change it back"
            )
        passes = passes_of(before, recipe, processes, place(path))
        if before.get("processes", 1) > 1 and "passes" not in before:
            log.warning(
                "%s: was begun by a genkit that drew noise by process; from here on it is by place", place(path)
            )
        first, train = before["recipe"]["train"]["steps"], recipe.train
        if train.steps != first and train.lr_scheduler != "constant":
            falls = f"lr_scheduler {train.lr_scheduler} falls over all of them, so the learning rate changes at once"
            log.warning("train.steps: was %d at first, is now %d: %s", first, train.steps, falls)
        return passes
    passes = passes_of(None, recipe, processes, place(path))
    with disk(path):
        write_whole(path, json_line({**now, "passes": passes}).encode())
    return passes


def _difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    field = key.removeprefix("recipe.") if key.startswith("recipe.") else ""
    moved = field in PLACES and not isinstance(old, int | float) and not isinstance(new, int | float)
    if field in FREE or moved:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            found = _difference(old.get(name), new.get(name), f"{key}.{name}".strip("."))
            if found is not None:
                return found
        return None
    return None if old == new else (key, old, new)
