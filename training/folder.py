"""The folder of a training run: who works in it, and whether it is the same run that goes on there."""

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
# What may change between the starts of a run; the rest decides on what comes of it.
FREE = ("train.steps", "train.max_seconds", "save", "evaluate", "data.workers", "data.cache_folder", "data.broken",
        "train.sharding", "train.gradient_accumulation_steps")  # fmt: skip
# Where data and model lie: what they hold decides, by hashes.
PLACES = ("data.path", "model", "prior.path", "data.validation")

_HELD: set[int] = set()  # handles of locks
# Processes that read pictures are copies of this one: when it is killed, they must not hold its folder for it.
os.register_at_fork(after_in_child=lambda: collections.deque(map(os.close, _HELD), maxlen=0))


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder alone, the first of several processes for all. Raises HostError where another run does."""
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
    """Raise InputError for a folder that holds something else."""
    others = ("model_index.json", "checkpoints", "results.jsonl")
    if not (out / "run.json").exists() and any((out / name).exists() for name in others):
        raise InputError(f"{place(out)}: holds something else than a training run: take another folder")


def facts_of(recipe: Recipe, info: ModelInfo, examples: list[Example]) -> dict[str, Any]:
    """Return what decides on a run: the recipe, and hashes of weights and data."""
    data = hashlib.sha256()
    for e in examples:
        more = [list(e.captions), e.repeat] if e.captions or e.repeat > 1 else []
        data.update(json.dumps([e.key, e.caption, e.fields, *more], default=str).encode())
    return {
        "recipe": recipe.plain, "weights": weight_hashes(info), "pictures": len(examples), "data": data.hexdigest(),
    }  # fmt: skip


def alike(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same in all processes of a run, by name: all of it but where things lie."""
    told: dict[str, Any] = {k: v for k, v in facts.items() if k != "recipe"}
    for name, section in facts["recipe"].items():
        parts = {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {}
        told |= parts or {name: section}
    return {k: v for k, v in told.items() if k not in (*PLACES, "data.workers", "data.cache_folder")}


def same_run(out: Path, recipe: Recipe, now: dict[str, Any], processes: int) -> int:
    """Write run.json, or raise InputError if the recorded recipe or data differ; return the passes of a step.

    now: of `facts_of`.
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
