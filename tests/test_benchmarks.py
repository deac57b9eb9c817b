"""The benchmark that needs a GPU runs on a CPU with tiny networks: a first run on a GPU does not fail on a typo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_gpu_benchmark_runs_with_tiny_networks(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--tiny", "--only", "interval", "--json", str(out)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["results"]
    assert [line["title"] for line in found] == ["genkit, all steps guided", "genkit, half of the steps guided"]
    assert all(line["images"] == 6 and line["per_second"] > 0 for line in found), done.stdout


@pytest.mark.slow
def test_vision_benchmark_runs_with_tiny_networks() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/vision.py", "--tiny", "--pictures", "4", "--side", "64", "--rounds", "1"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()[5:]] == [
        "detect", "segment", "classify", "caption", "florence", "depth",
    ]  # fmt: skip


@pytest.mark.slow
def test_verified_generation_prints_its_table(tmp_path: Path) -> None:
    words = ["--images", "2", "--steps", "1", "--limit", "1", "-o", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "benchmarks/verified.py", *words, "--tasks", "unusual colour,counting"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line[24:].split()[0] for line in done.stdout.splitlines()[2:]]
    assert lines == ["prompts", "before", "all", "best", "clip"] * 2
