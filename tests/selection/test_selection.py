"""What is kept and why: the decision, deciding again on a recorded run, and the copies of what is kept."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genkit.errors import HostError, InputError
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.run import Run
from genkit.scoring.gates import Expression, passes
from genkit.selection.decide import decide
from genkit.studies.filter import refilter
from tests.null_run import CONFIG, png, rows_of

ROOT = Path(__file__).parents[2]


def result(row: str, index: int, clip: float | None = None, **fields: Any) -> Result:
    scores = {"nan": False, "flat": False} | ({} if clip is None else {"clip": clip})
    return Result(row, index, seed=index, **{"scores": scores, "file": f"images/{row}-{index:02d}.png", **fields})


def verdicts(row: Request, results: list[Result], **options: Any) -> list[tuple[bool, int | None, str]]:
    images = decide([row], results, **options)["images"]
    return [(i["kept"], i["rank"], i["reason"]) for i in images.values()]


def test_the_best_by_clip_that_pass_the_gate_are_kept() -> None:
    row = Request(id="a", prompt="x", num_images=4, keep=2, gate="clip > 0.2")
    found = [result("a", k, clip) for k, clip in enumerate([0.25, 0.1, 0.4, 0.3])]
    assert verdicts(row, found) == [
        (False, 3, "rank 3 of 3, keep 2"),
        (False, None, "gate: clip > 0.2"),
        (True, 1, "kept"),
        (True, 2, "kept"),
    ]


def test_without_a_score_the_first_drawn_are_the_best_and_ties_go_to_the_first() -> None:
    row = Request(id="a", prompt="x", num_images=3, keep=2)
    assert [k for k, *_ in verdicts(row, [result("a", k) for k in (2, 0, 1)])] == [True, True, False]
    assert [k for k, *_ in verdicts(row, [result("a", k, 0.3) for k in (2, 0, 1)])] == [True, True, False]


def test_without_keep_or_gate_everything_that_is_done_is_kept() -> None:
    row = Request(id="a", prompt="x", num_images=4)
    found = [result("a", 0, 0.1), result("a", 1, 0.2), result("a", 2, status="failed", reason="nan"),
             result("a", 3, math.nan)]  # fmt: skip
    assert verdicts(row, found) == [
        (True, 2, "kept"),
        (True, 1, "kept"),
        (False, None, "failed: nan"),
        (True, None, "kept"),
    ]


@pytest.mark.parametrize("unknown", [math.nan, None])
@pytest.mark.parametrize("gate", ["clip > 0.2", "not clip > 0.4", "clip != 0.5", "clip < 0.9 or not nan"])
def test_a_score_that_is_nan_passes_no_gate(gate: str, unknown: float | None) -> None:
    scores = {"clip": unknown, "nan": False, "flat": False}
    assert not passes(Expression(gate), scores)
    assert passes(Expression(gate), scores | {"clip": 0.3})
    row = Request(id="a", prompt="x", gate=gate)
    assert verdicts(row, [result("a", 0, scores=scores)]) == [(False, None, f"gate: {gate} (no clip)")]


@pytest.mark.parametrize("unknown", [math.nan, None])
def test_a_score_that_is_nan_is_no_rank(unknown: float | None) -> None:
    found = [result("a", 0, scores={"clip": unknown}), result("a", 1, 0.1)]
    row = Request(id="a", prompt="x", num_images=2, keep=2)
    nan = (False, None, "nan: no score to rank by")
    assert verdicts(row, found) == [nan, (True, 1, "kept")]
    assert verdicts(row, found, rank_by="1 - clip") == [nan, (True, 1, "kept")]


def test_rank_by_is_any_number_and_the_options_stand_in_for_the_rows() -> None:
    row = Request(
        id="a", prompt="x", num_images=2, keep=2, gate="clip > 0.3", rank_by="clip", labels=["a cat", "a dog"]
    )
    found = [
        result("a", k, scores={"clip": c, "p": {"a cat": p, "a dog": 1 - p}})
        for k, (c, p) in enumerate([(0.4, 0.1), (0.2, 0.9)])
    ]
    assert [k for k, *_ in verdicts(row, found)] == [True, False]
    assert [k for k, *_ in verdicts(row, found, where="clip > 0.1", keep=1)] == [True, False]
    assert [k for k, *_ in verdicts(row, found, where="clip > 0.1", keep=1, rank_by="p['a cat']")] == [False, True]
    assert [k for k, *_ in verdicts(row, found, where="p['a dog'] > 0.5")] == [True, False]


def test_a_label_that_only_some_rows_have_passes_there_alone() -> None:
    rows = [Request(id="a", prompt="x", labels=["a cat", "a dog"]), Request(id="b", prompt="x")]
    found = [result("a", 0, scores={"p": {"a cat": 0.9, "a dog": 0.1}}), result("b", 0, scores={"clip": 0.3})]
    images = decide(rows, found, where="p['a cat'] > 0.5")["images"]
    assert images["a-00"]["kept"]
    assert images["b-00"]["reason"] == "gate: p['a cat'] > 0.5 (no p['a cat'])"


def test_images_beyond_what_the_row_asks_for_and_rows_that_are_gone_are_not_kept() -> None:
    row = Request(id="a", prompt="x", num_images=1)
    found = [result("a", 0, 0.1), result("a", 1, 0.9), result("gone", 0, 0.9)]
    selection = decide([row], found)
    assert list(selection["images"]) == ["a-00", "a-01"]
    assert (selection["kept"], selection["of"]) == (1, 2)
    assert "asks for now" in selection["images"]["a-01"]["reason"]


# -- a recorded run --


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three rows of two images, clip scores 0.0, 0.1, … 0.5; row r1 keeps one."""
    rows = rows_of(3, 2)
    rows[1] = Request(**{**rows[1].to_json(), "keep": 1, "meta": {"set": "test"}})
    with Run.open(tmp_path / "run", CONFIG, rows) as made:
        for n, row in enumerate(rows):
            for k in range(2):
                clip = (2 * n + k) / 10
                made.save(result(f"r{n}", k, clip, prompt=row.prompt, meta=row.meta), png(row, k))
    return tmp_path / "run"


