"""Runs of many workers on a real Ray, without kills and while its processes are killed, compared with one process.

    python -m tests.killed_workers FOLDER [--kills 30] [--driver-kills 3] [--workers 2] [--rows 150]

Prints a table, and exits with 1 when a picture is lost, there twice, torn, or another than that of one process. A
worker is killed at a random moment, 2 to 5 seconds after the first picture that came since the last kill.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from genkit import Request, cli, generate
from genkit.cluster import crew
from genkit.runs.records import parts_of
from tests.check_run import check, lines_of, newest, outcome
from tests.tiny import tiny_stable_diffusion

ROOT = Path(__file__).parents[1]
IMAGES = 4  # of a row
ENDED = (0, 1, 3, -signal.SIGKILL)  # exit codes after which the same command goes on; 1: a row was set aside


@dataclasses.dataclass
class Kills:
    """What fell. loading: workers that had not finished to load; starts: of the command; outlived: see `ended`."""

    workers: int = 0
    loading: int = 0
    drivers: int = 0
    starts: int = 0
    set_aside: int = 0
    outlived: int = 0
    codes: Counter[int] = dataclasses.field(default_factory=Counter)


def rows_of(count: int, steps: int = 15) -> list[Request]:
    """Rows of the tiny model."""
    return [Request(id=f"r{n}", prompt=f"fox {n}", num_images=IMAGES, num_inference_steps=steps) for n in range(count)]


def killed(
    rows: Sequence[Request], run: Path, model: Path, kills: int, drivers: int, workers: int = 2,
    pause: tuple[float, float] = (2.0, 5.0), seed: int = 7,
) -> Kills:  # fmt: skip
    """Draw `rows` with the command, killing workers and drivers, and start it again until all is drawn.

    pause: seconds between the first picture since the last kill, and the next. Raises AssertionError for an exit code
    or a traceback that a user should not see.
    """
    table = run.with_suffix(".jsonl")
    table.write_text("".join(json.dumps({k: v for k, v in r.to_json().items() if v is not None}) + "\n" for r in rows))
    moment, fell = random.Random(seed), Kills()
    turns = [True] * kills + [False] * drivers  # whether a worker's
    moment.shuffle(turns)
    while True:
        fell.starts += 1
        child = start(table, run, model, workers)
        _, said = _talk(child, run, turns, moment, pause, fell)
        fell.codes[child.returncode] += 1
        fell.set_aside += said.count("set aside")
        assert child.returncode in ENDED and "Traceback" not in said, (child.returncode, said)
        if child.returncode == 0:
            return fell


def _talk(
    child: subprocess.Popen[str], run: Path, turns: list[bool], moment: random.Random, pause: tuple[float, float],
    fell: Kills,
) -> tuple[str, str]:  # fmt: skip
    """Kill what the next turn says, until this start of the command has ended."""
    seen = pictures(run)
    while child.poll() is None and turns:
        if pictures(run) <= seen:
            time.sleep(0.05)
            continue
        time.sleep(moment.uniform(*pause))
        found = workers_of(child.pid)
        if child.poll() is not None or not (found or not turns[-1]):
            continue
        if turns[-1]:
            pid = moment.choice(sorted(found))
            os.kill(pid, signal.SIGKILL)
            fell.workers += 1
            fell.loading += ".load" in found[pid]
        else:
            child.kill()
            fell.drivers += 1
            fell.outlived += outlived(found)
        turns.pop()
        seen = pictures(run)
        print(f"kill {fell.workers + fell.drivers} at {seen} pictures", file=sys.stderr)
    return child.communicate()


def start(table: Path, run: Path, model: Path, workers: int) -> subprocess.Popen[str]:
    """Start the command; workers: also more than this machine has cores."""
    command = [sys.executable, "-m", "tests.killed_workers", "--command", str(workers), "generate", str(table)]
    command += ["-o", str(run), "--workers", str(workers), "--model", str(model), "--clip", "none", "--batch-size", "1"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def pictures(run: Path) -> int:
    return sum(1 for _ in run.glob("images/*.png"))


def outlived(pids: dict[int, str], seconds: float = 120.0) -> int:
    """Wait for workers to end; return how many did not."""
    until = time.monotonic() + seconds
    while (left := pids.keys() & dict(_processes()).keys()) and time.monotonic() < until:
        time.sleep(0.1)
    return len(left)


def workers_of(driver: int) -> dict[int, str]:
    """The processes of workers below a driver, and what each does by its title, as in ray::GenkitWorker.load."""
    parents = dict(_processes())
    found = {}
    for pid in parents:
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
        except OSError:
            continue
        above = pid
        while above in parents and above != driver:
            above = parents[above]
        if title.startswith("ray::GenkitWorker") and above == driver:
            found[pid] = title
    return found


def _processes() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            yield int(path.parent.name), int(fields[1])


def counted(run: Path, wanted: Sequence[Request]) -> dict[str, int]:
    """Return how many pictures a finished run has, has lost, has twice, and has torn; and how many were drawn again."""
    done = {key for key, line in newest(run).items() if line["status"] == "done"}
    keys = {(str(row.id), index) for row in wanted for index in range(row.num_images)}
    records = Counter((r["id"], r["index"]) for r in lines_of(run / "results.jsonl") if r.get("status") == "done")
    wrong = check(run)
    return {
        "pictures": len(done), "lost": len(keys - done), "twice": sum(n > 1 for n in records.values()),
        "torn": len(wrong) + len(parts_of(run)),
        "drawn again": sum(1 for path in (run / "replaced").rglob("*") if path.is_file()),
    }  # fmt: skip


def _clean(rows: Sequence[Request], run: Path, model: Path, workers: int) -> float:
    """Draw with so many workers and no kill; return the seconds."""
    table = run.with_suffix(".jsonl")
    table.write_text("".join(json.dumps({k: v for k, v in r.to_json().items() if v is not None}) + "\n" for r in rows))
    began = time.monotonic()
    child = start(table, run, model, workers)
    said = child.communicate()[1]
    assert child.returncode == 0, said
    return time.monotonic() - began


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--driver-kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True)
    model = tiny_stable_diffusion(given.folder / "tiny")
    rows, head = rows_of(given.rows, given.steps), ("run", "pictures", "lost", "twice", "torn", "hashes equal", "s")
    began = time.monotonic()
    generate(rows, given.folder / "one", quiet=True, model=str(model), clip="none", batch_size=1)
    wanted, wrong = outcome(given.folder / "one"), 0
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)

    def tell(name: str, run: Path, seconds: float) -> None:
        nonlocal wrong
        found, same = counted(run, rows), outcome(run) == wanted
        wrong += not same or any(found[key] for key in ("lost", "twice", "torn"))
        cells = [name, *(found[key] for key in head[1:5]), "yes" if same else "NO", f"{seconds:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

    tell("one process", given.folder / "one", time.monotonic() - began)
    for count in (1, 2, 3):
        run = given.folder / f"workers-{count}"
        tell(f"{count} workers", run, _clean(rows, run, model, count))
    run, began = given.folder / "killed", time.monotonic()
    fell = killed(rows, run, model, given.kills, given.driver_kills, given.workers)
    tell(f"{given.workers} workers, killed", run, time.monotonic() - began)
    again = counted(run, rows)["drawn again"]
    print(f"\nkills: {fell.workers} of live workers, {fell.loading} of them loading, and {fell.drivers} of the driver")
    print(f"starts of the command: {fell.starts}, exit codes {dict(sorted(fell.codes.items()))}")
    print(
        f"rows set aside and drawn by the next start: {fell.set_aside}; pictures without a record, drawn again: {again}"
    )
    print(f"workers that outlived their driver: {fell.outlived}")
    return int(wrong > 0 or fell.outlived > 0 or (fell.workers, fell.drivers) != (given.kills, given.driver_kills))


if __name__ == "__main__":
    if sys.argv[1] == "--command":
        cores = int(sys.argv[2])
        crew.usable_cores = lambda: cores
        sys.exit(cli.run(sys.argv[3:]))
    sys.exit(main(sys.argv[1:]))
