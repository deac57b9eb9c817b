"""Runs of many workers on a real Ray of this machine, also while its processes are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from genkit import Request, generate
from genkit.cluster import crew, raypool
from genkit.runs.records import parts_of
from tests.check_run import check, outcome
from tests.killed_workers import IMAGES, counted, killed, rows_of
from tests.tiny import tiny_stable_diffusion

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
STEPS = 15


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tiny_stable_diffusion(tmp_path_factory.mktemp("model") / "tiny")
    return {"model": str(folder), "clip": "none", "batch_size": 1}


def test_three_workers_draw_what_one_process_draws(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them slowly: in the end the others take over what it has not begun."""
    monkeypatch.setattr(crew, "usable_cores", lambda: 3)
    monkeypatch.setattr(raypool, "_actor", lambda: straggling(plain(), tmp_path / "given"))
    rows = rows_of(9)
    generate(rows, tmp_path / "one", quiet=True, **model)
    summary = generate(rows, tmp_path / "three", quiet=True, workers=3, **model)
    assert (summary.exit_code, summary.new) == (0, 9 * IMAGES)
    assert outcome(tmp_path / "three") == outcome(tmp_path / "one")
    assert check(tmp_path / "three") == [] and parts_of(tmp_path / "three") == []
    assert "w0002" in (tmp_path / "given").read_text()


def test_killed_workers_and_drivers_lose_nothing(model: dict[str, Any], tmp_path: Path) -> None:
    """As `python -m tests.killed_workers`, which kills 30 workers and 3 drivers, does."""
    rows, run = rows_of(20), tmp_path / "run"
    generate(rows, tmp_path / "one", quiet=True, **model)
    fell = killed(rows, run, Path(model["model"]), 3, 1, pause=(0.0, 0.5))
    assert fell.workers and fell.drivers and not fell.outlived
    assert outcome(run) == outcome(tmp_path / "one")
    found = counted(run, rows)
    assert (found["lost"], found["twice"], found["torn"]) == (0, 0, 0)


def test_a_row_that_kills_its_workers_is_set_aside(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Real processes: the third that dies when it reads that prompt is the last; the next start draws it."""
    rows = [*rows_of(4), Request(id="bad", prompt="a deadly fox", num_images=1, num_inference_steps=STEPS)]
    rows = [rows[4], *rows[:4]]
    generate(rows, tmp_path / "one", quiet=True, **model)
    with monkeypatch.context() as patch:
        patch.setattr(raypool, "_actor", lambda: deadly(plain()))
        summary = generate(rows, tmp_path / "run", workers=2, **model)
    assert (summary.exit_code, summary.failed) == (1, 1)
    said = capfd.readouterr().err
    assert said.count("died: its process ended") == 3
    assert "row bad: set aside: 3 workers died while it was drawn: its process ended" in said
    assert not any(word in said for word in ("RAY_", "raylet", "WARNING", "ERROR", "Traceback"))  # of Ray itself
    assert {one for one in outcome(tmp_path / "one") if one[0] != "bad"} < outcome(tmp_path / "run")
    assert check(tmp_path / "run") == []
    assert generate(rows, tmp_path / "run", quiet=True, **model).new == 1
    assert outcome(tmp_path / "run") == outcome(tmp_path / "one") and check(tmp_path / "run") == []


def test_an_address_without_a_cluster_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "genkit", "generate", "--prompt", "a", "-o", str(tmp_path / "x")]
    found = subprocess.run([*command, "--ray", "127.0.0.1:1"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert found.returncode == 3 and "no cluster answers at 127.0.0.1:1" in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr and not (tmp_path / "x").exists()


plain = raypool._actor


def deadly(actor: type) -> type:
    """A worker whose process is killed once it is to read a prompt with "deadly" in it."""

    class GenkitWorker(actor):
        def __init__(self, *told: Any) -> None:
            from genkit.components.text import TextEncoder

            def read(self: Any, prompts: Any, *more: Any, **named: Any) -> Any:
                if "deadly" in str(prompts):
                    os.kill(os.getpid(), signal.SIGKILL)
                return encode(self, prompts, *more, **named)

            encode, TextEncoder.__call__ = TextEncoder.__call__, read  # type: ignore[assignment, method-assign]
            super().__init__(*told)

    return GenkitWorker


def straggling(actor: type, log: Path) -> type:
    """A worker; the last of three takes a second and a half for each picture. What each gave back is in `log`."""

    class GenkitWorker(actor):
        def open(self) -> Any:
            unet = self.worker.parts[0].unet
            forward = unet.forward

            def late(*told: Any, **named: Any) -> Any:
                time.sleep(1.5 / STEPS)
                return forward(*told, **named)

            if self.worker.name == "w0002":
                unet.forward = late
            return super().open()

        def give_back(self) -> Any:
            found = super().give_back()
            with open(log, "a") as file:
                file.writelines(f"{self.worker.name}\n" for one in found[0] for _ in one.indexes)
            return found

    return GenkitWorker