def kept(run: Path) -> list[str]:
    return [k for k, image in json.loads((run / "selection.json").read_text())["images"].items() if image["kept"]]


def test_deciding_again_rewrites_the_selection_and_the_page_and_nothing_else(run: Path) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert refilter(run) == {"run": str(run), "rows": 3, "images": 6, "kept": 5}
    assert kept(run) == ["r0-00", "r0-01", "r1-01", "r2-00", "r2-01"]
    assert refilter(run, where="clip > 0.15", keep=1)["kept"] == 2
    assert kept(run) == ["r1-01", "r2-01"]
    assert refilter(run, where="clip < 0.45", rank_by="-clip", keep=1)["kept"] == 3
    assert kept(run) == ["r0-00", "r1-00", "r2-00"]
    assert all(path.read_bytes() == data for path, data in before.items())
    assert {p.name for p in run.rglob("*") if p.is_file()} - {p.name for p in before} == {
        "selection.json",
        "index.html",
    }


def test_a_picture_that_was_taken_away_is_not_kept(run: Path) -> None:
    (run / "images/r2-01.png").unlink()
    refilter(run)
    image = json.loads((run / "selection.json").read_text())["images"]["r2-01"]
    assert (image["kept"], image["reason"]) == (False, "failed: its file is missing")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"where": "clpi > 0.3"}, "--where: 'clpi': no such score (did you mean 'clip'?)"),
    "misspelt rank": ({"rank_by": "clpi"}, "--rank-by: 'clpi': no such score (did you mean 'clip'?)"),
    "a number": ({"where": "clip"}, "--where: 'clip' is a number"),
    "no label": ({"where": "p['a cat'] > 0.5"}, "--where: p['a cat']: no such label"),
    "python": ({"where": "__import__('os')"}, "--where: "),
    "keep nothing": ({"keep": 0}, "--keep: 0 is not within 1 to 100000"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_and_change_nothing(case: str, run: Path) -> None:
    options, text = BAD[case]
    with pytest.raises(InputError) as refused:
        refilter(run, **options)
    assert str(refused.value).startswith(text)
    assert "\n" not in str(refused.value)
    assert not (run / "selection.json").exists()


def test_a_score_that_nothing_computed_is_refused(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", CONFIG, rows_of(1)) as made:
        made.save(result("r0", 0), png(rows_of(1)[0], 0))
    with pytest.raises(InputError, match="'clip': no image of this run has that score"):
        refilter(tmp_path / "run", where="clip > 0.3")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.json"):
        refilter(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_kept_pictures_are_copied_with_their_metadata_and_again(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "best"
    assert refilter(run, where="clip > 0.25", out=out)["copied"] == 3
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["r1-01.png", "r2-00.png", "r2-01.png"]
    assert lines[0] | {"sha256": "", "scores": {}} == {
        "file_name": "r1-01.png", "text": "picture 1", "id": "r1", "index": 1, "seed": 1, "sha256": "", "scores": {},
        "meta": '{"set": "test"}',
    }  # fmt: skip
    for line in lines:
        assert hashlib.sha256((out / line["file_name"]).read_bytes()).hexdigest() == line["sha256"]
        assert (out / line["file_name"]).stat().st_nlink == 1
    assert refilter(run, where="clip < 0.35", keep=1, out=out)["copied"] == 2
    assert sorted(p.name for p in out.iterdir()) == ["metadata.jsonl", "r0-01.png", "r1-01.png"]


@pytest.mark.parametrize("foreign", ["mine.png", "metadata.jsonl", "r1-01.png"])
def test_somebody_elses_folder_is_not_exported_to(foreign: str, run: Path, tmp_path: Path) -> None:
    """Nor is an earlier export of which a picture was edited."""
    out = tmp_path / "best"
    if foreign == "r1-01.png":
        refilter(run, out=out)
        (out / foreign).write_bytes(b"retouched by hand")
    else:
        out.mkdir()
        (out / "mine.png").write_bytes(b"mine")
        (out / "metadata.jsonl").write_text('{"file_name": "mine.png", "text": "mine"}\n')
    before = {p: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(InputError, match="no earlier export like this"):
        refilter(run, where="clip > 0.4", out=out)
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_a_damaged_picture_is_not_exported(run: Path, tmp_path: Path) -> None:
    (run / "images/r0-00.png").write_bytes(b"torn")
    with pytest.raises(HostError, match=r"r0-00\.png: is damaged"):
        refilter(run, out=tmp_path / "best")


def test_deciding_needs_no_torch(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from genkit.studies.filter import refilter\n"
        f"refilter(Path({str(run)!r}), where='clip > 0.1')\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
