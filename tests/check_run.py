"""An independent checker of run folders: the standard library and Pillow, nothing of genkit.

python tests/check_run.py RUN      lists what is wrong; exit code 1 when something is
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file; a line that is none is left out, and so is what follows the last newline."""
    found = []
    if not path.exists():
        return []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def newest(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The last record of each image, those whose picture was set aside left out."""
    files = [folder / "results.jsonl", *sorted(folder.glob("results-*.jsonl"))]
    records = [line for file in files for line in lines_of(file) if "id" in line and "status" in line]
    found = {(line["id"], line["index"]): line for line in records}
    return {key: line for key, line in found.items() if line["status"] != "replaced"}


def outcome(folder: Path) -> set[tuple[Any, ...]]:
    """What a run came to, whatever the order and the interruptions."""
    return {(*key, line["seed"], line["status"], line["sha256"]) for key, line in newest(folder).items()}


def check(folder: Path, finished: bool = True) -> list[str]:
    """What is wrong with a run folder (invariants I1 to I4); `finished`: that every image asked for must be there."""
    wrong: list[str] = []
    rows = {row["id"]: row for row in lines_of(folder / "requests.jsonl")}
    records = newest(folder)
    if (folder / "results.jsonl").exists() and not (b"\n" + (folder / "results.jsonl").read_bytes()).endswith(b"\n"):
        wrong.append("I7 results.jsonl ends in a torn line")
    for row_id, row in rows.items() if finished else ():
        for index in range(row["num_images"]):
            if records.get((row_id, index), {}).get("status") not in ("done", "failed", "pruned"):
                wrong.append(f"I1 {row_id}, {index}: neither done nor failed")
    done = {key: line for key, line in records.items() if line["status"] == "done"}
    for key, line in done.items():
        wrong += [f"I2 {key}: {text}" for text in _file(folder, line)]
    present = {p.relative_to(folder).as_posix() for p in (folder / "images").rglob("*") if not p.is_dir()}
    present |= {p.name for p in folder.glob(".tmp-*")}
    for name in sorted(present - {line["file"] for line in done.values()}):
        if finished or not name.split("/")[-1].startswith(".tmp-"):
            wrong.append(f"I3 {name}: no record is about it")
    for name, times in Counter(line["file"] for line in done.values()).items():
        if times > 1:
            wrong.append(f"I4 {name}: belongs to {times} images")
    seeds = Counter((line["id"], line["seed"]) for line in done.values())
    wrong += [f"I4 {key}: one seed for {n} images" for key, n in seeds.items() if n > 1]
    return wrong


def _file(folder: Path, line: dict[str, Any]) -> list[str]:
    path = folder / line["file"]
    if path.is_symlink() or not path.is_file():
        return ["no file"]
    data = path.read_bytes()
    if len(data) != line["bytes"] or hashlib.sha256(data).hexdigest() != line["sha256"]:
        return ["size or SHA-256 differs"]
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:
        return [f"does not load: {error}"]
    return []


def check_run(folder: Path, finished: bool = False) -> None:
    """Assert that nothing is wrong with a run folder."""
    assert not (wrong := check(folder, finished)), "\n".join(wrong)


def grown(before: bytes, after: bytes) -> bool:
    """Whether results.jsonl lost nothing but a torn last line (invariant I7)."""
    return after.startswith(before[: before.rfind(b"\n") + 1])


if __name__ == "__main__":
    problems = check(Path(sys.argv[1]))
    print("\n".join(problems) or "nothing wrong")
    sys.exit(bool(problems))
