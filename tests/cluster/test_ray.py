"""Runs of many workers on a real Ray of this machine, also while its processes are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genkit import Request, generate
from genkit.cluster import crew
from genkit.runs.records import parts_of
from tests.check_run import check, outcome
from tests.tiny import tiny_stable_diffusion

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("GENKIT_KILLS", "5"))  # of workers; by hand: GENKIT_KILLS=30 GENKIT_DRIVER_KILLS=3
DRIVER_KILLS = int(os.environ.get("GENKIT_DRIVER_KILLS", "1"))
ROWS, IMAGES, STEPS = 15 + 2 * KILLS, 4, 15


def rows_of(count: int) -> list[Request]:
    """Rows of the tiny model."""
    return [Request(id=f"r{n}", prompt=f"fox {n}", num_images=IMAGES, num_inference_steps=STEPS) for n in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tiny_stable_diffusion(tmp_path_factory.mktemp("model") / "tiny")
    return {"model": str(folder), "clip": "none", "batch_size": 1}


def test_three_workers_draw_what_one_process_draws(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "usable_cores", lambda: 3)
    rows = rows_of(9)
    generate(rows, tmp_path / "one", quiet=True, **model)
    summary = generate(rows, tmp_path / "three", quiet=True, workers=3, **model)
    assert (summary.exit_code, summary.new) == (0, 9 * IMAGES)
    assert outcome(tmp_path / "three") == outcome(tmp_path / "one")
    assert check(tmp_path / "three") == [] and parts_of(tmp_path / "three") == []


def test_killed_workers_and_drivers_lose_nothing(model: dict[str, Any], tmp_path: Path) -> None:
    rows, run = rows_of(ROWS), tmp_path / "run"
    generate(rows, tmp_path / "one", quiet=True, **model)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({k: v for k, v in r.to_json().items() if v is not None}) + "\n" for r in rows))
    moment, killed, drivers = random.Random(7), 0, 0
    while True:
        child = start(file, run, model)
        seen = pictures(run)
        while child.poll() is None and (killed < KILLS or drivers < DRIVER_KILLS):
            if pictures(run) <= seen:
                time.sleep(0.05)
                continue
            time.sleep(moment.uniform(0, 0.3))
            if drivers < DRIVER_KILLS and killed >= KILLS * (drivers + 1) // (DRIVER_KILLS + 1):
                child.kill()
                drivers += 1
                child.wait()
                break
            for worker in workers(child.pid)[:1]:
                os.kill(worker, signal.SIGKILL)
                killed += 1
            seen = pictures(run)
        _, said = child.communicate()
        assert child.returncode in (0, 1, -signal.SIGKILL), said
        assert "Traceback" not in said
        if child.returncode in (0, 1) and "set aside" not in said:
            break
    print(f"{killed} workers and {drivers} drivers were killed")
    assert killed and drivers
    assert check(run) == [] and outcome(run) == outcome(tmp_path / "one")


def test_an_address_without_a_cluster_is_one_line(tmp_path: Path) -> None:
    begun = time.monotonic()
    command = [sys.executable, "-m", "genkit", "generate", "--prompt", "a", "-o", str(tmp_path / "x")]
    found = subprocess.run([*command, "--ray", "127.0.0.1:1"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    print(time.monotonic() - begun)
    assert found.returncode == 3 and "no cluster answers at 127.0.0.1:1" in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr and not (tmp_path / "x").exists()


def start(file: Path, run: Path, model: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "genkit", "generate", str(file), "-o", str(run), "--workers", "2"]
    command += ["--model", model["model"], "--clip", "none", "--batch-size", "1"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def pictures(run: Path) -> int:
    return sum(1 for _ in run.glob("images/*.png"))


def workers(driver: int) -> list[int]:
    """The processes of workers below a driver."""
    parents = dict(_processes())
    found = []
    for pid in parents:
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        above = pid
        while above in parents and above != driver:
            above = parents[above]
        if name.startswith(b"ray::GenkitWorker") and above == driver:
            found.append(pid)
    return found


def _processes() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            yield int(path.parent.name), int(fields[1])
