"""What a study says: of scores whose answers are known, of a real run, and of folders that it cannot study."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genkit import InputError, Request, generate
from genkit.cli import run as command
from genkit.progress import Steps
from genkit.runs.records import read_results
from genkit.studies.study import (
    MARKS,
    Watched,
    advice,
    best_of_n,
    chosen,
    expected_best,
    pruning,
    recorded_scores,
    study_run,
)  # fmt: skip
from tests import null_run
from tests.judged_run import judged_run


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_expected_best_is_the_mean_over_all_choices(k: int) -> None:
    values = [0.3, -1.0, 0.9, 0.9, 0.1]
    choices = [max(choice) for choice in itertools.combinations(values, k)]
    assert expected_best(values, k) == pytest.approx(np.mean(choices))


def test_best_of_n_gains_over_one_draw_of_the_same_rows() -> None:
    found = best_of_n([[0.0, 1.0], [0.0, 1.0, 2.0, 3.0]], Steps(quiet=True))
    assert [found[k]["rows"] for k in found] == [2, 2, 1]
    assert found["2"]["gain"][0] == pytest.approx((0.5 + 2.5 - 5 / 6 - 1.5 + 1 / 3) / 2, abs=0.2)
    assert found["4"]["best"] == [3.0, None, None], "one row has no interval"
    assert found["4"]["gain"] == [1.5, None, None]


def watched(rows: int, noise: float) -> list[Watched]:
    """Rows of 8 normal scores, whose early scores are those and noise: 0 sees all, a lot sees nothing."""
    draw = np.random.default_rng(1)
    finals = draw.normal(size=(rows, 8))
    return [Watched(f, f[:, None] + noise * draw.normal(size=(8, len(MARKS)))) for f in finals]


def test_early_scores_that_tell_all_are_advised_and_those_that_tell_nothing_are_not() -> None:
    sighted, blind = pruning(watched(40, 0.0), look=0.05), pruning(watched(200, 1e6), look=0.05)
    for mark in sighted["marks"]:
        assert mark["correlation"][0] == pytest.approx(1)
        assert mark["false_kill"][0] == 0
        assert mark["effective"][0] == pytest.approx(8)
    assert advice(sighted).startswith('prune: {"after": 0.2, "keep": 0.5}: after 20% of the steps it buys')
    for mark in blind["marks"]:
        assert abs(mark["correlation"][0]) < 0.25
        assert 0.3 < mark["false_kill"][0] < 0.7
        assert mark["effective"][0] == pytest.approx(4, abs=1)  # as good as never having drawn the other half
    assert advice(blind).startswith("do not prune:")


def test_a_look_has_its_price() -> None:
    free, dear = (pruning(watched(10, 0.0), look)["marks"][0] for look in (0.0, 0.5))
    assert free["cost"] == pytest.approx(8 * 0.2 + 4 * 0.8)
    assert dear["cost"] == pytest.approx(8 * (0.2 * 0.5 + 0.5) + 4 * (0.8 * 0.5 + 0.5))
    assert free["worth"][0] > 1 > dear["worth"][0]


def test_no_row_that_lost_its_best_among_ten_is_not_evidence_enough() -> None:
    found = pruning(watched(10, 0.0), 0.0)
    assert found["marks"][0]["worth"][1] > 1.5
    assert found["marks"][0]["false_kill"] == [0.0, 0.0, 0.2775]
    assert advice(found).startswith("do not prune: at best, after 20% of the steps")


def test_few_rows_are_no_ground_for_advice() -> None:
    assert advice(pruning(watched(7, 0.0), 0.0)).startswith("too few to say: 7 rows")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "run"
    fields: dict[str, Any] = {"num_inference_steps": 4, "width": 64, "height": 64}
    rows = [Request(id=f"r{n}", prompt=text, seed=n, num_images=4, keep=1, **fields)
            for n, text in enumerate(["a red fox", "a blue owl"])]  # fmt: skip
    generate([*rows, Request(id="one", prompt="a pizza", **fields)], folder, quiet=True)
    return folder


def test_a_study_redraws_what_the_run_drew_and_writes_it_down(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "results.jsonl").read_bytes()
    assert command(["study", str(run), "--prune", "--images", "8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((run / "study.json").read_text())
    assert (run / "results.jsonl").read_bytes() == before
    assert said["prune"]["rows"] == 2
    assert said["prune"]["images"] == 4
    assert [mark["after"] for mark in said["prune"]["marks"]] == list(MARKS)
    assert 0 < said["prune"]["look"] < 1
    assert said["advice"].startswith("too few to say: 2 rows")
    clip = {(r.id, r.index): r.scores["clip"] for r in read_results(run)}
    best = np.mean([max(clip[row, k] for k in range(4)) for row in ("r0", "r1")])
    assert said["best_of"]["4"]["best"][0] == pytest.approx(best, abs=1e-4)


def test_redrawn_images_score_as_they_did(run: Path) -> None:
    from genkit.studies.redraw import redraw

    watched, _ = redraw(run, chosen(run, recorded_scores(run), 8), "cpu", quiet=True)
    clip = {(r.id, r.index): r.scores["clip"] for r in read_results(run)}
    for n, row in enumerate(watched):
        assert row.final == pytest.approx([clip[f"r{n}", k] for k in range(4)], abs=1e-3)
        assert row.early.shape == (4, len(MARKS))
        assert (row.early[:, -1] == row.early[:, -2]).all(), "with 4 steps both fall on the call before the last"
        assert (row.early[:, 0] != row.final).all()


def test_a_run_of_another_format_and_of_a_head_is_redrawn(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    head, folder = tmp_path / "head.safetensors", tmp_path / "run"
    save_file({"weight": np.ones((1, 256), np.float32), "bias": np.zeros(1, np.float32)}, head)
    fields: dict[str, Any] = {"num_images": 3, "num_inference_steps": 2, "width": 32, "height": 32}
    row = Request(id="a", prompt="a red fox", rank_by="aesthetic", **fields)
    generate([row], folder, quiet=True, format="webp", aesthetic=str(head))
    found = study_run(folder, prune=True, images=8, quiet=True)
    final = [r.scores["aesthetic"] for r in sorted(read_results(folder), key=lambda r: r.index)]
    assert found["prune"]["rows"] == 1
    assert found["best_of"]["2"]["best"] == [pytest.approx(expected_best(final, 2), abs=1e-3), None, None]
    head.unlink()
    with pytest.raises(InputError, match=r"--aesthetic: .*: no such file"):
        study_run(folder, prune=True, images=8, quiet=True)


def test_rows_may_rank_by_the_scores_of_other_packages_but_not_by_sim(tmp_path: Path) -> None:
    run = judged_run(tmp_path / "run", lambda row, k: {"redness": row + k / 10}, rows=2, images=2, rank_by="redness")
    assert recorded_scores(run) == {"r0": [0.0, 0.1], "r1": [1.0, 1.1]}
    null_run.draw(tmp_path / "sim", null_run.rows_of(1, 2, rank_by="-sim"))
    with pytest.raises(InputError, match="row r0: rank_by: '-sim' reads sim"):
        recorded_scores(tmp_path / "sim")


def test_without_prune_no_model_is_needed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "prune" not in study_run(run, prune=False, images=64, quiet=True)
    assert command(["study", str(run)]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == ["  0 %  reading the run", "100 %  the best of N"]
    lines = told.out.splitlines()
    assert lines[0].startswith("best of")
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "4"]


def test_what_cannot_be_studied_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        study_run(tmp_path, False, 64)
    null_run.draw(tmp_path / "single", null_run.rows_of(3))
    with pytest.raises(InputError, match="no row has two scored images"):
        study_run(tmp_path / "single", False, 64)
    null_run.draw(tmp_path / "null", null_run.rows_of(2, 4))
    with pytest.raises(InputError, match="null"):
        study_run(tmp_path / "null", True, 64)
    with pytest.raises(InputError, match="--images: 3 is not within"):
        study_run(run, True, 3)
    assert not (tmp_path / "null" / "study.json").exists()
