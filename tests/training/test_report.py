"""The page of a training run: what it shows, and that no text of others becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from genkit.training.loop import Outcome
from genkit.training.report import curve, described, write_page

HOSTILE = "<script>alert(1)</script>\x1b[31m =1+1 \udcff"


def page_of(folder: Path, scores: dict[int, dict[str, object]], best: int = 0, prompt: str = "a fox") -> str:
    lines = [{"step": k, "loss": 1 / k} for k in range(1, 2001)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples").mkdir()
    for step in scores:
        (folder / "samples" / f"{step:06d}.png").touch()
    write_page(folder, HOSTILE, scores, [prompt], best)
    return (folder / "index.html").read_text("utf-8")


def test_the_page_shows_scores_intervals_levels_and_samples(tmp_path: Path) -> None:
    tenths = [k / 10 for k in range(8)] + [float("nan"), None]  # nan: no picture had such a level
    page = page_of(
        tmp_path,
        {
            0: {"loss": 0.5, "loss_interval": (0.4, 0.6), "loss_by_time": tenths, "clip": 0.25},
            10: {"loss": 0.3, "loss_interval": (0.2, 0.4), "loss_by_time": tenths},
            20: {"loss": 0.7}, 30: {"loss": 0.8},
        },
        best=10,
    )  # fmt: skip
    cells = [re.sub("<[^>]+>", " ", row).split() for row in re.findall("<tr.*?</tr>", page)]
    assert cells[0] == ["step", "loss", "clip"]
    assert cells[1] == ["0", "0.5", "0.4", "–", "0.6", "0.25"]
    assert "<tr class=best><td>10</td>" in page and "Overfit since step 10" in page
    levels = next(row for row in cells if "to" in row)
    assert " ".join(levels).startswith("step 0 to 10 % 10 to 20 %") and " ".join(levels).endswith("80 to 90 %")
    assert cells[cells.index(levels) + 1][-1] == "–" and ">nan<" not in page
    assert page.index("samples/000030.png") < page.index("samples/000000.png"), "the newest first"


def test_texts_of_others_stay_texts(tmp_path: Path) -> None:
    page = page_of(tmp_path, {0: {"loss": 0.5, "<b>x</b>": 1.0}}, prompt=HOSTILE)
    assert "<script" not in page and "<b>x" not in page
    assert page.count("&lt;script&gt;") == 3, "title, heading, caption"
    assert "default-src 'none'" in page


def test_the_curve_has_at_most_some_hundred_points() -> None:
    drawn = curve([(k, 1 / k) for k in range(1, 10_001)], [(0, 0.5), (10_000, 0.1)])
    points = re.findall(r"[\d.]+,[\d.]+", drawn)
    assert 300 < len(points) <= 500 and drawn.count("<circle") == 2
    assert curve([(1, 0.5)], []) == ""


@pytest.mark.parametrize(("code", "words"), [(0, "model in"), (143, "continue from step 7")])
def test_the_last_words(code: int, words: str) -> None:
    said = described(Outcome(code, "stopped", 7, {"step": 5, "loss": 0.25}, 3.0, 5), Path("runs/x"))
    assert words in said and "best: step 5: loss 0.25" in said and "overfit since step 5" in said
