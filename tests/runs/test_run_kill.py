"""A run killed at any moment, on a disk that fails at any call, by two processes: nothing is lost or torn."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genkit.errors import HostError
from genkit.runs.run import Run
from tests.check_run import check, grown, outcome
from tests.grids import thinned
from tests.null_run import CONFIG, draw, rows_of

ROOT = Path(__file__).parents[2]
ROWS, IMAGES, THREADS, SECONDS = 40, 5, 4, 0.06


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.null_run", str(folder), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"the child ended before {word!r}")


@pytest.mark.slow
def test_thirty_kills_at_random_moments(tmp_path: Path) -> None:
    draw(tmp_path / "whole", rows_of(ROWS, IMAGES), THREADS)
    wanted, moment = outcome(tmp_path / "whole"), random.Random(20261123)
    kills = attempt = 0
    while kills < 30:
        folder = tmp_path / f"killed-{attempt}"
        while kills < 30:
            child = start(folder, ROWS, IMAGES, THREADS, SECONDS)
            wait_for(child, "ready")
            time.sleep(moment.uniform(0, 0.12))
            child.kill()
            if child.wait() == 0:
                break  # it was done before the shot: the next goes at a fresh folder
            kills += 1
            child.communicate()
            journal = folder / "results.jsonl"
            before = journal.read_bytes() if journal.exists() else b""
            assert early(folder) == []
            with Run.open(folder, CONFIG, rows_of(ROWS, IMAGES)):
                pass
            assert grown(before, journal.read_bytes())
            assert check(folder, finished=False) == []
        draw(folder, rows_of(ROWS, IMAGES), THREADS)
        assert check(folder) == []
        assert outcome(folder) == wanted
        attempt += 1


CALLS = {"mkdir": [1, 2], "fsync": [1, 2, 4, 7], "replace": [1, 2, 3], "write": [1, 2, 3]}
POINTS = [(function, when) for function in CALLS for when in ("before", "after")] + [("write", "half")]


@pytest.mark.parametrize(("function", "when"), thinned(POINTS, 3, unpack=True))
def test_a_kill_at_an_exact_call(function: str, when: str, tmp_path: Path) -> None:
    draw(tmp_path / "whole", rows_of(2, 2))
    for count in CALLS[function]:
        folder = tmp_path / f"killed-{count}"
        killed(folder, f"{function}:{when}:{count}")
        assert early(folder) == []
        draw(folder, rows_of(2, 2))
        assert check(folder) == []
        assert outcome(folder) == outcome(tmp_path / "whole")


CHANGING = ("rename:before:1", "rename:after:1", "rename:after:2", "replace:before:1", "replace:after:1")


@pytest.mark.parametrize("point", thinned([*CHANGING, "write:before:1", "write:half:1", "write:after:1"], 3))
def test_a_kill_while_changed_rows_are_moved_aside(point: str, tmp_path: Path) -> None:
    draw(tmp_path / "whole", rows_of(2, 2))
    folder = tmp_path / "killed"
    draw(folder, rows_of(2, 2, negative_prompt="another"))
    old = {path.read_bytes() for path in (folder / "images").iterdir()}
    killed(folder, point)
    draw(folder, rows_of(2, 2))
    assert check(folder) == []
    assert outcome(folder) == outcome(tmp_path / "whole")
    assert old <= {path.read_bytes() for path in (folder / "replaced").iterdir()}


def killed(folder: Path, point: str) -> None:
    child = start(folder, 2, 2, 1, 0, point)
    assert child.wait() == -9, child.communicate()
    child.communicate()


def early(folder: Path) -> list[str]:
    """What is there too early: records without their picture, and pictures under their final name that do not load."""
    found = [text for text in check(folder, finished=False) if text.startswith("I2")]
    for path in folder.glob("images/*.png"):
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:
            found.append(f"{path.name}: {error}")
    return found


class FailingCall:
    """A function of os whose n-th call, or every call from the n-th, raises; a failing write writes a part."""

    def __init__(self, function: str, n: int, code: int, lasting: bool) -> None:
        self.real: Callable[..., Any] = getattr(os, function)
        self.function, self.n, self.code, self.lasting, self.calls = function, n, code, lasting, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.n or (self.lasting and self.calls > self.n):
            if self.function == "write":
                self.real(args[0], bytes(args[1])[:10])
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=["full", "broken", "read-only"])
@pytest.mark.parametrize("function", ["fsync", "replace", "write"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for-good"])
def test_a_disk_that_fails_at_the_nth_call(function: str, code: int, lasting: bool, tmp_path: Path) -> None:
    """Every n until the run gets through: a HostError, no torn picture, and the resumed run comes to the same."""
    draw(tmp_path / "whole", rows_of(2, 2))
    for n in range(1, 100):
        folder = tmp_path / f"failing-{n}"
        failing = FailingCall(function, n, code, lasting)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, function, failing)
            if failing_run(folder) is None:
                assert failing.calls < n
                return
        assert not list((folder / "images").glob(".tmp-*"))
        assert early(folder) == []
        draw(folder, rows_of(2, 2))
        assert check(folder) == []
        assert outcome(folder) == outcome(tmp_path / "whole")
    raise AssertionError("never got through")


def failing_run(folder: Path) -> HostError | None:
    try:
        draw(folder, rows_of(2, 2))
    except HostError as error:
        return error
    return None


@pytest.mark.parametrize("limit", thinned([0, 40, 100, 150, 400, 800, 1200], 3))
def test_files_that_may_not_grow(limit: int, tmp_path: Path) -> None:
    child = start(tmp_path / "run", 2, 2, 1, 0, f"limit:{limit}")
    _, message = child.communicate()
    assert child.returncode == 3
    assert message.count("\n") == 1
    assert "File too large" in message
    assert early(tmp_path / "run") == []
    draw(tmp_path / "run", rows_of(2, 2))
    assert check(tmp_path / "run") == []


def test_every_save_fails_after_the_journal_did(tmp_path: Path) -> None:
    """Else a later line would stand in a file that has lost an earlier one."""
    from tests.null_run import png, result_of

    rows = rows_of(3)
    with Run.open(tmp_path / "run", CONFIG, rows) as run:
        run.save(result_of(rows[0], 0), png(rows[0], 0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", FailingCall("write", 1, errno.ENOSPC, lasting=False))
            with pytest.raises(HostError, match="No space left"):
                run.save(result_of(rows[1], 0), png(rows[1], 0))
        with pytest.raises(HostError, match="No space left"):
            run.save(result_of(rows[2], 0), png(rows[2], 0))
        assert set(run.done) == {("r0", 0)}
    assert draw(tmp_path / "run", rows) == [("r1", 0), ("r2", 0)]
    assert check(tmp_path / "run") == []


def test_one_process_holds_a_folder_until_it_dies(tmp_path: Path) -> None:
    child = start(tmp_path / "run", 50, 1, 1, 5)
    wait_for(child, "open")
    with pytest.raises(HostError, match=rf"in use by another genkit \(process {child.pid}\)"):
        Run.open(tmp_path / "run", CONFIG, rows_of(50))
    child.kill()
    child.communicate()
    Run.open(tmp_path / "run", CONFIG, rows_of(50)).close()


def test_processes_that_start_together(tmp_path: Path) -> None:
    """On a new folder one of them makes the run; the others are refused, or come after it and find it done."""
    children = [start(tmp_path / "run", 20, 2, 2, 0.02) for _ in range(4)]
    codes = [child.wait() for child in children]
    for child in children:
        child.communicate()
    assert 0 in codes
    assert set(codes) <= {0, 3}
    assert check(tmp_path / "run") == []


@pytest.mark.parametrize("gone", ["run", "run/images", "run/results.jsonl"])
def test_a_folder_that_vanishes_mid_run(gone: str, tmp_path: Path) -> None:
    from tests.null_run import png, result_of

    rows = rows_of(2)
    with Run.open(tmp_path / "run", CONFIG, rows) as run:
        run.save(result_of(rows[0], 0), png(rows[0], 0))
        path = tmp_path / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(HostError, match="No such file"):
            run.save(result_of(rows[1], 0), png(rows[1], 0))
    assert draw(tmp_path / "run", rows) == [("r0", 0), ("r1", 0)]
