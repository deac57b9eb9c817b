"""Embeddings kept with a run: each image's own, whatever was killed, redone or torn; and embedded once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genkit import ClipScorer, HostError, InputError, Request, generate
from genkit.durable import lock_folder
from genkit.rows.result import Result
from genkit.runs.embeddings import EMBEDDINGS, Store, read_embeddings
from genkit.runs.records import read_results
from genkit.studies.score import score_images
from tests.tiny import tiny_clip, tiny_stable_diffusion

WIDTH = 8
ROOT = Path(__file__).parents[2]


def unit(seed: int, width: int = WIDTH) -> np.ndarray:
    vector = np.random.default_rng(seed).normal(size=width)
    return (vector / np.linalg.norm(vector)).astype(np.float16)


def record(n: int, sha256: str | None = None, **fields: Any) -> Result:
    digest = sha256 or f"{n:064x}"
    return Result(f"r{n}", n, n, **{"sha256": digest, "file": f"images/r{n}-{n:02d}.png", **fields})


def fill(folder: Path, count: int) -> list[Result]:
    with Store(folder, WIDTH) as store:
        for n in range(count):
            store.add(f"r{n}", n, f"{n:064x}", unit(n))
    return [record(n) for n in range(count)]


def test_what_is_added_is_read(tmp_path: Path) -> None:
    results = fill(tmp_path, 5)
    rows, vectors = read_embeddings(tmp_path, results)
    assert isinstance(vectors, np.memmap) and vectors.dtype == np.float16 and vectors.shape == (5, WIDTH)
    assert rows == {(f"r{n}", n): n for n in range(5)}
    assert all((vectors[rows[f"r{n}", n]] == unit(n)).all() for n in range(5))
    assert np.load(tmp_path / EMBEDDINGS, mmap_mode="r")["vector"].shape == (5, WIDTH), "any reader of .npy reads it"


def test_a_run_without_any(tmp_path: Path) -> None:
    assert read_embeddings(tmp_path)[0] == {} and read_embeddings(tmp_path)[1].shape == (0, 0)
    fill(tmp_path, 0)
    assert read_embeddings(tmp_path, [])[0] == {}


def test_a_vector_belongs_to_a_picture_not_to_a_name(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    with Store(tmp_path, WIDTH) as store:
        store.add("r3", 3, "f" * 64, unit(99))  # drawn again: its newest record has another picture
    results = [
        record(0, status="failed"),
        record(1, sha256="e" * 64),
        record(2, status="pruned"),
        record(3, sha256="f" * 64),
    ]
    rows, vectors = read_embeddings(tmp_path, results)
    assert rows == {("r3", 3): 4} and (vectors[4] == unit(99)).all()


@pytest.mark.parametrize("lost", [1, 2 * WIDTH, 100, 179, 180])
def test_a_torn_end_is_dropped_and_written_over(tmp_path: Path, lost: int) -> None:
    results = fill(tmp_path, 4)
    path = tmp_path / EMBEDDINGS
    os.truncate(path, path.stat().st_size - lost)
    assert len(read_embeddings(tmp_path, results)[0]) == 3
    with Store(tmp_path, WIDTH) as store:
        assert store.count == 3
        store.add("r3", 3, f"{3:064x}", unit(3))
    rows, vectors = read_embeddings(tmp_path, results)
    assert len(rows) == 4 and (vectors[rows["r3", 3]] == unit(3)).all()


def test_zeros_that_a_power_cut_left_are_no_vectors(tmp_path: Path) -> None:
    results = fill(tmp_path, 4)
    with open(tmp_path / EMBEDDINGS, "r+b") as file:
        file.seek(-2 * WIDTH, os.SEEK_END)
        file.write(bytes(2 * WIDTH))
    assert set(read_embeddings(tmp_path, results)[0]) == {("r0", 0), ("r1", 1), ("r2", 2)}


@pytest.mark.slow
def test_a_killed_process_loses_none(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom tests.runs.test_embeddings import unit, WIDTH\n"
        "from genkit.runs.embeddings import Store\nstore = Store(Path(sys.argv[1]), WIDTH)\n"
        "for n in range(70): store.add(f'r{n}', n, f'{n:064x}', unit(n))\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}
    )
    assert done.returncode == -signal.SIGKILL
    rows, vectors = read_embeddings(tmp_path, [record(n) for n in range(70)])
    assert len(rows) == 70 and all((vectors[n] == unit(n)).all() for n in range(70))


def test_threads_share_a_store(tmp_path: Path) -> None:
    with Store(tmp_path, WIDTH) as store, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.add(f"r{n}", n, f"{n:064x}", unit(n)), range(500)))
    rows, vectors = read_embeddings(tmp_path, [record(n) for n in range(500)])
    assert len(rows) == 500 and all((vectors[row] == unit(n)).all() for (_, n), row in rows.items())


def test_a_full_disk_leaves_no_torn_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = fill(tmp_path, 3)
    store = Store(tmp_path, WIDTH)
    write, calls = os.pwrite, []

    def full(handle: int, data: bytes, at: int) -> int:
        calls.append(at)
        if len(calls) == 1:
            return write(handle, data[:50], at)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HostError, match=r"embeddings\.npy: No space left"):
        store.add("r3", 3, f"{3:064x}", unit(3))
    monkeypatch.undo()
    store.add("r3", 3, f"{3:064x}", unit(3))
    store.close()
    rows, vectors = read_embeddings(tmp_path, [*results, record(3)])
    assert len(rows) == 4 and (vectors[rows["r3", 3]] == unit(3)).all()


@pytest.mark.parametrize("data", [b"", b"not numpy", b"\x93NUMPY\x01\x00\xff\xff{"], ids=["empty", "text", "torn"])
def test_another_kind_of_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / EMBEDDINGS).write_bytes(data)
    for use in (lambda: read_embeddings(tmp_path, []), lambda: Store(tmp_path, WIDTH)):
        with pytest.raises(InputError, match="holds no embeddings of a run; move it away"):
            use()
    np.save(tmp_path / EMBEDDINGS, np.zeros((3, WIDTH), np.float16))
    with pytest.raises(InputError, match="holds no embeddings"):
        read_embeddings(tmp_path, [])
    (tmp_path / EMBEDDINGS).unlink()
    fill(tmp_path, 2)
    with pytest.raises(InputError, match="holds embeddings 8 wide, not 9"):
        Store(tmp_path, WIDTH + 1)
    assert len(read_embeddings(tmp_path, [record(0)])[0]) == 1


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    script = (
        "import sys, pathlib\nfrom genkit.runs.embeddings import read_embeddings\n"
        "read_embeddings(pathlib.Path())\nprint('torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    model, clip = tiny_stable_diffusion(folder / "sd"), tiny_clip(folder / "clip")
    return {"model": str(model), "clip": str(clip), "device": "cpu", "quiet": True}


def rows_of(images: int, text: str = "a fox") -> list[Request]:
    return [
        Request(id=f"r{n}", prompt=f"{text} {n}", seed=n, num_images=images, num_inference_steps=2) for n in range(3)
    ]


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the vision model embeds."""
    calls: list[int] = []
    whole = ClipScorer.embed_pixels

    def counted(self: ClipScorer, pixels: Any) -> Any:
        calls.append(len(pixels))
        return whole(self, pixels)

    monkeypatch.setattr(ClipScorer, "embed_pixels", counted)
    return calls


