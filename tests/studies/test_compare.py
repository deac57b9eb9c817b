"""Two runs, picture by picture: who is paired, who wins and how surely, and a page that shows hostile text as text."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest

from genkit.cli import run as command
from genkit.errors import InputError
from genkit.selection.intervals import mean_interval, share_interval
from genkit.studies.compare import compare_runs, telling
from tests.judged_run import judged_run


def plain(n: int, k: int) -> dict[str, float]:
    return {"clip": 0.1 * n + 0.01 * k}


def test_wins_ties_and_differences_are_counted_by_hand(tmp_path: Path) -> None:
    def better(n: int, k: int) -> dict[str, float]:
        return {"clip": plain(n, k)["clip"] + (0.0 if k == 0 else 0.02 if k < 4 else -0.01)}

    a, b = judged_run(tmp_path / "a", plain), judged_run(tmp_path / "b", better)
    found = compare_runs(a, b)
    clip = found["scores"]["clip"]
    assert (found["pairs"], found["prompts"], found["identical"]) == (20, 4, 20)
    assert (clip["b_wins"], clip["ties"], clip["win_rate"]) == (12, 4, pytest.approx(0.7))
    assert clip["difference"] == pytest.approx((3 * 0.02 - 0.01) / 5)
    low, high = clip["win_interval"]
    assert low < 0.7 < high
    assert (b / "compare.html").is_file()


def test_images_without_partner_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = judged_run(tmp_path / "a", plain, rows=3), judged_run(tmp_path / "b", plain, rows=2, images=6)
    (a / "images" / "r0-01.png").unlink()
    assert command(["compare", str(a), str(b), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["alone"]
    assert alone["only in A"] == {"count": 5, "first": [f"r2-0{k}" for k in range(5)]}
    assert alone["only in B"]["first"] == ["r0-05", "r1-05"]
    assert alone["not finished in both"]["first"] == ["r0-01"]


def test_other_prompts_and_seeds_are_no_pairs(tmp_path: Path) -> None:
    a = judged_run(tmp_path / "a", plain, rows=1)
    with pytest.raises(InputError, match="5 of another prompt"):
        compare_runs(a, judged_run(tmp_path / "b", plain, rows=1, prompt="something else"))
    with pytest.raises(InputError, match="5 of another seed"):
        compare_runs(a, judged_run(tmp_path / "c", plain, rows=1, seed=77))
    with pytest.raises(InputError, match="is the first run again"):
        compare_runs(a, a)
    with pytest.raises(InputError, match="not a run folder"):
        compare_runs(a, tmp_path)


def test_copies_go_into_an_empty_folder_only(tmp_path: Path) -> None:
    a, b = judged_run(tmp_path / "a", plain), judged_run(tmp_path / "b", plain)
    compare_runs(a, b, tmp_path / "out")
    assert len(list((tmp_path / "out" / "a").iterdir())) == 20
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["pairs"] == 20
    with pytest.raises(InputError, match="is not an empty folder"):
        compare_runs(a, b, tmp_path / "out")


def test_pictures_are_found_from_the_page_whatever_the_folder_is_called(tmp_path: Path) -> None:
    a = tmp_path / os.fsdecode(b"50% #1 ?\xff")
    judged_run(tmp_path / "a", plain, rows=1).rename(a)
    b = judged_run(tmp_path / "b", plain, rows=1)
    compare_runs(a, b)
    url = data_of(b / "compare.html")["images"][0]["a"]["file"]
    assert url == "../50%25%20%231%20%3F%FF/images/r0-00.png"
    assert os.path.samefile(os.path.join(os.fsencode(b), unquote_to_bytes(url)), a / "images" / "r0-00.png")


def test_the_terminal_lists_no_more_scores_than_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def many(n: int, k: int) -> dict[str, Any]:
        return {"clip": 0.5, "p": {f"label {i}": 0.5 for i in range(200)} if n else {"z, of all": 0.5, "label 0": 0.5}}

    a, b = (judged_run(tmp_path / n, many, rows=2, images=3) for n in "ab")
    assert command(["compare", str(a), str(b)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) < 45 and said[-2] == "… and 172 more scores, on the page"
    labels = [line.split("  ")[0] for line in said if line.startswith("p[")]
    assert labels[:2] == ["p['label 0']", "p['label 1']"], "those of most pairs first"


def test_a_large_page_shows_the_telling_pairs_and_the_table_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(n: int, k: int) -> dict[str, float]:
        return {"clip": plain(n, k)["clip"] + {(7, 3): 0.9, (15, 1): -0.9}.get((n, k), 0.001 * k)}

    a, b = judged_run(tmp_path / "a", plain, rows=20), judged_run(tmp_path / "b", other, rows=20)
    monkeypatch.setattr("genkit.studies.compare.PAGE_BYTES", 3000)
    assert command(["compare", str(a), str(b)]) == 0
    told = capsys.readouterr()
    table = [json.loads(line) for line in (b / "compare.jsonl").read_text().splitlines()]
    assert [pair["name"] for pair in table] == [f"r{n}-{k:02d}" for n in range(20) for k in range(5)]
    assert table[38]["b"]["scores"]["clip"] == pytest.approx(1.63) and table[38]["b"]["file"] == "images/r7-03.png"
    data = data_of(b / "compare.html")
    names = [pair["name"] for pair in data["images"]]
    assert 5 < len(names) < 20 and {"r7-03", "r15-01"} < set(names) and data["pairs"] == 100
    assert names == [pair["name"] for pair in table if pair["name"] in names], "in the order of the rows"
    assert f"the page shows {len(names)} of the pairs; all are in {b / 'compare.jsonl'}" in told.out
    assert told.err.splitlines()[-1] == "100 %  writing the pairs"
    compare_runs(a, b, tmp_path / "out", quiet=True)
    assert sorted(path.stem for path in (tmp_path / "out" / "b").iterdir()) == sorted(names)
    assert (tmp_path / "out" / "compare.jsonl").read_text() == (b / "compare.jsonl").read_text()
    assert not capsys.readouterr().err


def test_which_pairs_are_telling() -> None:
    gains = {"clip": {k: float(k) for k in range(100)}, "odd": {7: 1.0}}
    assert telling([10] * 100, gains, 1000) == list(range(100))
    few = telling([10] * 100, gains, 75)
    assert len(few) == 7 and {0, 7, 99} < set(few)
    assert telling([10] * 100, {}, 30) == telling([10] * 100, {"clip": {}}, 30) != [0, 1, 2]
    assert telling([99], gains, 10) == []


def data_of(page: Path) -> Any:
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_hostile_text_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "</script><img src=x onerror=alert(1)> \x1b[31m \u2028" + "y" * 99_000
    odd = {"clip": 0.5, "p": {"<b>label</b>\x1b[2J": 0.5}}
    a, b = (judged_run(tmp_path / n, lambda n, k: odd, rows=1, prompt=hostile, labels=[*odd["p"]]) for n in "ab")  # type: ignore[misc]
    assert command(["compare", str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    page = (b / "compare.html").read_text()
    assert page.count("</script>") == 2 and "<img src=x" not in page and "<b>label" not in page
    assert "innerHTML" not in page
    assert "default-src 'none'" in page and "unsafe" not in page
    assert len(page) < 100_000, "prompts are cut"
    assert data_of(b / "compare.html")["images"][0]["prompt"].startswith("</script><img")


def test_intervals_cover_grouped_truths() -> None:
    """Images of one prompt agree with each other: intervals that took them for independent would hold too rarely."""
    held = [0, 0]
    for seed in range(300):
        lot = random.Random(seed)
        rates = [lot.choice((0.1, 0.9)) for _ in range(20)]
        groups = [[float(lot.random() < rate) for _ in range(8)] for rate in rates]
        for i, interval in enumerate((share_interval, mean_interval)):
            _, low, high = interval(groups)
            held[i] += low <= 0.5 <= high
    assert min(held) / 300 > 0.91
