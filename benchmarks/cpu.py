"""genkit beside diffusers on a CPU: the embedded model, float32, 20 steps, guidance 5, saved as PNG and scored.

    python benchmarks/cpu.py [--images 32] [--repeat 3] [--json FILE]

Every run is a process of its own, started from scratch, and the contestants take turns, so that a machine that slows
down slows all alike. `s an image` counts from the first network call to the last picture, `first` from process start to
the first picture. Medians, with the least and the most.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import contestants as c

MODELS = Path(__file__).parent.parent / "genkit" / "components" / "embedded"
CONTESTANTS = {
    "diffusers, batch 1": (c.diffusers_job, 1),
    "diffusers, batch 8": (c.diffusers_job, 8),
    "diffusers, batch 8, channels_last": (functools.partial(c.diffusers_job, channels_last=True), 8),
    "genkit generate": (c.genkit_job, 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.run, given.images, given.started)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(given.repeat):
        for name, runs in found.items():
            words = [
                sys.executable,
                __file__,
                "--run",
                name,
                "--images",
                str(given.images),
                "--started",
                str(time.time()),
            ]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{given.images} images, {platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
          f"{capability()}; median of {given.repeat} (least to most)")  # fmt: skip
    ours = median(found["genkit generate"], "seconds")
    print(f"{'':34}{'s an image':>24}{'genkit is':>11}{'first s':>9}")
    for name, runs in found.items():
        seconds = sorted(r["seconds"] for r in runs)
        spread = f"{median(runs, 'seconds'):.3f} ({seconds[0]:.3f} to {seconds[-1]:.3f})"
        print(f"{name:34}{spread:>24}{median(runs, 'seconds') / ours:>10.2f}x{median(runs, 'first'):>9.1f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def run(name: str, images: int, started: float) -> None:
    work, batch = CONTESTANTS[name]
    c.GUIDANCE = 5.0
    with tempfile.TemporaryDirectory() as out:
        outcome = work(
            c.Setup(MODELS / "emoji", MODELS / "emoji-clip", Path(out), "cpu", False, images, batch), started
        )
    print(json.dumps({"seconds": max(outcome.times) / images, "first": outcome.first}))


def median(runs: list[dict[str, float]], what: str) -> float:
    return statistics.median(r[what] for r in runs)


def capability() -> str:
    import torch

    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
