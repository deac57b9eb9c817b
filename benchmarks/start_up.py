"""How long a command takes that needs no network, beside what importing diffusers takes on its own.

    python benchmarks/start_up.py [--repeat 5]

Whole processes, medians, and the most memory of any. Importing the pipeline class is the least that a script on
diffusers pays before it can even say that a prompt file has a mistyped key. The last filter decides on 100,000 images,
8 of each of 12,500 prompts, and writes their gallery; their scores are random and their files empty.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def measured(words: list[str], repeat: int, code: int) -> tuple[float, float]:
    """Return the median wall time and the peak memory, in MB, of a process that must end with `code`."""
    taken, peaks = [], []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        taken.append(time.perf_counter() - began)
        peaks.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != code:
            raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}, not {code}")
    return statistics.median(taken[1:]), max(peaks)  # the first reads everything from the disk


def big_run(folder: Path, rows: int = 12_500, each: int = 8) -> Path:
    """Write the records of a run of rows * each images, and empty files in their places."""
    from genkit.rows.request import Request
    from genkit.rows.result import Result

    requests = [Request(id=f"{i:06d}", prompt=f"picture {i} of a fox", num_images=each, seed=i) for i in range(rows)]
    (folder / "images").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"binding": {"seed": 0, "model": {"name": "none"}}, "info": {}}))
    (folder / "requests.jsonl").write_text("".join(json.dumps(r.to_json()) + "\n" for r in requests))
    lot = random.Random(0)
    with open(folder / "results.jsonl", "w") as file:
        for r in requests:
            for k in range(each):
                path = f"images/{r.id[:3]}/{r.id}-{k:02d}.png"
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).touch()
                result = Result(
                    r.id, k, k, file=path, bytes=1, sha256="0" * 64, width=128, height=128, steps=20, nfe=40, seconds=1,
                    scores={"clip": lot.random(), "nan": False, "flat": False}, prompt=r.prompt, fingerprint="0" * 16,
                )  # fmt: skip
                file.write(json.dumps(result.to_json()) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sys.path.insert(0, str(ROOT))
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bad.jsonl").write_text('{"promt": "a red fox"}\n')
        (folder / "good.txt").write_text("a red fox\na pizza\n")
        genkit, run = [sys.executable, "-m", "genkit"], str(folder / "run")
        made = ["generate", str(folder / "good.txt"), "-o", run, "--steps", "2"]
        subprocess.run([*genkit, *made], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, check=True)
        ways: dict[str, tuple[list[str], int]] = {
            "genkit --help": ([*genkit, "--help"], 0),
            "genkit generate, mistyped key": (
                [*genkit, "generate", str(folder / "bad.jsonl"), "-o", "x", "--dry-run"],
                2,
            ),
            "genkit generate --dry-run": ([*genkit, "generate", str(folder / "good.txt"), "-o", "x", "--dry-run"], 0),
            "genkit filter": ([*genkit, "filter", run, "--where", "clip > 0"], 0),
            "genkit inspect emoji": ([*genkit, "inspect", "emoji"], 0),
            "genkit generate, nothing left": ([*genkit, *made], 0),
            "import the diffusers pipeline": (
                [sys.executable, "-c", "from diffusers import StableDiffusionPipeline"],
                0,
            ),
        }
        big = [*genkit, "filter", str(big_run(folder / "big")), "--where", "clip > 0.3", "--keep", "2"]
        ways["genkit filter, 100,000 images"] = (big, 0)
        print(f"Python {platform.python_version()}, {os.cpu_count()} cores of {platform.machine()}")
        for title, (words, code) in ways.items():
            print("{:32} {:6.2f} s {:6.0f} MB".format(title, *measured(words, repeat, code)))


if __name__ == "__main__":
    main()
