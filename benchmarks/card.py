"""Everything that wants a GPU, the most important first, fitted into some minutes: tests, then the tables.

    python benchmarks/card.py [--minutes 8] [--out FOLDER]
    python benchmarks/card.py --tiny         # every part on a CPU with tiny networks: does it run?

Each line is printed as it comes; FOLDER gets a log of every part, and the tables as JSON. A part that would begin after
the minutes are over is left out, and said. Exits 1 if a part failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Not all of tests/: its other folders need packages that a machine with a card may lack, and are not about cards.
TESTED = ("tests/device", "tests/training/test_devices.py")
TESTS = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "--tb=short", "-n", "6", "-m", "cuda", *TESTED]


def parts(out: Path, tiny: bool) -> dict[str, tuple[list[str], float]]:
    """Return name -> (command, most seconds)."""

    def script(name: str, *words: str) -> list[str]:
        return [sys.executable, str(HERE / name), *words]

    table = script("gpu.py", *(["--tiny"] if tiny else []))
    network = script("network.py", *(["--tiny", "--rows", "2"] if tiny else ["--rows", "4", "32", "64"]), "--kernels")
    steps = ["--steps", "4", "--batch", "2"] if tiny else []
    others = ("one", "interval", "mixed", "low")
    senses = ["--tiny", "--pictures", "2"] if tiny else ["--pictures", "200", "--batch", "32", "--device", "cuda"]
    return {
        "tests": (TESTS, 90),
        "sd15": ([*table, "--only", "sd15", "--lines", "3", "--profile", "--json", f"{out}/sd15.json"], 300),
        "network": (network, 90),
        "training": (script("training.py", "--runs", "1", *steps), 120),
        "sdxl": ([*table, "--only", "sdxl", "--lines", "2", "--json", f"{out}/sdxl.json"], 300),
        "senses": (script("vision.py", "--rounds", "1", *senses), 180),
        **({} if tiny else {"compiled": (script("training.py", "--runs", "1", "--compile"), 180)}),
        "others": ([*table, "--only", *others, "--json", f"{out}/others.json"], 600),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/card"))
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + 60 * given.minutes, []
    for name, (command, most) in parts(given.out, given.tiny).items():
        if given.only and name not in given.only:
            continue
        left = end - time.monotonic()
        if left < 15:
            print(f"== {name}: left out after {given.minutes:g} minutes", flush=True)
            continue
        print(f"== {name}, at most {min(most, left):.0f} s", flush=True)
        code = run(command, given.out / f"{name}.log", min(most, left))
        if code not in (0, 5):  # 5: pytest found no test for this machine
            failed.append(name)
            print(f"== {name}: exit code {code}", flush=True)
    return 1 if failed else 0


def run(command: list[str], log: Path, most: float) -> int:
    """Run a command, printing and keeping its lines; after `most` seconds it is interrupted, so that it may sum up."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    began = time.monotonic()
    with log.open("w") as kept, subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        late = f"sleep {most:.0f}; kill -INT -{process.pid}; sleep 10; kill -9 -{process.pid}"
        killer = subprocess.Popen(["sh", "-c", late], stderr=subprocess.DEVNULL, start_new_session=True)
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
        code = process.wait()
        os.killpg(killer.pid, signal.SIGKILL)
        killer.wait()
    print(f"   {time.monotonic() - began:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
