"""What a power cut leaves: a file gets its name only once its bytes are on the disk, and a line only after the name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from genkit.components import inspect_model
from genkit.components.convert import convert
from genkit.durable import Journal, sync_folder, write_whole
from tests.tiny import tiny_stable_diffusion


class Disk:
    """Knows what would survive: the bytes that were synced, and for each name in a folder whether it was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[int, int] = {}  # inode -> bytes
        self.names: dict[Path, int] = {}  # path -> inode, as last synced
        self.replaced_early: list[str] = []
        fsync, replace = os.fsync, os.replace

        def synced(handle: int) -> None:
            fsync(handle)
            place = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if place.is_dir():
                self.names |= {path: path.stat().st_ino for path in place.iterdir()}
            else:
                self.synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

        def replaced(old: Path, new: Path) -> None:
            inside = [old, *Path(old).rglob("*")]
            files = [path.stat() for path in inside if path.is_file()]
            names = [path for path in inside if path != old]
            if any(self.synced.get(found.st_ino) != found.st_size for found in files) or not self.names.keys() >= {
                *names
            }:
                self.replaced_early.append(str(new))
            replace(old, new)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)

    def holds(self, path: Path) -> bool:
        """Whether the file would be there after a power cut, whole."""
        inode = path.stat().st_ino
        return self.names.get(path) == inode and self.synced.get(inode) == path.stat().st_size


def test_a_file_has_its_bytes_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, path = Disk(monkeypatch), tmp_path / "a.png"
    for data in (b"x" * 100_000, [b"new", b"er"]):
        write_whole(path, data)
        assert not disk.replaced_early and not disk.holds(path)
        sync_folder(tmp_path)
        assert disk.holds(path)


def test_a_converted_model_has_its_bytes_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_stable_diffusion(tmp_path / "tiny")
    disk = Disk(monkeypatch)
    convert(inspect_model(tmp_path / "tiny"), tmp_path / "model.safetensors")
    assert disk.holds(tmp_path / "model.safetensors") and not disk.replaced_early
    convert(inspect_model(tmp_path / "tiny"), tmp_path / "again")
    assert disk.names[tmp_path / "again"] == (tmp_path / "again").stat().st_ino and not disk.replaced_early


def test_a_line_is_on_the_disk_after_what_it_speaks_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    (tmp_path / "images").mkdir()
    picture, lines = tmp_path / "images" / "a.png", tmp_path / "results.jsonl"
    journal, write = Journal(lines), os.write
    before: list[bool] = []

    def written(handle: int, data: bytes) -> int:
        before.append(disk.holds(picture))
        return write(handle, data)

    monkeypatch.setattr(os, "write", written)
    write_whole(picture, b"a picture")
    journal.append([{"file": "a.png"}], [picture.parent])
    assert before == [True], "the picture first, then its line"
    assert disk.synced[lines.stat().st_ino] == lines.stat().st_size
    journal.close()
