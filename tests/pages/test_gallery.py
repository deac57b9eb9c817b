"""The page of a run: it says what it should, whatever the texts in it try; a browser runs its own script only."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from genkit.pages.gallery import write_gallery
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.run import Run
from genkit.selection.decide import decide
from tests.null_run import CONFIG, png

HOSTILE = [
    "<script>document.title='pwned'</script>",
    "</script><script>document.title='pwned'</script>",
    '"><img src=x onerror="document.title=\'pwned\'">',
    "<!--<script>",
    "]]>&lt;b&gt; &amp; ' \" `${1}` {{data}} {{title}}",
    "\u202eright to left \u2028 line \x1b[31mred\x1b[0m \\u003c",
    "a red fox \U0001f98a 狐",
]


def made(folder: Path, **fields: Any) -> Path:
    """A run of hostile prompts, of which the last image failed and the first but one is not kept."""
    hostile = {"negative_prompt": HOSTILE[1], "labels": [HOSTILE[1], HOSTILE[2]], "meta": {HOSTILE[1]: HOSTILE[2]}}
    rows = [Request(id=f"row{n}", prompt=text, seed=n, **{**hostile, **fields}) for n, text in enumerate(HOSTILE)]
    rows[1] = Request(**{**rows[1].to_json(), "gate": "clip > 0.9"})
    config = {"binding": {"seed": 0, "model": {"name": HOSTILE[1]}}, "info": {"genkit": HOSTILE[1], "started": "2026"}}
    with Run.open(folder, config, rows) as run:
        for n, row in enumerate(rows):
            scores = {"clip": n / 10, "nan": False, "p": dict.fromkeys(row.labels or (), 0.5)}
            found = Result(str(row.id), 0, n, width=4, height=5, scores=scores, prompt=row.prompt)
            if n < len(rows) - 1:
                run.save(found, png(row, 0))
            else:
                found.status, found.reason = "failed", HOSTILE[1]
                run.fail(found)
        results = list(run.results.values())
        return write_gallery(folder, rows, results, decide(rows, results), run.config)


def block(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_every_image_with_its_verdict(tmp_path: Path) -> None:
    data = block(made(tmp_path / "run").read_text("utf-8"))
    assert data["name"] == "run"
    assert [data["rows"][image["id"]]["prompt"] for image in data["images"]] == HOSTILE
    assert [image["kept"] for image in data["images"]] == [True, False, True, True, True, True, False]
    assert data["images"][1]["reason"] == "gate: clip > 0.9"
    assert data["images"][6]["reason"] == f"failed: {HOSTILE[1]}"
    assert data["images"][2]["file"] == "images/row2-00.png"


def test_no_text_can_leave_its_block_or_add_a_tag(tmp_path: Path) -> None:
    plain = made(tmp_path / "run").read_text("utf-8")
    start = plain.index('id="data">') + len('id="data">')
    inside = plain[start : plain.index("</script>", start)]
    assert not set("<>&\u2028\u2029") & set(inside)
    assert plain.count("<script") == plain.count("</script>") == 2
    assert "pwned" not in plain[:start]


def test_a_folders_name_is_escaped_too(tmp_path: Path) -> None:
    page = made(tmp_path / "a<b>&run").read_text("utf-8")
    assert "<title>a&lt;b&gt;&amp;run</title>" in page
    assert block(page)["name"] == "a<b>&run"


def test_the_policy_allows_the_pages_own_script_alone(tmp_path: Path) -> None:
    page = made(tmp_path / "run").read_text("utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_reaches_for_nothing_outside(tmp_path: Path) -> None:
    page = made(tmp_path / "run").read_text("utf-8")
    assert not re.findall(r"https?:|//[a-z]+\.|@import|url\(", page)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)


def test_a_row_without_scores_or_prompt_is_shown(tmp_path: Path) -> None:
    rows = [Request(id="a", num_images=2)]
    with Run.open(tmp_path / "run", CONFIG, rows) as run:
        run.save(Result("a", 0, 0), png(rows[0], 0))
        results = list(run.results.values())
        page = write_gallery(tmp_path / "run", rows, results, decide(rows, results), run.config)
    (image,) = block(page.read_text())["images"]
    assert (image["kept"], image["scores"]) == (True, {})


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def browse(page: Path, profile: Path, target: str = "") -> str:
    """The document as headless Chromium has it once the page's script has run."""
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    flags = f"--headless --no-sandbox --disable-gpu {quiet} --virtual-time-budget=4000 --dump-dom"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={profile}", f"{page.as_uri()}{target}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_the_prompts_as_text_and_runs_none_of_them(tmp_path: Path) -> None:
    page = made(tmp_path / "run")
    document = browse(page, tmp_path / "profile", "#row1-00")
    assert "<title>run</title>" in document
    shown = document[: document.index('<script type="application/json"')]
    assert shown.count('class="prompt"') == len(HOSTILE)
    assert "pwned" not in re.findall(r"<title>.*?</title>", document)[0]
    assert "&lt;/script&gt;&lt;script&gt;document.title='pwned'&lt;/script&gt;" in shown
    assert '<img src="x"' not in shown
    assert re.search(r"<h2[^>]*>&lt;/script&gt;", shown), "the picture named after # is open"
    assert 'src="images/row0-00.png"' in shown


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_ten_thousand_images_open_a_screenful_at_a_time(tmp_path: Path) -> None:
    rows = [Request(id=f"r{n}", prompt=f"picture {n}", num_images=10) for n in range(1000)]
    results = [Result(r.id or "", k, k, file=f"images/{r.id}-{k:02d}.png") for r in rows for k in range(10)]
    page = write_gallery(tmp_path, rows, results, decide(rows, results), CONFIG)
    document = browse(page, tmp_path / "profile", "#r999-09")
    assert 120 <= document.count('class="card ') <= 1200
    assert "10000 images" in document
    assert re.search(r"<h2[^>]*>picture 999</h2>", document), (
        "the picture named after # is open, though its card is not"
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_long_texts_are_cut_and_stay_text(tmp_path: Path) -> None:
    long = "<b>\x1b[31m=cmd|'/c calc'!A1 " * 11_000  # 300 kB
    label = long[:99_500]
    row = Request(id="a", prompt=long[:99_000], labels=[label], meta={"k": long[:60_000]}, num_images=2)
    results = [
        Result("a", 0, 0, file="images/a-00.png", prompt=row.prompt, scores={"clip": 0.1, "p": {label: 1.0}}),
        Result("a", 1, 1, status="failed", reason=long),
    ]
    page = write_gallery(tmp_path, [row], results, decide([row], results), CONFIG)
    document = browse(page, tmp_path / "profile", "#a-00")
    shown = document[: document.index('<script type="application/json"')]
    cards = re.findall(r'<(?:div|span) class="(?:prompt|why soft)"[^>]*>([^<]*)<', shown)
    assert len(cards) == 3
    assert all(200 < len(html.unescape(text)) <= 310 for text in cards)
    assert "<b>" not in shown
    (heading,) = re.findall(r"<h2[^>]*>([^<]*)</h2>", shown)
    assert html.unescape(heading).startswith(row.prompt[:9_990])
    assert heading.endswith("(99000 characters; requests.jsonl and results.jsonl have them all)")
    assert block(page.read_text())["rows"]["a"]["prompt"] == row.prompt
