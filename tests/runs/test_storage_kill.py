"""Runs on a real S3 server that are killed, and whose server fails, come to what an uninterrupted local run is."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genkit import generate
from genkit.datasets.export import Target
from genkit.runs.records import read_results
from genkit.storage import StoragePath
from genkit.studies.filter import refilter
from genkit.studies.search import search
from tests.buckets import BUCKET, bucket, download, lasting_bucket
from tests.check_run import check, outcome
from tests.children import holding, start
from tests.null_run import draw, rows_of

ROOT = Path(__file__).parents[2]
COMMAND = "from genkit import storage; storage.PATIENCE = 1; from genkit.cli import main; main()"


def wait_for(count: int, there: Callable[[], int]) -> None:
    end = time.monotonic() + 200
    while there() < count:
        assert time.monotonic() < end, f"there were never {count}"
        time.sleep(0.1)


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = random.Random(20261128)
    draw(tmp_path / "local", rows_of(24, 5), 4)
    with bucket(monkeypatch):
        folder = StoragePath(f"s3://{BUCKET}/run")
        for _ in range(3):
            command = [sys.executable, "-m", "tests.null_run", str(folder), "24", "5", "4", "0.2"]
            child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            assert "open" in (line.strip() for line in child.stdout)
            time.sleep(moment.uniform(0, 1.5))
            child.kill()
            child.communicate()
            read_results(folder)
        draw(folder, rows_of(24, 5), 4)
        copy = download(folder, tmp_path / "copy")
        assert outcome(copy) == outcome(tmp_path / "local") and check(copy) == []


@pytest.mark.slow
def test_generate_on_storage_that_fails_killed_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"a red apple, number {n}\n" for n in range(4)))
    settings = {"num_inference_steps": 2, "num_images": 4}
    generate(tmp_path / "prompts.txt", tmp_path / "local", defaults=settings, quiet=True, batch_size=1)
    with bucket(monkeypatch) as proxy:
        folder = StoragePath(f"s3://{BUCKET}/run")
        words = ["generate", str(tmp_path / "prompts.txt"), "-o", str(folder), "--steps", "2", "-n", "4"]
        command = [sys.executable, "-c", COMMAND, *words, "--batch-size", "1"]
        proxy.after = 3, 503
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        _, said = child.communicate(timeout=200)
        assert child.returncode == 3 and said.splitlines()[-1].endswith("; run the same command again to continue")
        proxy.answer = None
        child = start([*holding(8), *words, "--batch-size", "1"])
        wait_for(6, lambda: len(read_results(folder)))
        child.kill()
        child.communicate()
        summary = generate(tmp_path / "prompts.txt", str(folder), defaults=settings, quiet=True, batch_size=1)
        assert summary.exit_code == 0 and 0 < summary.new < 11
        assert outcome(download(folder, tmp_path / "copy")) == outcome(tmp_path / "local")
        assert check(tmp_path / "copy") == []
        refilter(folder, keep=1, out=tmp_path / "tars", target=Target("webdataset"))
        assert list((tmp_path / "tars").glob("*.tar"))
        seen = search(str(folder), "an apple", k=3)
        assert len(seen.results) == 3 and seen.new == 0 and seen.results[0]["file"].startswith(f"{folder}/images/")


@pytest.mark.slow
def test_a_run_whose_server_is_killed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is killed; in the next one the server is, which starts again, and the run goes on; then it is killed."""
    (tmp_path / "prompts.txt").write_text("".join(f"a red apple, number {n}\n" for n in range(7)))
    settings = {"num_inference_steps": 2, "num_images": 4, "width": 64, "height": 64}
    generate(tmp_path / "prompts.txt", tmp_path / "local", defaults=settings, quiet=True, batch_size=1)
    with lasting_bucket(monkeypatch) as server:
        folder = StoragePath(f"s3://{BUCKET}/run")
        command = ["generate", str(tmp_path / "prompts.txt"), "-o", str(folder)]
        command += ["--steps", "2", "-n", "4", "--width", "64", "--height", "64", "--batch-size", "1"]
        child = start([*holding(5), *command])
        wait_for(3, lambda: len((folder / "images").sizes()))
        child.kill()
        child.communicate()
        child = start([*holding(10, 20), *command])
        wait_for(7, lambda: len((folder / "images").sizes()))
        server.kill()
        child.send_signal(signal.SIGUSR1)  # go on
        time.sleep(1.5)
        assert child.poll() is None
        known = {path for method, path, *_ in server.proxy.kept or () if method == "PUT" and "/images/" in path}
        server.start()
        there = len((folder / "images").sizes())
        assert there >= len(known) >= 7  # what was acknowledged
        wait_for(there + 6, lambda: len((folder / "images").sizes()))
        child.kill()
        assert child.communicate()[1].count("genkit:") == 0
        summary = generate(tmp_path / "prompts.txt", str(folder), defaults=settings, quiet=True, batch_size=1)
        assert summary.exit_code == 0 and 0 < summary.new < 28
        assert outcome(download(folder, tmp_path / "copy")) == outcome(tmp_path / "local")
        assert check(tmp_path / "copy") == []
        for name, run in (("here", tmp_path / "local"), ("there", folder)):
            refilter(run, rank_by="clip", keep=1, out=tmp_path / name, target=Target("webdataset"))
        assert exported(tmp_path / "there") == exported(tmp_path / "here") and len(exported(tmp_path / "here")) == 7


def exported(folder: Path) -> set[tuple[str, bytes]]:
    """The pictures of a WebDataset, by name and content."""
    found = set()
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m) for m in tar if m.name.endswith(".png")}
            found |= {(name, file.read()) for name, file in files.items() if file is not None}
    return found
