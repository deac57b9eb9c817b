"""A run that all senses look at, killed at random moments, compared with one that was not.

    python -m tests.killed_senses FOLDER [IMAGES] [KILLS]

Children are forked from a process that has imported torch, so that a start takes about a second. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import children
from tests.classifiers import tiny_classifier
from tests.detectors import tiny_owlvit
from tests.senses import tiny_blip_vqa

GATE = "count['a cat', 0.3] >= 1 and p_class['dog'] < 0.9 and answer['how many cat?'] != 'x' and clip > 0"
MORE = {"ask": ["a red fox in the snow?"], "detect": ["a dog", "a fox"]}  # asked of finished pictures


def write_models(folder: Path) -> None:
    """Write tiny models and two tables of rows: the second asks more."""
    tiny_owlvit(folder / "owl")
    tiny_classifier(folder / "cls")
    tiny_blip_vqa(folder / "vqa")


def write_rows(folder: Path, images: int) -> None:
    row = {"prompt": "a red fox", "num_images": images, "labels": ["a red fox", "a green apple"], "gate": GATE}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    (folder / "more.jsonl").write_text(json.dumps({**row, **MORE}))


def start(folder: Path, table: str, run: str, *most: int) -> int:
    """Fork a child that makes a run, one picture at a time; return its pid. most: pictures until it waits to die."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.chdir(folder)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        small = ["--steps", "1", "--width", "64", "--height", "64", "--device", "cpu", "--batch-size", "1"]
        senses = ["--detector", "owl", "--classifier", "cls", "--captioner", "vqa"]
        code = children.main(most, ["generate", table, "-o", run, *small, *senses])
    finally:
        os._exit(code)


def lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def killed(folder: Path, table: str, run: str, kills: int, most: int, moment: random.Random) -> int:
    """Kill a run at `kills` random moments, each within `most` new records, then let it end; return how many fell."""
    journal, fell = folder / run / "results.jsonl", 0
    for _ in range(kills):
        before, began = lines(journal), time.monotonic()
        wanted = before + moment.randint(0, most)
        child = start(folder, table, run, wanted - before + 1)
        extra = moment.uniform(0, 1.0 if wanted == before else 0.03)
        while lines(journal) < wanted and time.monotonic() - began < 200:
            if os.waitpid(child, os.WNOHANG)[0]:
                return fell
            time.sleep(0.001)
        time.sleep(extra)
        os.kill(child, signal.SIGKILL)
        fell += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    ended(start(folder, table, run))
    return fell


def ended(child: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, code


def records(run: Path) -> tuple[dict[str, Any], Counter[str]]:
    """Return the newest record of each picture, and how many there are of it in the journal."""
    found, count = {}, Counter[str]()
    for line in (run / "results.jsonl").read_text().splitlines():
        try:
            r = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        found[f"{r['id']}-{r['index']}"] = r
        count[f"{r['id']}-{r['index']}"] += 1
    return found, count


def same_pixels(folder: Path, a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether pictures are equal: all bytes, or but for the last bit of a few values, decoded in another batch."""
    if a["sha256"] == b["sha256"]:
        return True
    one, two = (np.array(Image.open(folder / run / r["file"])).astype(int) for run, r in (("whole", a), ("killed", b)))
    return one.shape == two.shape and abs(one - two).max() <= 1 and (one != two).mean() < 0.01


def same_boxes(a: list[Any], b: list[Any]) -> bool:
    """Whether boxes are equal in any order, in which those of one score may come; those at the floor may be absent."""

    def same(one: list[Any], other: list[Any]) -> bool:
        near = all(abs(x - y) <= 0.1 for x, y in zip(one[2:6], other[2:6], strict=True))  # pixels
        return one[0] == other[0] and abs(one[1] - other[1]) <= 2e-3 and near

    both = ((a, b), (b, a))
    return all(any(same(box, x) for x in others) or box[1] < 0.06 for boxes, others in both for box in boxes)


def alike(a: Any, b: Any, most: float) -> bool:
    """Whether scores are equal: numbers but for a share of `most`, of the rounding of a batch of another size."""
    if isinstance(a, dict) and isinstance(b, dict):
        same = a.keys() == b.keys() and all(alike(a[name], b[name], most) for name in a if name != "boxes")
        return same and same_boxes(a.get("boxes", []), b.get("boxes", []))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(alike(x, y, most) for x, y in zip(a, b, strict=True))
    return abs(a - b) <= most * max(1, abs(a)) if isinstance(a, float) and isinstance(b, float) else a == b


def check_alike(folder: Path, whole: dict[str, Any], killed: dict[str, Any]) -> None:
    """Raise AssertionError naming the picture that is another one, or has other scores.

    A random network may make some hundredths of the last bit of a pixel.
    """
    assert whole.keys() == killed.keys()
    for name, r in whole.items():
        other, bytes_too = killed[name], r["sha256"] == killed[name]["sha256"]
        assert same_pixels(folder, r, other), name
        assert alike(r["scores"], other["scores"], 2e-3 if bytes_too else 0.03), (name, r["scores"], other["scores"])


def compared(folder: Path, images: int, kills: int, seed: int = 3) -> dict[str, Any]:
    """Draw and ask with kills and without; return what was counted. Raises AssertionError for any difference."""
    moment = random.Random(seed)
    write_models(folder)
    write_rows(folder, images)
    began = time.monotonic()
    ended(start(folder, "rows.jsonl", "whole"))
    seconds = time.monotonic() - began
    found: dict[str, Any] = {"images": images, "seconds": round(seconds, 1)}
    found["kills"] = killed(folder, "rows.jsonl", "killed", kills, max(1, images // kills - 1), moment)
    whole, _ = records(folder / "whole")
    parts, count = records(folder / "killed")
    found["records"], found["most_of_one"] = sum(count.values()), max(count.values())
    assert len(whole) == images
    assert all({"boxes", "classes", "answers", "clip", "p"} <= r["scores"].keys() for r in whole.values())
    check_alike(folder, whole, parts)
    ended(start(folder, "more.jsonl", "whole"))
    before = lines(folder / "killed" / "results.jsonl")
    found["kills_asking"] = killed(folder, "more.jsonl", "killed", 3, max(1, images // 4), moment)
    (whole, _), (parts, count) = records(folder / "whole"), records(folder / "killed")
    found["asked_again"] = lines(folder / "killed" / "results.jsonl") - before
    found["most_of_one_asked"] = max(count.values())
    for r in whole.values():
        assert len(r["scores"]["answers"]) == 2 and len(r["scores"]["detected"]["words"]) == 3
    check_alike(folder, whole, parts)
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    home = Path(sys.argv[1])
    home.mkdir(parents=True, exist_ok=True)
    given = [int(word) for word in sys.argv[2:]]
    print(json.dumps(compared(home, *(given or [200]), *([] if len(given) > 1 else [10]))))
