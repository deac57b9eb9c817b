"""Boxes in the gallery: drawn over the pictures they belong to, as text only, and hidden by a button."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from genkit.pages.gallery import write_gallery
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.run import Run
from genkit.selection.decide import decide
from tests.null_run import CONFIG, png
from tests.pages.test_gallery import CHROMIUM, browse

HOSTILE = "</script><b>cat"


def made(folder: Path) -> Path:
    row = Request(id="a", prompt="two cats", num_images=2, detect=[HOSTILE, "a dog"])
    boxes = [[HOSTILE, 0.9, 1.0, 1.0, 3.0, 4.0, "red"], ["a dog", 0.04, 0.0, 0.0, 1.0, 1.0, "grey"]]
    detected = {"words": [HOSTILE, "a dog"], "size": [4, 5], "threshold": 0.1, "floor": 0.03}
    with Run.open(folder, CONFIG, [row]) as run:
        for n in range(2):
            scores = {"boxes": None if n else boxes, "detected": detected}
            run.save(Result("a", n, n, width=4, height=5, scores=scores, prompt=row.prompt), png(row, n))
        results = list(run.results.values())
    return write_gallery(folder, [row], results, decide([row], results), {"binding": {}, "info": {}})


def test_boxes_are_data_of_the_page(tmp_path: Path) -> None:
    text = made(tmp_path / "run").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    images: list[dict[str, Any]] = json.loads(found[1])["images"]
    assert images[0]["scores"]["boxes"][0][0] == HOSTILE and images[1]["scores"]["boxes"] is None
    assert HOSTILE not in text and 'id="boxes"' in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_boxes_over_the_picture(tmp_path: Path) -> None:
    document = browse(made(tmp_path / "run"), tmp_path / "profile", "#a-00")
    shown = document[: document.index('<script type="application/json"')]
    over = re.search(r'<span id="over">(.*?)</span>', shown, re.DOTALL)
    assert over is not None
    assert over[1].count("<rect ") == 1  # the other one scores less than the detector's threshold
    assert 'x="1" y="1" width="2" height="3"' in over[1] and "&lt;/script&gt;&lt;b&gt;cat 0.90</text>" in over[1]
    assert re.search(r'<button id="boxes" aria-pressed="true">', shown)  # in sight
    assert "0.90 red" in shown
