"""Where the time goes: phases within phases, threads, the first picture, and the command that prints it."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

from genkit import phases
from genkit.cli import run
from genkit.phases import first_picture, phase, record, report


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_recording", None)


class Clock:
    """The module `time`, whose seconds pass when somebody sleeps."""

    CLOCK_BOOTTIME, clock_gettime = time.CLOCK_BOOTTIME, time.clock_gettime
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(phases, "time", found := Clock())
    return found


def seconds(lines: list[str]) -> dict[str, float]:
    """Return "main load" -> seconds, of lines as report() gives them."""
    found = {}
    for line in lines:
        match = re.fullmatch(r"  (\S+) +(\S.*?) +([\d.]+) s +[\d.]+ %(  \d+ times)?", line)
        if match:
            found[f"{match[1]} {match[2]}"] = float(match[3])
    return found


def test_nothing_is_recorded_unless_asked_for() -> None:
    with phase("load"):
        pass
    first_picture()
    assert report() == []


def test_a_phase_within_another_is_not_counted_twice(clock: Clock) -> None:
    record()
    with phase("load"):
        with phase("read"):
            clock.sleep(0.1)
        clock.sleep(0.05)
    found = seconds(report())
    assert (found["main read"], found["main load"]) == (0.1, 0.05)


def test_threads_and_the_first_picture_have_their_own_lines(clock: Clock) -> None:
    record()

    def work() -> None:
        with phase("decode"):
            clock.sleep(0.05)
        first_picture()
        with phase("decode"):
            clock.sleep(0.1)

    thread = threading.Thread(target=work, name="genkit-decode_0")
    thread.start()
    thread.join()
    lines = report()
    (later,) = (k for k, line in enumerate(lines) if line.startswith("from then on"))
    assert (seconds(lines[:later])["decode decode"], seconds(lines[later:])["decode decode"]) == (0.05, 0.1)


def test_the_command_prints_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "--prompt", "a fox", "-n", "2", "--steps", "2", "--scheduler", "ddim", "--device", "cpu"]
    assert run([*asked, "-o", str(tmp_path / "run"), "--profile"]) == 0
    lines = capfd.readouterr().err.splitlines()
    found = seconds(lines)
    assert any(line.startswith("until the first picture: ") for line in lines)
    for name in ("read and check rows and model", "unet: read weights", "network and solver", "decode", "score"):
        assert f"main {name}" in found, name
    assert "write encode pictures" in found and "write save to disk" in found
