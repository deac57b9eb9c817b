"""Which images of a run must be drawn again on resume: outdated or damaged ones, with the reasons."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from genkit.errors import shown
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.records import Key, read_config, read_results
from genkit.storage import StoragePath

HASHED = 8 * 2**30  # bytes of images whose hash is checked, newest first; of the rest only the size
STORED_HASHED = 2**26  # the same on storage, where reading is what costs
# Fields that affect only which images are kept.
_DECIDING = {"num_images", "keep", "gate", "rank_by", "max_images", "meta", "prune", "detect", "ask"}


NEW_LABELS = "labels changed"


def outdated(results: Iterable[Result], rows: Mapping[str, Request], fingerprints: Mapping[str, str]) -> dict[Key, str]:
    """Return the images that no longer match their row, each with the reason.

    New labels are a reason, too, since p is a softmax over all of them; the caller rescores such images if it can.
    """
    found: dict[Key, str] = {}
    for r in results:
        labels = rows[r.id].labels
        if r.fingerprint != fingerprints[r.id]:
            found[r.id, r.index] = "row changed"
        elif r.status == "done" and labels is not None and set(r.scores.get("p") or ()) != set(labels):
            found[r.id, r.index] = NEW_LABELS
        elif r.status == "pruned" and rows[r.id].prune is None:
            found[r.id, r.index] = "prune taken away"
    return found


def kept_of(folder: Path, rows: Sequence[Request]) -> dict[str, int]:
    """Return how many images of a run are finished, and how many of these are drawn again as their rows have changed.

    {} for a folder without a run. Files are not looked at. Raises InputError, HostError.
    """
    if read_config(folder) is None:
        return {}
    asked = {str(row.id): row for row in rows}
    done = [r for r in read_results(folder) if r.status == "done" and r.id in asked]
    old = outdated(done, asked, {row_id: row.fingerprint() for row_id, row in asked.items()})
    return {"finished": len(done), "drawn_again": sum(why != NEW_LABELS for why in old.values())}


def damaged(folder: Path, done: Sequence[Result]) -> tuple[dict[Key, str], int]:
    """Return what is wrong with the files of finished images, and how many were hashed.

    Size alone does not detect a zeroed tail, a flipped bit, or another image's content: only the hash does. Of images
    on storage, which has checksums of its own, sizes are listed, and fewer are hashed.
    """
    newest_first = list(reversed(done))
    stored = isinstance(folder, StoragePath)
    left, hashed = STORED_HASHED if stored else HASHED, []
    for r in newest_first:
        left -= r.bytes or 0
        hashed.append(left >= 0)
    check = _check_on(folder) if isinstance(folder, StoragePath) and done else _damage
    with ThreadPoolExecutor(16 if stored else 4) as pool:
        found = pool.map(lambda r, whole: check(folder / str(r.file), r, whole), newest_first, hashed)
        texts = {(r.id, r.index): text for r, text in zip(newest_first, found, strict=True) if text is not None}
    return texts, sum(hashed)


def _damage(path: Path, r: Result, hashed: bool) -> str | None:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    if not stat.S_ISREG(found.st_mode):
        return "no file of its own"
    return _differs(path, found.st_size, r, hashed)


def _differs(path: Path, size: int, r: Result, hashed: bool) -> str | None:
    """Return how a file of this size differs from the record, if it does."""
    if size != r.bytes:
        return f"has {size} bytes, and had {r.bytes}"
    if hashed and hashlib.sha256(path.read_bytes()).hexdigest() != r.sha256:
        return "has another content than was recorded"
    return None


def _check_on(folder: StoragePath) -> Callable[[Path, Result, bool], str | None]:
    """Return what `_damage` does, for a folder on storage that is listed once."""
    sizes = folder.sizes()

    def damage(path: Path, r: Result, hashed: bool) -> str | None:
        size = sizes.get(str(r.file))
        return "missing" if size is None else _differs(path, size, r, hashed)

    return damage


def announcements(
    lost: Iterable[Key], before: Mapping[str, dict[str, Any]], rows: Mapping[str, Request]
) -> Iterator[str]:
    """Yield a line for each row of the outdated images `lost`: its id, and each field that changed, old -> new."""
    for row_id in dict.fromkeys(row_id for row_id, _ in lost):
        old, new = before.get(row_id, {}), rows[row_id].to_json()
        fields = [f for f in {**old, **new} if f not in _DECIDING and old.get(f) != new.get(f)]
        changes = ", ".join(f"{f}: {_brief(old.get(f))} -> {_brief(new.get(f))}" for f in fields)
        yield f"row {row_id}: {changes or 'its input changed'}; drawn again, old images in replaced/"


def _brief(value: Any) -> str:
    return "none" if value is None else shown(value)
