"""How long a command takes that needs no network, beside what importing diffusers takes on its own.

    python benchmarks/start_up.py [--repeat 5]

Whole processes, medians. Importing the pipeline class is the least that a script on diffusers pays before it can even
say that a prompt file has a mistyped key.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def seconds(words: list[str], repeat: int, code: int) -> float:
    """Return the median wall time of a process that must end with `code`."""
    taken = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        process = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, check=False)
        taken.append(time.perf_counter() - began)
        if process.returncode != code:
            raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}, not {code}")
    return statistics.median(taken[1:])  # the first reads everything from the disk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        for title, (words, code) in ways.items():
            print(f"{title:32} {seconds(words, repeat, code):6.2f} s")


if __name__ == "__main__":
    main()
