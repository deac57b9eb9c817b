"""What the networks are told of each picture, computed once and kept on the disk under a name made of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from genkit.durable import disk, write_whole
from genkit.progress import Steps
from genkit.training.data import Batch, Pictures

SHARD = 256  # pictures


class Cached:
    """Pictures whose tensors are read from the disk: variant epoch % `cache` of each; shuffled and dropped anew."""

    def __init__(self, pictures: Pictures, rows: dict[tuple[int, int], tuple[Path, int]]) -> None:
        self.pictures, self.data, self.seed, self.buckets = pictures, pictures.data, pictures.seed, pictures.buckets
        self._rows = rows
        self._files: dict[Path, dict[str, torch.Tensor]] = {}

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """Return a Batch with tensors, and without pixels and captions."""
        rows = [self._row(index, epoch % self.data.cache) for index in indices]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        dropped = torch.tensor([self.pictures.dropped(index, epoch) for index in indices])
        keys = [self.pictures.examples[i].key for i in indices]
        return Batch(torch.empty(0), [], keys, torch.empty(0), torch.ones(len(rows)), dropped, tensors)

    def _row(self, index: int, variant: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        path, row = self._rows[index, variant]
        if path not in self._files:
            self._files[path] = load_file(path)  # mapped: the system reads what is asked for
        return {name: tensor[row] for name, tensor in self._files[path].items()}


def encoded(
    pictures: Pictures, encode: Callable[[Batch], dict[str, torch.Tensor]], folder: Path, fingerprint: Any, quiet: bool
) -> Cached:
    """Return `pictures` with what `encode` makes of them kept in `folder`; only what is not there yet is computed.

    fingerprint: what else the tensors depend on, as JSON. Raises HostError when the disk does not do.
    """
    settings = pictures.data.model_dump(exclude={"path", "validation", "workers", "cache_folder", "repeat", "limit"})
    base = json.dumps([fingerprint, settings, pictures.seed, pictures.resolution], sort_keys=True)
    digests = [example.digest() for example in pictures.examples]
    rows: dict[tuple[int, int], tuple[Path, int]] = {}
    missing = []
    for variant in range(pictures.data.cache):
        for shape, members in sorted(pictures.buckets.items()):
            for at in range(0, len(members), SHARD):
                part = members[at : at + SHARD]
                told = [(e.key, e.caption, e.fields, digests[i]) for i in part for e in (pictures.examples[i],)]
                name = hashlib.sha256(json.dumps([base, variant, shape, told], default=str).encode()).hexdigest()
                path = folder / name[:2] / f"{name}.safetensors"
                rows |= {(index, variant): (path, row) for row, index in enumerate(part)}
                if not _whole(path):
                    missing.append((path, part, variant))
    count = sum(len(part) for _, part, _ in missing)
    with Steps(quiet=quiet) as say:
        done = 0
        for path, part, variant in missing:
            _keep(path, pictures, part, variant, encode)
            done += len(part)
            say(done, count, f"encoded {done} of {count} pictures")
    return Cached(pictures, rows)


def _keep(path: Path, pictures: Pictures, part: list[int], variant: int, encode: Callable[[Batch], Any]) -> None:
    from safetensors.torch import save

    found = [encode(pictures.batch(part[i : i + 16], variant)) for i in range(0, len(part), 16)]
    joined = {name: torch.cat([told[name] for told in found]).cpu().contiguous() for name in found[0]}
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(joined))


def _whole(path: Path) -> bool:
    """Return whether a shard is there and as long as its header says; it was renamed into place when it was whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