def score(run: Path, options: dict[str, Any], **more: Any) -> dict[str, dict[str, Any]]:
    out = run.parent / "scores.jsonl"
    assert score_images(run, None, None, None, out, options["clip"], "cpu", "auto", **more) == 0
    lines = map(json.loads, out.read_text().splitlines())
    return {str(Path(line["file"]).relative_to(run)): line["scores"] for line in lines}


def alike(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> bool:
    """Equal but for the last digits, which depend on how many pictures the network embeds together."""
    return a.keys() == b.keys() and all(a[file] == pytest.approx(b[file], abs=5e-3) for file in a)


def test_every_image_of_a_run_is_embedded_once(run: Path, options: dict[str, Any], embedded: list[int]) -> None:
    generate(rows_of(1), run, **options)
    assert sum(embedded) == 3
    generate(rows_of(2), run, **options)  # goes on
    assert sum(embedded) == 6
    rows, vectors = read_embeddings(run)
    results = read_results(run)
    assert len(rows) == 6 == len(vectors)

    again = score(run, options)
    assert sum(embedded) == 6, "none for what the run has"
    assert again == {str(r.file): r.scores for r in results}, "the same scores, to the last digit"

    generate(rows_of(2, "a cat"), run, **options)  # changed rows: drawn again
    assert sum(embedded) == 12
    assert len(read_embeddings(run)[0]) == 6 and len(read_embeddings(run)[1]) == 12
    score(run, options)
    assert sum(embedded) == 12


def test_new_labels_and_rows_are_scored_from_the_embeddings(
    run: Path, options: dict[str, Any], embedded: list[int]
) -> None:
    """Labels thought of after the night cost no drawing, and every picture is compared with all rows' captions."""
    generate(rows_of(2)[:2], run, **options)
    before = {r.file: r for r in read_results(run)}
    gated = {"labels": ["a fox", "a cat"], "gate": "p['a fox'] > 0.000001", "keep": 1}
    rows = [Request(**{**row.to_json(), **gated}) for row in rows_of(2)]
    assert generate(rows, run, **options).new == 2, "those of the row that was added"
    assert sum(embedded) == 6 and not (run / "replaced").exists()
    found = {r.file: r for r in read_results(run)}
    for file, r in before.items():
        now = found[file]
        assert set(now.scores["p"]) == {"a fox", "a cat"} and sum(now.scores["p"].values()) == pytest.approx(1)
        assert (now.sha256, now.scores["clip"], now.scores["sharpness"]) == (
            r.sha256,
            r.scores["clip"],
            r.scores["sharpness"],
        )
    assert any(found[f].scores["clip_z"] != r.scores["clip_z"] for f, r in before.items())
    whole = run.parent / "whole"
    generate(rows, whole, **options)
    flat = [{str(r.file): {**r.scores, **r.scores["p"], "p": 0} for r in read_results(f)} for f in (run, whole)]
    assert alike(*flat), "as if drawn at once"
    lines = (run / "results.jsonl").read_bytes()
    assert generate(rows, run, **options).new == 0 and (run / "results.jsonl").read_bytes() == lines


def test_score_embeds_what_is_missing_and_keeps_it(run: Path, options: dict[str, Any], embedded: list[int]) -> None:
    generate(rows_of(2), run, **options)
    before = score(run, options)
    path = run / EMBEDDINGS
    os.truncate(path, path.stat().st_size - 200)  # two records gone
    embedded.clear()
    assert alike(score(run, options), before)
    assert sum(embedded) == 2
    assert alike(score(run, options), before)
    assert sum(embedded) == 2
    path.unlink()
    handle = lock_folder(run)  # another process is at it: scored all the same, and left alone
    assert len(score(run, options)) == 6 and sum(embedded) == 8 and not path.exists()
    os.close(handle)


def test_another_clip_model_embeds_anew(
    run: Path, options: dict[str, Any], embedded: list[int], tmp_path: Path
) -> None:
    generate(rows_of(1), run, **options)
    embedded.clear()
    before = (run / EMBEDDINGS).read_bytes()
    assert len(score(run, {**options, "clip": "emoji-clip"})) == 3
    assert sum(embedded) == 3 and (run / EMBEDDINGS).read_bytes() == before


def test_a_picture_that_was_changed_is_not_what_was_embedded(
    run: Path, options: dict[str, Any], embedded: list[int]
) -> None:
    generate(rows_of(1), run, **options)
    embedded.clear()
    first = sorted((run / "images").iterdir())[0]
    shutil.copy(ROOT / "prompts" / "apple.png", first)
    score(run, options)
    assert sum(embedded) == 1 and len(read_embeddings(run)[1]) == 3, "nor is it kept as such"


def test_no_clip_no_embeddings(run: Path, options: dict[str, Any]) -> None:
    generate(rows_of(1), run, **{**options, "clip": "none"})
    assert not (run / EMBEDDINGS).exists() and read_embeddings(run)[0] == {}
