"""Progress where there is no terminal: lines now and then."""

from __future__ import annotations

import pytest

from genkit.progress import Progress, Steps


def test_the_time_to_go_is_not_guessed_from_the_first_image_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("genkit.progress.time.monotonic", lambda: now[0])
    with Progress(32) as progress:
        for n in range(17):
            now[0] += 20 if n in (0, 16) else 0
            progress.advance(0, 1, 32)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 32 images, 1 passed, 0 failed",
        "17 of 32 images, 0.80 a second, 0:19 to go, 17 passed, 0 failed",
    ]


def test_the_rate_of_images_that_come_evenly_is_that_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("genkit.progress.time.monotonic", lambda: now[0])
    with Progress(200, done=50) as progress:
        for _ in range(60):
            now[0] += 0.5
            progress.advance(0, 1, 200)
    assert capsys.readouterr().err.splitlines() == [
        f"{done} of 200 images, 2.00 a second, {left} to go, {done - 50} passed, 0 failed"
        for done, left in ((70, "1:05"), (90, "0:55"), (110, "0:45"))
    ]


def test_plain_lines_of_progress_say_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("genkit.progress.time.monotonic", lambda: now[0])
    with Steps() as say:
        for done, text in ((300, "begun"), (330, "on"), (331, "too soon"), (400, "done")):
            say(done, 400, text)
            now[0] += 60 if done == 300 else 1
    assert capsys.readouterr().err.splitlines() == [" 75 %  begun", " 82 %  on, 2:20 to go", "100 %  done"]
