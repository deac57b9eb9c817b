"""Hashes of large files are found once by the processes of a machine, and again whenever a file may be another."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from genkit.components import hashcache
from genkit.components.hashcache import shared


class Finder:
    """Counts how often a hash is found."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> str:
        time.sleep(0.02)
        self.count += 1
        return f"hash {self.count}"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashcache, "LARGE", 4)
    monkeypatch.setattr(hashcache, "SETTLED", -1.0)
    (tmp_path / "weights").write_bytes(b"12345")
    return tmp_path / "weights"


def test_those_that_ask_at_once_wait_for_the_first(file: Path, tmp_path: Path) -> None:
    find = Finder()
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: shared(file, "whole", find), range(4)))
    assert found == {"hash 1"} and find.count == 1
    assert shared(file, "weights", find) == "hash 2"  # another part of the file
    assert len(list((tmp_path / "cache" / "genkit" / "hashes").iterdir())) == 2


def test_a_file_that_may_be_another_is_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find, moment = Finder(), os.stat(file)
    assert shared(file, "whole", find) == "hash 1"
    file.write_bytes(b"54321")
    os.utime(file, ns=(moment.st_atime_ns, moment.st_mtime_ns))  # of the same size and time
    assert shared(file, "whole", find) == "hash 2"
    file.unlink()
    file.write_bytes(b"54321")
    assert shared(file, "whole", find) == "hash 3" == shared(file, "whole", find)
    monkeypatch.setattr("platform.node", lambda: "another")
    assert shared(file, "whole", find) == "hash 4"
    monkeypatch.undo()


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b'{"file": [1], "sha256": "x", "found": 0}'])
def test_a_damaged_entry_is_no_entry(file: Path, tmp_path: Path, left: bytes) -> None:
    find = Finder()
    shared(file, "whole", find)
    (entry,) = (tmp_path / "cache" / "genkit" / "hashes").iterdir()
    entry.write_bytes(left)
    assert shared(file, "whole", find) == "hash 2" == shared(file, "whole", find)


@pytest.mark.parametrize("why", ["old", "just changed", "small", "no folder"])
def test_what_is_not_kept(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    find = Finder()
    if why == "old":
        monkeypatch.setattr(hashcache, "FRESH", 0.0)
    elif why == "just changed":
        monkeypatch.setattr(hashcache, "SETTLED", 3600.0)
    elif why == "small":
        monkeypatch.setattr(hashcache, "LARGE", 6)
    else:
        (tmp_path / "cache").write_text("a file")
    assert [shared(file, "whole", find) for _ in range(2)] == ["hash 1", "hash 2"]
