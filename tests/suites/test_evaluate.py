"""Evaluations and leaderboards: shares and intervals by hand, real runs that are killed and go on, what is refused."""

from __future__ import annotations

import json
import re
import signal
import time
from html import escape
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import genkit
from genkit.cli import run as command
from genkit.errors import InputError
from genkit.options import Options
from genkit.rows.result import Result
from genkit.runs.records import read_results
from genkit.scoring import plugins
from genkit.scoring.distances import DISTANCES
from genkit.scoring.gates import Expression, passes
from genkit.selection.intervals import share_interval, wilson
from genkit.suites import geneval
from genkit.suites.leaderboard import leaderboard
from genkit.suites.suite import read_suite
from genkit.suites.verdicts import judge_rows, mean_of, overall, task_table
from tests.children import holding, start
from tests.detectors import tiny_owlvit

LABELS = ["a fox", "a car", "a cup"]
ROWS: list[dict[str, Any]] = [
    {"id": "fox", "prompt": "a fox", "labels": LABELS, "verify": "p['a fox'] > 0.5 and not flat", "task": "thing"},
    {"id": "car", "prompt": "a car", "labels": LABELS, "verify": "p['a car'] > 0.5", "task": "thing"},
    {
        "id": "cup",
        "prompt": "a cup",
        "labels": LABELS,
        "verify": "p['a cup'] > 0.5 or p['a car'] > 0.9",
        "task": "thing",
    },
    {"id": "red", "prompt": "a red car", "verify": "thing_red > 0.5", "task": "colour"},
    {"id": "blue", "prompt": "a blue car", "verify": "thing_blue > 0.5", "task": "colour"},
    {"id": "odd", "prompt": "a green car", "verify": "pieces == 99", "task": "<b>odd"},
]
QUICK = ["--steps", "1", "--num-images", "2", "--device", "cpu"]


