"""Run folders on object storage: memory:// and a real S3 server give what a local folder gives."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fsspec.registry import _registry

from genkit import storage
from genkit.components import inspect_model, weight_hashes
from genkit.datasets.export import Target
from genkit.errors import HostError, InputError
from genkit.files import run_path
from genkit.pages.sides import RowDesk
from genkit.rows.request import Request
from genkit.runs import embeddings, gather, lease, records, segments
from genkit.runs.destination import check_folder, check_rights, free_name
from genkit.runs.embeddings import EMBEDDINGS, Store, read_embeddings
from genkit.runs.recorder import Part
from genkit.runs.records import RESULTS, parts_of, read_config, read_results
from genkit.runs.rescore import Stored
from genkit.runs.run import Run
from genkit.selection.ballots import StoredBallots, held
from genkit.selection.decide import image_name
from genkit.selection.votes import COLUMNS, line_of, read_votes
from genkit.storage import StoragePath
from genkit.studies.compare import compare_runs
from genkit.studies.filter import refilter
from genkit.studies.pairs import pair_runs
from genkit.studies.prefer import PairDesk
from genkit.studies.preferences import COLUMNS as PAIR_COLUMNS
from genkit.studies.preferences import PREFERENCES, choices_of
from tests.buckets import BUCKET, Proxy, bucket, download
from tests.check_run import check, lines_of, outcome
from tests.null_run import CONFIG, draw, png, result_of, rows_of

ROOT = Path(__file__).parents[2]
ROWS = rows_of(4, 3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LINGER", 0.0)
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "STALE", 0.5)


@pytest.fixture
def memory() -> Iterator[StoragePath]:
    folder = StoragePath(f"memory://{random.getrandbits(60):x}/run")
    yield folder
    storage._system(folder).store.clear()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[StoragePath, Proxy]]:
    with bucket(monkeypatch) as proxy:
        yield StoragePath(f"s3://{BUCKET}/runs/one"), proxy


def kill(run: Run) -> None:
    """Leave a run as a killed process does: the lock is there, and nobody keeps it."""
    assert isinstance(run._lock, lease.Lease)
    run._lock._ended.set()
    run._lock._thread.join()


def test_a_run_on_storage_is_the_local_run(memory: StoragePath, tmp_path: Path) -> None:
    draw(tmp_path / "local", ROWS, 4)
    draw(memory, ROWS, 4)
    copy = download(memory, tmp_path / "copy")
    assert outcome(copy) == outcome(tmp_path / "local") and check(copy) == []
    assert len(lines_of(copy / RESULTS)) == 12 and parts_of(memory) == []
    assert not [name for name in memory.sizes() if "lock" in name]
    assert draw(memory, ROWS) == []


def test_a_killed_run_goes_on_from_its_segments(
    memory: StoragePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "LINES", 2)
    draw(tmp_path / "local", ROWS)
    run = Run.open(memory, CONFIG, ROWS)
    for index in range(3):
        run.save(result_of(ROWS[0], index), png(ROWS[0], index))
    run.path_for("r1", 0).write_bytes(png(ROWS[1], 0))  # put, and killed before its record
    kill(run)
    assert len(parts_of(memory)) == 2 and len(read_results(memory)) == 3
    with pytest.raises(HostError, match=rf"in use by another genkit \(process {os.getpid()} on"):
        Run.open(memory, CONFIG, ROWS)
    monkeypatch.setattr(lease, "_alive", lambda holder: False)
    with Run.open(memory, CONFIG, ROWS) as run:
        assert len(run.done) == 3 and "finished but not recorded" in run.notes[0]
        assert parts_of(memory) == [] and len((memory / RESULTS).read_bytes().splitlines()) == 3
    assert len(draw(memory, ROWS)) == 9
    copy = download(memory, tmp_path / "copy")
    assert outcome(copy) == outcome(tmp_path / "local") and check(copy) == []


def test_a_crash_between_put_and_deletion_is_harmless(memory: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_: Any) -> None:
        raise HostError("killed")

    with monkeypatch.context() as patch, pytest.raises(HostError, match="killed"):
        patch.setattr(gather, "remove", crash)
        draw(memory, ROWS)
    assert len(parts_of(memory)) == 1
    before = (memory / RESULTS).read_bytes()
    assert draw(memory, ROWS) == [] and parts_of(memory) == [] and (memory / RESULTS).read_bytes() == before


def test_a_reader_meets_a_fold(memory: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(memory, CONFIG, ROWS)
    run.save(result_of(ROWS[0], 0), png(ROWS[0], 0))
    kill(run)
    monkeypatch.setattr(lease, "_alive", lambda holder: False)
    real = records.contents

    def folded_meanwhile(paths: Any) -> Any:
        monkeypatch.setattr(records, "contents", real)
        Run.open(memory, CONFIG, ROWS).close()
        return real(paths)

    monkeypatch.setattr(records, "contents", folded_meanwhile)
    assert [r.id for r in read_results(memory)] == ["r0"] and parts_of(memory) == []


def test_a_changed_row_is_drawn_anew_and_its_pictures_are_set_aside(memory: StoragePath, tmp_path: Path) -> None:
    rows = rows_of(2, 2)
    changed = [rows[0], Request(id="r1", prompt="another", seed=1000, num_images=2)]
    for folder in (memory, tmp_path / "local"):
        draw(folder, rows)
        (folder / "images/r0-01.png").unlink()
        (folder / "images/r0-00.png").write_bytes(b"x" * (folder / "images/r0-00.png").stat().st_size)
        assert draw(folder, changed) == [("r0", 0), ("r0", 1), ("r1", 0), ("r1", 1)]
    copy = download(memory, tmp_path / "copy")
    assert outcome(copy) == outcome(tmp_path / "local") and check(copy) == []
    names = [{p.name for p in (at / "replaced").iterdir()} for at in (copy, tmp_path / "local")]
    assert names[0] == names[1] == {"r0-00.1.png", "r1-00.1.png", "r1-01.1.png"}


def test_of_a_picture_in_several_segments_the_last_record_counts(
    memory: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "LINES", 1)
    with Run.open(memory, CONFIG, ROWS) as run:
        run.save(result_of(ROWS[0], 0, scores={"clip": 0.9}), png(ROWS[0], 0))
        run.rescore([result_of(ROWS[0], 0, status="failed", reason="one"), run.done["r0", 0]])
        run.done["r0", 0].scores["clip"] = 0.1  # in text lower than what came before
        run.rescore([run.done["r0", 0]])
        assert len(parts_of(memory)) == 4 and read_results(memory)[0].scores == {"clip": 0.1}
    assert read_results(memory)[0].scores == {"clip": 0.1}


def test_embeddings_are_put_before_their_records_and_folded(memory: StoragePath, tmp_path: Path) -> None:
    vectors = np.eye(4, 8, dtype=np.float16)
    for folder in (memory, tmp_path / "local"):
        with Run.open(folder, CONFIG, ROWS) as run, Store(folder, 8) as store:
            run.first(store.flush)
            for n, row in enumerate(ROWS):
                result = result_of(row, 0)
                data = png(row, 0)
                store.add("r" + str(n), 0, hashlib.sha256(data).hexdigest(), vectors[n])
                run.save(result, data)
                found, kept = read_embeddings(folder)
                assert len(found) == n + 1
    places, kept = read_embeddings(memory)
    assert [kept[places[f"r{n}", 0]].tolist() for n in range(4)] == vectors.tolist()
    assert (memory / EMBEDDINGS).read_bytes() == (tmp_path / "local" / EMBEDDINGS).read_bytes()
    assert not list(memory.glob(embeddings.PARTS))
    with pytest.raises(InputError, match="holds embeddings 8 wide, not 9"):
        Store(memory, 9)


def test_many_writers(memory: StoragePath, tmp_path: Path) -> None:
    draw(tmp_path / "local", ROWS)
    with Run.open(memory, CONFIG, ROWS) as run:
        parts = [Part(memory, ROWS, name) for name in ("w0000", "w0001")]
        with ThreadPoolExecutor(4) as pool:
            for k, (row, index) in enumerate((row, index) for row in ROWS for index in range(3)):
                pool.submit(parts[k % 2].save, result_of(row, index), png(row, index)).result()
        assert len(parts_of(memory)) == 2
        for part in parts:
            part.close()
        run.fold()
        assert len(run.done) == 12 and parts_of(memory) == []
    assert outcome(download(memory, tmp_path / "copy")) == outcome(tmp_path / "local")


def test_a_lease_is_taken_over_once_silent_and_its_holder_stops(
    memory: StoragePath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "STALE", 60.0)  # however late the thread that keeps it is
    first = Run.open(memory, CONFIG, ROWS)
    monkeypatch.setattr(lease, "_machine", lambda: "another")
    with pytest.raises(HostError, match="in use by another genkit"):
        Run.open(memory, CONFIG, ROWS)
    assert f"locked by process {os.getpid()} on" in caplog.text
    kill(first)  # it sleeps
    monkeypatch.setattr(lease, "STALE", 0.5)
    with Run.open(memory, CONFIG, ROWS) as second:
        assert isinstance(first._lock, lease.Lease)
        first._lock._ended.clear()  # and wakes
        first._lock._keep()
        with pytest.raises(HostError, match="another genkit has taken it over, or its lock was deleted; run the same"):
            first.save(result_of(ROWS[1], 0), png(ROWS[1], 0))
        second.save(result_of(ROWS[0], 0), png(ROWS[0], 0))
        first.close()
        assert second._lock.path.is_file()  # type: ignore[union-attr]
    assert [r.id for r in read_results(memory)] == ["r0"]


def test_one_of_many_takes_the_folder(s3: tuple[StoragePath, Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, proxy = s3
    proxy.kept = []  # changes come one at a time, as on S3: moto looks and puts in two steps
    monkeypatch.setattr(lease, "STALE", 60.0)  # however slow the machine is
    gate = threading.Barrier(4)
    won: list[lease.Lease] = []
    told: list[str] = []

    def take() -> None:
        gate.wait()
        try:
            won.append(lease.Lease(folder))
        except HostError as error:
            told.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(told) == 3 and all("one at a time" in text for text in told)
    won[0].close()
    assert folder.sizes() == {}


def test_a_lease_that_took_long_to_get_is_released(memory: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    late = 0.0

    def slow(folder: Path, _find: Any = lease._newest) -> tuple[int, bytes] | None:
        nonlocal late
        late = late or 300.0
        return _find(folder)

    monkeypatch.setattr(lease, "BEAT", 60.0)
    monkeypatch.setattr(lease, "STALE", 60.0)
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late, sleep=time.sleep))
    monkeypatch.setattr(lease, "_newest", slow)
    lease.Lease(memory).close()
    assert memory.sizes() == {}


def test_a_real_server(s3: tuple[StoragePath, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, proxy = s3
    check_folder(folder)
    check_rights(folder)
    assert folder.sizes() == {}
    draw(tmp_path / "local", ROWS, 4)
    draw(folder, ROWS, 4)
    copy = download(folder, tmp_path / "copy")
    assert outcome(copy) == outcome(tmp_path / "local") and check(copy) == []
    monkeypatch.setattr(lease, "BEAT", 5.0)
    before = proxy.requests
    assert draw(folder, ROWS) == []
    assert proxy.requests - before < 60
    assert free_name(folder) == StoragePath(f"s3://{BUCKET}/runs/one-2")
    selections = []
    for at, out in ((folder, tmp_path / "a"), (tmp_path / "local", tmp_path / "b")):
        summary = refilter(at, keep=1, out=out, target=Target())
        assert summary["copied"] == 4
        selections.append((at / "selection.json").read_bytes())
        assert (at / "index.html").is_file()
    assert selections[0] == selections[1]
    assert sorted(p.read_bytes() for p in (tmp_path / "a").iterdir()) == sorted(
        p.read_bytes() for p in (tmp_path / "b").iterdir()
    )
    info = storage._system(folder).info(str(folder / "index.html"))
    assert info["ContentType"] == "text/html" and b'"images/r0-00.png"' in (folder / "index.html").read_bytes()
    figures = compare_runs(tmp_path / "local", folder, tmp_path / "compared")
    assert figures["identical"] == 12 and len(list((tmp_path / "compared" / "b").iterdir())) == 12
    with pytest.raises(InputError, match="give -o, a folder for copies"):
        compare_runs(tmp_path / "local", folder)


@pytest.mark.slow
def test_storage_that_answers_503_for_a_while(s3: tuple[StoragePath, Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, proxy = s3
    for answer in (503, 0):
        at = folder.with_name(str(answer))
        with Run.open(at, CONFIG, ROWS) as run:
            proxy.answer = answer
            threading.Timer(0.6, lambda: setattr(proxy, "answer", None)).start()
            run.save(result_of(ROWS[0], 0), png(ROWS[0], 0))
        assert len(read_results(at)) == 1
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    run = Run.open(folder, CONFIG, ROWS)
    proxy.answer = 503
    with pytest.raises(
        HostError, match=r"r0-00.png: no answer for \d+ s; last: .*; run the same command again to continue"
    ):
        run.save(result_of(ROWS[0], 0), png(ROWS[0], 0))
    proxy.answer = None
    run.close()
    assert len(draw(folder, ROWS)) == 12


def test_errors_before_anything_is_written(s3: tuple[StoragePath, Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, proxy = s3
    for path, words in {
        "s3://nowhere/run": "s3://nowhere: no such bucket",
        f"s3://{BUCKET}": "is no place for a run; name a folder",
        "gs://b/run": "needs gcsfs: pip install gcsfs",
        "s4://b/run": r"no runs on s4://.*; known: s3://",
        "https://host/run": "no runs on https://",
    }.items():
        for read in (check_folder, read_config, check_rights):
            with pytest.raises(InputError, match=words):
                read(run_path(path))
    for missing, words in (("s3fs", "needs s3fs: "), ("fsspec", "needs fsspec: ")):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=words):
            patch.setattr(storage, "_systems", {})
            patch.setitem(sys.modules, missing, None)
            patch.delitem(_registry, "s3", raising=False)
            check_folder(folder)
    (folder / "notes.txt").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"holds 'notes.txt' and no run.json"):
        check_folder(folder)
    proxy.answer = 403
    for read in (check_folder, read_config, check_rights):
        with pytest.raises(HostError, match="not allowed: "):
            read(folder)
    monkeypatch.setattr(storage, "FIRST", 0.3)
    proxy.answer = 0
    with pytest.raises(HostError, match=r"no answer for \d+ s; last: "):
        check_rights(folder)


def test_votes(memory: StoragePath) -> None:
    draw(memory, ROWS)
    pictures = read_results(memory)
    path = memory / "votes.csv"
    ballots = StoredBallots(path, COLUMNS)
    with pytest.raises(HostError, match="in use by another genkit"):
        StoredBallots(path, COLUMNS)
    ballots.add([line_of(pictures[0], "yes")])
    ballots.add([line_of(pictures[1], "no")])
    ballots.close()
    assert [(vote.image, vote.good) for vote in read_votes(path)] == [
        ("images/r0-00.png", True), ("images/r0-01.png", False)
    ]  # fmt: skip
    with held(path, COLUMNS) as again:
        assert len(read_votes(path)) == 2 and draw(memory, ROWS) == []
        desk = RowDesk(memory, {image_name(r): r for r in pictures}, again)
        assert [image["good"] for image in desk.state()["row"]["images"]] == [True, False, False]
        state = desk.take({"row": 0, "vote": "store", "good": [1]})
        assert (state["good"], state["bad"], state["row"]["name"]) == (1, 2, "r1")
    assert [vote.good for vote in read_votes(path)] == [True, False, None, None, False, True, False]


def test_choices_between_two_runs(memory: StoragePath, tmp_path: Path) -> None:
    draw(memory, ROWS)
    draw(tmp_path / "local", ROWS)
    paired = pair_runs(memory, tmp_path / "local")
    for count in (1, 3):
        with held(memory / PREFERENCES, PAIR_COLUMNS) as ballots:
            desk = PairDesk(paired, paired.pairs, choices_of(paired)[0], ballots, 0)
            while (state := desk.state())["done"] < count:
                desk.take({"pair": state["pair"]["number"], "vote": "tie"})
    figures = compare_runs(memory, tmp_path / "local", tmp_path / "compared")
    assert (figures["by_eye"]["pairs"], figures["by_eye"]["ties"]) == (3, 3)


def test_search_of_a_run_that_lacks_embeddings(memory: StoragePath) -> None:
    folder = memory
    info = inspect_model("emoji-clip")
    config = {**CONFIG, "binding": {"seed": 0, "clip": {"name": info.name, "weights": weight_hashes(info)}}}
    with Run.open(folder, config, ROWS[:1]) as run:
        for index in range(3):
            run.save(result_of(ROWS[0], index), png(ROWS[0], index))
    before = folder.sizes()
    with Stored(folder, info) as stored:
        pictures = [folder / str(r.file) for r in read_results(folder)]
        assert all(stored.vector(picture) is None for picture in pictures) and folder.sizes() == before
        for picture in pictures:
            stored.add(picture, np.eye(1, info.embedding_width, dtype=np.float16)[0])
    with Stored(folder, info) as stored:
        assert all(stored.vector(picture) is not None for picture in pictures)
    assert len([*folder.glob(embeddings.PARTS)]) == 1 and not [*folder.glob(".lock*")]


def test_paths() -> None:
    path = run_path("s3://bucket/a/./b")
    assert isinstance(path, StoragePath) and str(path) == "s3://bucket/a/b" and (path / "c.png").stem == "c"
    assert run_path(Path("s3://bucket/a/b")) == path  # as the command line has it
    assert (path / "images" / "x.png").relative_to(path).as_posix() == "images/x.png"
    assert run_path("file:///tmp/run") == Path("/tmp/run") and not isinstance(run_path("file:///x"), StoragePath)
    assert not isinstance(run_path("runs/x:y/z"), StoragePath) and not isinstance(run_path("c:/x"), StoragePath)
    for work in (os.stat, open, os.listdir):
        with pytest.raises(InputError, match="s3://bucket/a/b: is on object storage, and only a run folder may be"):
            work(path)
