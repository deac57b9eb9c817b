"""A run folder that many processes write to: a part for each, folded into one file by whoever holds the folder."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from genkit.errors import HostError
from genkit.rows.request import Request
from genkit.runs import folding
from genkit.runs.embeddings import EMBEDDINGS, Store, read_embeddings
from genkit.runs.recorder import Part
from genkit.runs.records import RESULTS, part_of, parts_of, read_results
from genkit.runs.run import Run
from tests.check_run import check, lines_of, outcome
from tests.null_run import CONFIG, draw, png, result_of, rows_of

ROWS = rows_of(6, 2)
KEYS = [(row, index) for row in ROWS for index in range(2)]


def draw_parts(folder: Path, workers: int, keys: list[tuple[Request, int]] = KEYS) -> None:
    """Draw with parts that take turns, all within one start that is killed before it folds."""
    names = ["w0000", "w0001", "w0002"]
    with Run.open(folder, CONFIG, ROWS):
        parts = [Part(folder, ROWS, name) for name in names[:workers]]
        for part, (row, index) in zip(itertools.cycle(parts), keys, strict=False):
            part.save(result_of(row, index), png(row, index))
        for part in parts:
            part.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_readers_see_all_parts_and_the_next_start_folds_them(workers: int, tmp_path: Path) -> None:
    draw(tmp_path / "one", ROWS)
    draw_parts(tmp_path / "many", workers)
    folder = tmp_path / "many"
    assert len(parts_of(folder)) == workers and not (folder / RESULTS).read_bytes()
    assert outcome(folder) == outcome(tmp_path / "one") and check(folder) == []
    before = read_results(folder)
    assert len(before) == len(KEYS)
    with Run.open(folder, CONFIG, ROWS) as run:
        assert run.notes == [] and len(run.done) == len(KEYS)
    assert parts_of(folder) == [] and check(folder) == []
    assert outcome(folder) == outcome(tmp_path / "one")
    assert {(r.id, r.index): r for r in read_results(folder)} == {(r.id, r.index): r for r in before}


def test_the_orderly_end_folds_and_counts(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", CONFIG, ROWS) as run:
        with Part(run.folder, ROWS, "a") as part:
            part.save(result_of(ROWS[0], 0), png(ROWS[0], 0))
        run.fold()
        assert list(run.done) == [("r0", 0)] and parts_of(run.folder) == []


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_picture_recorded_twice_counts_once_and_the_same_whichever_is_first(
    order: tuple[str, str], tmp_path: Path
) -> None:
    with Run.open(tmp_path / "run", CONFIG, ROWS) as run:
        for name, seconds in zip(order, (1.0, 2.0), strict=True):
            with Part(run.folder, ROWS, name) as part:
                part.save(result_of(ROWS[0], 0, seconds=seconds), png(ROWS[0], 0))
        with Part(run.folder, ROWS, "c") as part:
            part.fail(result_of(ROWS[0], 0, status="failed", reason="its worker was taken for dead"))
        (seen,) = read_results(run.folder)
        run.fold()
    (line,) = lines_of(tmp_path / "run" / RESULTS)
    assert line["status"] == "done" and line["seconds"] == seen.seconds == 2.0


def test_a_crash_between_append_and_removal_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    draw_parts(folder, 2)
    wanted = outcome(folder)

    def crash(_: object) -> list[Path]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folding, "fold_embeddings", crash)
        Run.open(folder, CONFIG, ROWS)
    assert len(parts_of(folder)) == 2 and len(lines_of(folder / RESULTS)) == len(KEYS)
    assert outcome(folder) == wanted and len(read_results(folder)) == len(KEYS)
    with Run.open(folder, CONFIG, ROWS):
        pass
    assert parts_of(folder) == [] and len(lines_of(folder / RESULTS)) == len(KEYS), "nothing is appended again"
    assert outcome(folder) == wanted


def test_a_torn_and_a_damaged_line_cost_their_picture_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    draw_parts(folder, 1)
    (path,) = parts_of(folder)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{\n", *lines[2:-1], lines[-1][:40]]))
    with Run.open(folder, CONFIG, ROWS) as run:
        assert f"{path.name}:2: damaged; its image is drawn again" in run.notes
        assert len(run.done) == len(KEYS) - 2
    assert sorted(p.name for p in (folder / "replaced").iterdir()) == ["r0-01.1.png", "r5-01.1.png"]


def test_names_are_not_used_again_while_a_part_has_them(tmp_path: Path) -> None:
    with Run.open(tmp_path, CONFIG, ROWS):
        Part(tmp_path, ROWS, "w0001").close()
        with pytest.raises(HostError, match="exists"):
            Part(tmp_path, ROWS, "w0001")


def test_a_part_whose_writer_lives_is_not_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.open(tmp_path / "run", CONFIG, ROWS):
        part = Part(tmp_path / "run", ROWS, "a")
    monkeypatch.setattr(folding.fold, "__defaults__", (0.1,))
    with pytest.raises(HostError, match=r"results-a.jsonl: a worker of an earlier start still writes to it"):
        Run.open(tmp_path / "run", CONFIG, ROWS)
    part.save(result_of(ROWS[0], 0), png(ROWS[0], 0))
    part.close()
    with Run.open(tmp_path / "run", CONFIG, ROWS) as run:
        assert list(run.done) == [("r0", 0)]


def test_records_that_replace_others_keep_their_order(tmp_path: Path) -> None:
    draw_parts(tmp_path, 2)
    changed = [row.filled({"negative_prompt": "blurry"}) if row.id == "r0" else row for row in ROWS]
    with Run.open(tmp_path, CONFIG, changed) as run:
        assert {("r0", 0), ("r0", 1)}.isdisjoint(run.done) and len(run.done) == len(KEYS) - 2
        with Part(tmp_path, changed, "w0000") as part:
            part.save(result_of(changed[0], 0), png(changed[0], 0))
    found = [line["status"] for line in lines_of(tmp_path / RESULTS) if line["id"] == "r0" and line["index"] == 0]
    assert found == ["done", "replaced"]
    with Run.open(tmp_path, CONFIG, changed) as run:
        assert ("r0", 0) in run.done and ("r0", 1) not in run.done


def test_embeddings_of_parts_are_read_and_folded(tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float16)
    with Run.open(tmp_path, CONFIG, ROWS):
        for n, name in enumerate(("a", "b")):
            row = ROWS[n]
            with Part(tmp_path, ROWS, name) as part, Store(tmp_path, 4, name) as store:
                result = result_of(row, 0)
                part.save(result, png(row, 0))
                store.add(str(row.id), 0, str(result.sha256), vectors[n])
        assert not (tmp_path / EMBEDDINGS).exists()
        place, found = read_embeddings(tmp_path)
        assert [found[place[f"r{n}", 0]].tolist() for n in range(2)] == vectors[:2].tolist()
        os.truncate(tmp_path / "embeddings-b.npy", (tmp_path / "embeddings-b.npy").stat().st_size - 3)
    with Run.open(tmp_path, CONFIG, ROWS):
        pass
    assert [path.name for path in tmp_path.glob("embeddings*")] == [EMBEDDINGS]
    place, found = read_embeddings(tmp_path)
    assert list(place) == [("r0", 0)] and found[0].tolist() == vectors[0].tolist()


def test_a_reader_meets_a_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are folded between two reads of a reader are neither missed nor read as newer than they are."""
    draw_parts(tmp_path, 2)
    wanted = {(r.id, r.index) for r in read_results(tmp_path)}
    real, calls = Path.exists, list[Path]()

    def folded_meanwhile(path: Path) -> bool:
        if not calls:
            calls.append(path)
            Run.open(tmp_path, CONFIG, ROWS).close()
        return real(path)

    monkeypatch.setattr(Path, "exists", folded_meanwhile)
    assert {(r.id, r.index) for r in read_results(tmp_path)} == wanted and calls
    assert json.loads((tmp_path / RESULTS).read_text().splitlines()[0])["status"] == "done"
    assert not part_of(tmp_path, "w0000").is_file()