def suite_file(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / "six.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A suite file, and the run of the embedded model on it."""
    folder = tmp_path_factory.mktemp("suite")
    suite = suite_file(folder)
    assert command(["evaluate", "emoji", "--suite", str(suite), "-o", str(folder / "a"), *QUICK]) == 0
    return suite, folder / "a"


def evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def states(folder: Path) -> dict[str, tuple[int, str]]:
    return {p.name: (p.stat().st_mtime_ns, p.name) for p in (folder / "images").iterdir()}


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_verdicts_shares_and_intervals_are_those_of_the_scores() -> None:
    suite = read_suite([
        {"id": "a", "prompt": "a", "verify": "clip > 0.5", "task": "t", "num_images": 3},
        {"id": "b", "prompt": "b", "verify": "clip > 0.5 or sharpness > 10", "task": "t", "num_images": 3},
        {"id": "c", "prompt": "c", "verify": "clip > 0.5", "task": "u", "num_images": 2},
    ])  # fmt: skip

    def result(row: str, k: int, clip: float | None, **more: Any) -> Result:
        return Result(row, k, 0, **{"scores": {"clip": clip, "sharpness": 3.0}, "file": "f", **more})

    results = [
        result("a", 0, 0.6), result("a", 1, 0.4), result("a", 2, 0.7), result("a", 3, 0.9),  # 3: not asked for
        result("b", 0, 0.1), result("b", 1, None), result("b", 2, 0.2, status="failed", reason="not finite"),
        result("c", 0, 0.6), result("c", 1, 0.9),
    ]  # fmt: skip
    rows = judge_rows(suite, suite.rows, results)
    assert [row["right"] for row in rows] == [[1, 0, 1], [0, 0, 0], [1, 1]]
    assert rows[1]["images"][0]["found"] == {"clip": 0.1, "sharpness": 3.0}
    assert rows[1]["images"][1]["unknown"] == ["clip"] and rows[1]["images"][2]["failed"] == "not finite"
    t, u = task_table(rows)
    assert (t["prompts"], t["images"], t["right"], t["any"]) == (2, 6, pytest.approx(1 / 3, abs=1e-6), 0.5)
    assert t["interval"] == pytest.approx(share_interval([[1, 0, 1], [0, 0, 0]])[1:], abs=1e-6)
    assert t["any_interval"] == pytest.approx(wilson(1, 2), abs=1e-6)
    assert (u["right"], u["interval"]) == (1.0, [0.0, 1.0]), "one prompt says nothing of others"
    assert overall([t, u])["right"] == pytest.approx(2 / 3, abs=1e-6)


def test_the_interval_of_a_mean_of_tasks_covers_the_truth() -> None:
    draw, covered = np.random.default_rng(1), 0.0
    truth = [0.1, 0.5, 0.95]
    for _ in range(300):
        found = []
        for p in truth:
            of_prompt = draw.beta(2 * p, 2 * (1 - p), size=25)
            found.append(share_interval([draw.binomial(1, q, size=4).tolist() for q in of_prompt]))
        _, low, high = mean_of(found)
        covered += bool(low <= np.mean(truth) <= high)
    assert covered / 300 > 0.92


# -- a real run --------------------------------------------------------------------------------------------------------


def test_a_run_has_verdicts_a_page_and_a_table(run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    suite, folder = run
    before = states(folder)
    assert command(["evaluate", "emoji", "--suite", str(suite), "-o", str(folder), *QUICK]) == 0
    out = capsys.readouterr().out
    assert states(folder) == before, "nothing is drawn again"
    found = evaluation(folder)
    assert "emoji on the suite six: 6 prompts, 2 pictures each" in out and "mean of tasks" in out
    assert [t["task"] for t in found["tasks"]] == ["thing", "colour", "<b>odd"]
    assert found["tasks"][2]["right"] == 0 and found["clip"]["images"] == 12
    assert found["judge"]["scorers"] == ["pixel_scores"] and found["judge"]["clip"]
    page = (folder / "evaluation.html").read_text()
    assert "&lt;b&gt;odd: 0.0% right, 2 wrong" in page and "<b>odd" not in page and "pieces = " in page
    sources = [part.split('"')[0] for part in page.split('<img src="')[1:]]
    assert sources and all((folder / source).is_file() for source in sources)
    kept = json.loads((folder / "selection.json").read_text())["kept"]
    assert kept == sum(map(sum, (row["right"] for row in found["rows"]))), "the gallery keeps what is right"


def test_another_verify_is_judged_without_drawing(run: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = run
    before, old = states(folder), evaluation(folder)
    changed = [{**row, "verify": "pieces < 99" if row["id"] == "odd" else row["verify"]} for row in ROWS]
    try:
        assert (
            command(["evaluate", "emoji", "--suite", str(suite_file(tmp_path, changed)), "-o", str(folder), *QUICK])
            == 0
        )
        found = evaluation(folder)
        assert states(folder) == before
        assert found["tasks"][2]["right"] == 1 and found["suite"]["sha256"] != old["suite"]["sha256"]
        assert found["pictures"] == old["pictures"]
    finally:
        (folder / "evaluation.json").write_text(json.dumps(old))


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(run: tuple[Path, Path], tmp_path: Path) -> None:
    suite, whole = run
    words = ["evaluate", "emoji", "--suite", str(suite), "-o", str(tmp_path / "k"), *QUICK, "--batch-size", "1"]
    child = start([*holding(4), *words])
    journal = tmp_path / "k" / "results.jsonl"
    until = time.monotonic() + 200
    while (not journal.is_file() or journal.read_bytes().count(b"\n") < 2) and child.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    kept = states(tmp_path / "k")
    assert not (tmp_path / "k" / "evaluation.json").exists()
    assert command(words) == 0
    after = states(tmp_path / "k")
    assert sum(after.get(name) == state for name, state in kept.items()) >= 2 and len(after) == 12
    one, two = evaluation(tmp_path / "k"), evaluation(whole)
    assert [row["right"] for row in one["rows"]] == [row["right"] for row in two["rows"]]


def test_a_run_with_pictures_to_draw_is_not_evaluated(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "emoji", "--suite", str(run[0]), "-o", str(tmp_path / "r"), *QUICK]
    assert command([*words, "--max-total-images", "3"]) == 1
    assert "not evaluated" in capsys.readouterr().err and not (tmp_path / "r" / "evaluation.json").exists()
    with pytest.raises(InputError, match="a limit was reached"):
        genkit.evaluate("emoji", run[0], tmp_path / "r", num_images=2, defaults={"num_inference_steps": 1},
                        options=Options(max_total_images=4, device="cpu"))  # fmt: skip


def test_python_dry_run_and_distances(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, folder = run
    pictures = tmp_path / "real"
    pictures.mkdir()
    for k in range(5):
        Image.effect_noise((40 + k, 64), 40 + 10 * k).convert("RGB").save(pictures / f"{k}.png")
    found = genkit.evaluate("emoji", suite, folder, num_images=2, defaults={"num_inference_steps": 1},
                            against=pictures, options=Options(device="cpu"))  # fmt: skip
    assert (found["against"]["images"], found["against"]["pictures"]) == (12, 5)
    assert all(low <= value <= high for value, low, high in (found["against"][name] for name in DISTANCES))
    assert any("fid of 5 pictures means nothing" in note for note in found["against"]["notes"])
    same = genkit.evaluate("emoji", ROWS, folder, num_images=2, defaults={"num_inference_steps": 1},
                           against=folder, options=Options(device="cpu"))  # fmt: skip
    assert abs(same["against"]["fid"][0]) < 1e-3 and same["suite"]["sha256"] == found["suite"]["sha256"]
    capsys.readouterr()
    words = ["evaluate", "emoji", "--suite", str(suite), "-o", str(tmp_path / "none"), "--dry-run", "--json", *QUICK]
    assert command(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["tasks"]["thing"]) == (12, 3) and not (tmp_path / "none").exists()


def two_sizes(pictures: Any) -> Any:
    """A feature network that cannot do pictures of 64 pixels in height."""
    if pictures.shape[2] == 64:
        raise RuntimeError("no such size")
    return pictures.float().mean(dim=(2, 3))


def test_a_feature_network_that_fails_is_one_line(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = EntryPoints([EntryPoint("sizes", "tests.suites.test_evaluate:two_sizes", plugins.FEATURES)])
    monkeypatch.setattr(plugins, "entry_points", lambda group: found.select(group=group))
    pictures = tmp_path / "real"
    pictures.mkdir()
    for k in range(5):
        Image.effect_noise((40 + k, 64), 40).convert("RGB").save(pictures / f"{k}.png")
    before = states(run[1])
    words = ["evaluate", "emoji", "--suite", str(run[0]), "-o", str(run[1]), *QUICK, "--against", str(pictures)]
    assert command([*words, "--features", "sizes"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"genkit: --features: sizes: '{pictures / '0.png'}': RuntimeError: no such size"
    assert states(run[1]) == before


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{**ROWS[0], "verify": "loveliness > 1"}], [], "six.jsonl:1: verify: 'loveliness': no such score"),
        ([{**ROWS[0], "verify": "loveliness > 1"}], [], "--scorer NAME adds those of an installed scorer"),
        ([{**ROWS[0], "verify": "aesthetic > 1"}], [], "verify: 'aesthetic > 1' needs a head over CLIP embeddings"),
        ([{**ROWS[3], "verify": "clip > 0.1"}], ["--clip", "none"], "verify: 'clip > 0.1' needs a CLIP model"),
        ([{**ROWS[3], "verify": "count['cat'] == 1"}], [], "six.jsonl:1: verify: \"count['cat'] == 1\" needs boxes"),
        ([{**ROWS[3], "verify": "sim > 0.1"}], [], "verify: 'sim > 0.1' reads sim"),
        (ROWS, ["--against", "tests"], "--against: 'tests' holds 0 pictures"),
        (ROWS, ["--features", "inception"], "--features: says what --against compares"),
        (ROWS, ["--against", "training", "--features", "incepton"], "no such feature network"),
        (ROWS, ["--against", "nowhere"], "--against: 'nowhere' is not a folder"),
        (ROWS, ["--num-images", "0"], "--num-images: 0 must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused_first(
    rows: list[dict[str, Any]], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = suite_file(tmp_path, rows)
    assert command(["evaluate", "emoji", "--suite", str(suite), "-o", str(tmp_path / "r"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "r").exists()


def test_a_model_to_draw_with_and_a_detector_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["evaluate", "emoji-clip", "--suite", "emoji"]) == 2
    assert "draws none" in capsys.readouterr().err
    assert command(["evaluate", "emoji", "--suite", "geneval"]) == 2
    assert "give --detector" in capsys.readouterr().err
    assert command(["evaluate", "emoji", "--suite", "emoji", "--keep", "1"]) == 2, "a suite keeps nothing"


# -- leaderboards ------------------------------------------------------------------------------------------------------


def made(folder: Path, model: str, right: dict[str, list[int]], **changed: Any) -> Path:
    """Write an evaluation.json of tasks t and u, whose rows' verdicts are given as {"t0": [1, 0], …}."""
    rows = [{"id": name, "task": name[0], "right": verdicts, "images": []} for name, verdicts in right.items()]
    tasks = task_table(rows)
    found = {
        "suite": {"name": "s", "sha256": "0" * 64, "rows": len(rows)}, "model": {"name": model},
        "judge": {"scorers": []}, "settings": {"num_images": 2}, "tasks": tasks, "overall": overall(tasks),
        "rows": rows, "pictures": "x",
    }  # fmt: skip
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({**found, **changed}))
    return folder


GOOD = {f"{t}{k}": [1, int(k % 4 > 0)] for t in "tu" for k in range(20)}
POOR = {f"{t}{k}": [int(k % 2 == 0), 0] for t in "tu" for k in range(20)}


def test_ranks_and_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [made(tmp_path / "poor", "p/poor", POOR), made(tmp_path / "good", "good", GOOD)]
    twin = made(tmp_path / "twin", "twin", dict(GOOD))
    page = tmp_path / "board.html"
    assert command(["leaderboard", *map(str, places), str(twin), "-o", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(e["name"], e["rank"]) for e in found["entries"]] == [("good", 1), ("twin", 1), ("poor", 3)]
    assert found["entries"][2]["ranks"] == [3, 3] and found["entries"][0]["ranks"] == [1, 1]
    equal, sure = found["pairs"][0], found["pairs"][1]
    assert (equal["a"], equal["b"], equal["better"], equal["verdict"]) == ("good", "twin", 0.5, "not told apart")
    assert (sure["a"], sure["b"], sure["better"]) == ("good", "poor", 1.0) and "95 % sure" in sure["verdict"]
    assert sure["difference"] == pytest.approx(0.875 - 0.25)
    assert "Leaderboard" in page.read_text() and "not told apart" in page.read_text()


def test_resamples_drawn_a_few_at_a_time_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [made(tmp_path / "poor", "poor", POOR), made(tmp_path / "twin", "twin", POOR | {"t1": [1, 1]})]
    whole = leaderboard(places)
    monkeypatch.setattr("genkit.suites.leaderboard.MEMORY", 7 * 20 + 3)  # seven resamples, the last time four
    assert leaderboard(places) == whole and 0.5 < whole["pairs"][0]["better"] < 1


def test_pairs_are_judged_on_the_same_prompts(tmp_path: Path) -> None:
    """Two models that differ little, on prompts that differ much: only the paired comparison sees it."""
    one = {f"t{k}": [int(k < 20)] * 10 for k in range(40)}
    two = {f"t{k}": [int(k < 20)] * 9 + [0] for k in range(40)}
    found = leaderboard([made(tmp_path / "a", "a", one), made(tmp_path / "b", "b", two)])
    (low, high), pair = found["entries"][1]["interval"], found["pairs"][0]
    assert low < found["entries"][0]["right"] < high, "the intervals overlap"
    assert pair["better"] == 1.0 and pair["verdict"] == "a is better, 95 % sure"


def test_other_suites_judges_and_pictures_are_refused(tmp_path: Path, run: tuple[Path, Path]) -> None:
    a = made(tmp_path / "a", "a", GOOD)
    other = made(tmp_path / "b", "b", GOOD, suite={"name": "z", "sha256": "1" * 64, "rows": 40})
    with pytest.raises(
        InputError, match=r"b/evaluation\.json: is of another suite than .*a/evaluation\.json: s .* and z"
    ):
        leaderboard([a, other])
    judged = made(tmp_path / "c", "c", GOOD, judge={"scorers": [], "clip": {"model": "1"}})
    with pytest.raises(InputError, match=r"c/evaluation\.json: was judged by another clip than"):
        leaderboard([a, judged])
    with pytest.raises(InputError, match="is no comparison"):
        leaderboard([a])
    with pytest.raises(InputError, match="given twice"):
        leaderboard([a, a])
    with pytest.raises(InputError, match="holds no evaluation"):
        leaderboard([a, tmp_path])
    with pytest.raises(InputError, match=r"is not the name of an \.html file"):
        leaderboard([a, judged], tmp_path / "board.txt")
    broken = made(tmp_path / "d", "d", GOOD, rows=[{"id": "t0"}])
    with pytest.raises(InputError, match=r"d/evaluation\.json: is not the evaluation\.json of genkit evaluate"):
        leaderboard([a, broken])
    fewer = made(tmp_path / "e", "e", {name: right for name, right in GOOD.items() if name != "t7"})
    with pytest.raises(InputError, match=r"e/evaluation\.json: rows: 't7' of task 't' is only in one of it and"):
        leaderboard([a, fewer])
    tasks = [{k: v for k, v in task.items() if k != "any"} for task in evaluation(a)["tasks"]]
    older = made(tmp_path / "f", "f", GOOD, tasks=tasks)
    with pytest.raises(InputError, match=r"f/evaluation\.json: is not the evaluation\.json of genkit evaluate"):
        leaderboard([a, older])
    old = evaluation(run[1])
    stale = {**old, "pictures": "0" * 64}
    (run[1] / "evaluation.json").write_text(json.dumps(stale))
    try:
        with pytest.raises(InputError, match="is older than the pictures of its run"):
            leaderboard([a, run[1]])
    finally:
        (run[1] / "evaluation.json").write_text(json.dumps(old))


@pytest.mark.slow
def test_geneval_with_a_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "1", "-n", "1", "--width", "64", "--height", "64", "--device", "cpu"]
    options = ["--detector", str(tiny_owlvit(tmp_path / "owl")), *small]
    whole = ["evaluate", "emoji", "--suite", "geneval", *options, "-o", str(tmp_path / "whole")]
    assert command([*whole, "--max-total-images", "3"]) != 0, "it is evaluated when all pictures are there"
    assert not (tmp_path / "whole" / "evaluation.json").exists()
    assert len(read_results(tmp_path / "whole")) == 3
    rows = geneval.rows()[::25]  # some of each task
    assert len({row["task"] for row in rows}) == 6
    some = ["evaluate", "emoji", "--suite", str(suite_file(tmp_path, rows)), *options, "-o", str(tmp_path / "some")]
    assert command(some) == 0
    capsys.readouterr()
    found = json.loads((tmp_path / "some" / "evaluation.json").read_text())
    assert [task["task"] for task in found["tasks"]] == list(dict.fromkeys(row["task"] for row in rows))
    assert list(found["judge"]["detector"]["weights"]) == ["model.safetensors"]
    scores = {r.id: r.scores for r in read_results(tmp_path / "some")}
    for row in found["rows"]:
        [image] = row["images"]
        assert image["right"] == passes(Expression(row["verify"], names=None), scores[row["id"]]), row
        counted = [(w, n) for key, n in image["found"].items() for w in re.findall(r"^count\['(.*)'\]$", key)]
        for word, count in counted:
            assert 0 <= count <= sum(box[0] == word and box[1] > 0.1 for box in scores[row["id"]]["boxes"])
    wrong = [row for row in found["rows"] if not row["images"][0]["right"]]
    page = (tmp_path / "some" / "evaluation.html").read_text()
    assert wrong and all(escape(row["prompt"]) in page for row in wrong)
    before = (tmp_path / "some" / "evaluation.json").read_text()
    assert command(some) == 0, "nothing is left to draw"
    assert (tmp_path / "some" / "evaluation.json").read_text() == before
