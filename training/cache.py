"""Cache of latents and embeddings on disk, in shards named by a hash of what they are computed from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from genkit.durable import disk, write_whole
from genkit.progress import Steps
from genkit.training.data import Batch, Pictures, batches, turned
from genkit.training.state import fold

SHARD, TOGETHER = 256, 32  # approximate number of pictures of a shard, and of a batch that is encoded
VERSION = 2  # of augmentation and of the format: another version invalidates the cache
# The keys of a recipe's `data` that the tensors depend on, besides the pictures, their captions and their sizes.
SETTINGS = {"captions", "caption_shuffle", "crop", "flip", "zoom", "background", "recolour", "conditioning"}


class Cached:
    """Pictures with cached tensors, variant (epoch % data.cache) of each; order and caption dropout stay random."""

    def __init__(self, pictures: Pictures, rows: dict[tuple[int, int], tuple[Path, int]]) -> None:
        self.pictures, self.data, self.seed, self.buckets = pictures, pictures.data, pictures.seed, pictures.buckets
        self._rows = rows
        self._files: dict[Path, dict[str, torch.Tensor]] = {}

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """Return a Batch with tensors, and without pixels and captions."""
        indices, turns = turned(self.data, len(self.pictures), indices, epoch)
        rows = [self._row(index, turn % self.data.cache) for index, turn in zip(indices, turns, strict=True)]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        dropped = torch.tensor([self.pictures.dropped(*place) for place in zip(indices, turns, strict=True)])
        keys = [self.pictures.examples[i].key for i in indices]
        return Batch(torch.empty(0), [], keys, torch.empty(0), torch.ones(len(rows)), dropped, tensors)

    def _row(self, index: int, variant: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        path, row = self._rows[index, variant]
        if path not in self._files:
            self._files[path] = load_file(path)  # memory-mapped: only the rows that are used are read
        return {name: tensor[row] for name, tensor in self._files[path].items()}


@dataclasses.dataclass(frozen=True)
class _Shard:
    path: Path
    members: list[int]
    variant: int


def encoded(
    pictures: Pictures, encode: Callable[[Batch], dict[str, torch.Tensor]], folder: Path, fingerprint: Any, quiet: bool,
    rank: int = 0, world: int = 1,
) -> Cached:  # fmt: skip
    """Return `pictures` with the outputs of `encode` cached in `folder`; missing or damaged shards are computed.

    fingerprint: anything else that the tensors depend on, as JSON. rank, world: this process, and the number of
    processes that share the work. Raises HostError for a failing disk.
    """
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        digests = _digests(pictures, folder / "digests.json")
    later = {"conditioning"} if pictures.data.conditioning is None else set()  # caches from before it stay valid
    settings = json.loads(pictures.data.model_dump_json(include=SETTINGS - later))
    base = json.dumps([VERSION, fingerprint, settings, pictures.seed], sort_keys=True)
    plan = []
    for shape, members in sorted(pictures.buckets.items()):
        parts: dict[int, list[int]] = defaultdict(list)
        count = 2 ** max(0, math.ceil(math.log2(len(members) / SHARD)))
        for index in members:  # by name, so that adding or removing a picture changes only its own shard
            parts[fold("shard", pictures.examples[index].key) % count].append(index)
        for variant in range(pictures.data.cache):
            for part in parts.values():
                sources = [
                    (e.key, e.caption, e.fields, digests[i], *e.captions) for i in part for e in (pictures.examples[i],)
                ]
                name = hashlib.sha256(json.dumps([base, variant, shape, sources], default=str).encode()).hexdigest()
                plan.append(_Shard(folder / name[:2] / f"{name}.safetensors", part, variant))
    _fill([shard for shard in plan[rank::world] if not _whole(shard.path)], pictures, encode, quiet)
    return Cached(pictures, {(i, s.variant): (s.path, row) for s in plan for row, i in enumerate(s.members)})


def _fill(missing: list[_Shard], pictures: Pictures, encode: Callable[[Batch], Any], quiet: bool) -> None:
    """Compute and write shards one by one; an interruption loses at most one."""
    from safetensors.torch import save

    total, done, began = sum(len(shard.members) for shard in missing), 0, time.monotonic()
    places = []
    for shard in missing:
        epoch, copy = divmod(shard.variant, pictures.data.repeat)  # the epoch in which that variant is used
        members = [index + copy * len(pictures) for index in shard.members]
        places += [(epoch, members[i : i + TOGETHER]) for i in range(0, len(members), TOGETHER)]
    feed = batches(pictures, places, pictures.data.workers)
    with Steps(quiet=quiet) as progress:
        for shard in missing:
            found = []
            for _ in range(0, len(shard.members), TOGETHER):
                _, batch = next(feed)
                found.append({name: tensor.cpu() for name, tensor in encode(batch).items()})
                done += len(batch.keys)
                rate = done / (time.monotonic() - began)
                progress(done, total, f"encoded {done} of {total} pictures, {rate:.1f} a second")
            kept = {name: torch.cat([encoded[name] for encoded in found]).contiguous() for name in found[0]}
            with disk(shard.path):
                shard.path.parent.mkdir(exist_ok=True)
                write_whole(shard.path, save(kept, {"crc32": str(_sum(kept))}))


def _whole(path: Path) -> bool:
    """Return whether a shard exists and its checksum is right."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            return (file.metadata() or {}).get("crc32") == str(_sum(kept))
    except (OSError, SafetensorError):
        return False


def _sum(tensors: Mapping[str, torch.Tensor]) -> int:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, zlib.crc32(name.encode(), found))
    return found


def _digests(pictures: Pictures, path: Path) -> list[str]:
    """Return the SHA-256 of each picture; unchanged files are not read again. Raises OSError."""
    try:
        known = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    states: dict[str, list[int]] = {}
    names = []
    for example in pictures.examples:
        named: list[Any] = []
        for file, *where in example.places:
            if file not in states:
                status = os.stat(file)
                states[file] = [status.st_size, status.st_mtime_ns]
            named += [os.path.abspath(file), *where, *states[file]]
        names.append(json.dumps(named))
    found = {name: known.get(name) or e.digest() for name, e in zip(names, pictures.examples, strict=True)}
    if found.keys() - known.keys():
        write_whole(path, json.dumps({**known, **found}).encode())
    return [found[name] for name in names]
