"""The gallery of a large run: what is in its files, what is left of earlier ones, and the page as Chromium shows it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genkit.errors import HostError
from genkit.pages import large, outcome
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.runs.run import Run
from genkit.selection.picking import Picking
from genkit.studies.filter import refilter
from tests.null_run import CONFIG, png
from tests.pages.test_gallery import HOSTILE
from tests.pages.test_pages_browser import BROWSER, DRIVER, Browser, browser

ROWS, IMAGES = 40, 3
__all__ = ["browser"]


def made(folder: Path, rows: int = ROWS) -> Path:
    """A run of three images a row: clip grows with the row, the second image failed, prompts are hostile."""
    odd: dict[str, Any] = {"meta": {HOSTILE[0]: HOSTILE[1], "__proto__": "own"}, "labels": [HOSTILE[1], "__proto__"]}
    asked = [
        Request(
            id=f"row{n}",
            prompt=f"{HOSTILE[n % len(HOSTILE)]} number\n{n}",
            seed=n,
            num_images=IMAGES,
            **(odd if n % 2 else {}),
        )
        for n in range(rows)
    ]
    with Run.open(folder, CONFIG, asked) as run:
        for n, row in reversed(list(enumerate(asked))):
            for k in range(IMAGES):
                scores = {"clip": (n + k / 4) / rows, "flat": False, "p": dict.fromkeys(row.labels or (), 0.5)}
                r = Result(str(row.id), k, n, scores=scores, prompt=row.prompt, meta=row.meta, width=4, height=5)
                if k == 1:
                    r.status, r.reason = "failed", HOSTILE[1]
                    run.fail(r)
                else:
                    run.save(r, png(row, k))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a large run from 50 images on, in files of 8 images and 16 prompts."""
    monkeypatch.setattr(outcome, "LARGE", 50)
    monkeypatch.setattr(large, "IMAGES", 8)
    monkeypatch.setattr(large, "LINES", 16)


def payload(path: Path) -> str:
    """The text that a file hands to the page."""
    text = path.read_text("utf-8")
    found = re.fullmatch(r"genkit\('[\w/]+','((?:[^'\\\n]|\\['\\])*)'\);\n", text)
    assert found is not None, "one call with one text"
    return re.sub(r"\\(.)", r"\1", found[1])


def head(folder: Path) -> dict[str, Any]:
    page = (folder / "index.html").read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])["large"]


def test_files_hold_what_the_page_of_a_small_run_holds(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path / "run")
    (run / "images/row3-00.png").unlink()
    refilter(run, where="clip > 0.3", keep=1)
    about = head(run)
    files = run / about["folder"]
    images: list[dict[str, Any]] = []
    rows: dict[str, Any] = {}
    for n in range(-(-about["images"] // 8)):
        shelf = json.loads(payload(files / f"images/0/{n}.js"))
        rows |= {row.pop("id"): row for row in shelf["rows"]}
        for image, (kept, rank, reason, of, gone) in zip(shelf["images"], shelf["verdicts"], strict=True):
            image |= {"kept": bool(kept), "rank": rank or None, "reason": reason, "of": of}
            images.append(image | ({"status": "failed", "file": None} if gone else {}))
    texts = "\n".join(json.loads(payload(path)) for path in sorted((files / "texts").iterdir()))
    assert (about["images"], about["rows"], about["texts"]) == (ROWS * IMAGES, ROWS, 3)
    assert len(texts.splitlines()) >= ROWS and texts.split("\n")[7].startswith("row7 <script>")
    monkeypatch.setattr(outcome, "LARGE", 1000)
    refilter(run, where="clip > 0.3", keep=1)
    page = (run / "index.html").read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    expected = json.loads(found[1])
    assert rows == expected["rows"]
    pairs = zip(images, expected["images"], strict=True)
    assert [{name: image[name] for name in one} for image, one in pairs] == expected["images"]
    assert about["count"]["failed"] == sum(image["status"] == "failed" for image in images) == 41
    assert about["count"]["kept"] == sum(image["kept"] for image in images)
    assert not (run / "gallery").exists(), "a small run has no such files"
    assert "genkit" not in page.split("<script>")[1].split("data.made")[0], "nor what reads them"


def test_files_of_earlier_galleries_go_and_those_that_are_written_stay(small: None, tmp_path: Path) -> None:
    run = made(tmp_path / "run", 20)
    refilter(run)
    first = head(run)["folder"]
    other = run / f"gallery/18ec00-{large._host()}-{os.getpid()}"  # of a process that runs
    far = run / "gallery/18ec00-00000000-7"  # of another machine
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    killed = run / f"gallery/18ec00-{large._host()}-{process.pid}"
    for path in (other, far, killed):
        path.mkdir()
    mine = run / "gallery/my-notes"
    mine.mkdir()
    refilter(run, keep=1)
    assert head(run)["folder"] != first
    assert {path.name for path in (run / "gallery").iterdir()} == {
        head(run)["folder"].split("/")[1],
        other.name,
        far.name,
        "my-notes",
    }
    again = Run.open(run, CONFIG, [Request(**json.loads(line)) for line in (run / "requests.jsonl").open()])
    again.close()
    assert (run / head(run)["folder"] / "whole.js").exists(), "a run that goes on leaves them"


def test_a_disk_that_is_full_leaves_the_old_page(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "run", 20)
    refilter(run)
    page, files = (run / "index.html").read_bytes(), list((run / "gallery").iterdir())

    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(large, "_order", full)
    with pytest.raises(HostError, match="No space left"):
        refilter(run, keep=1)
    assert (run / "index.html").read_bytes() == page
    assert list((run / "gallery").iterdir()) == files


def test_generate_writes_it_too(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genkit.job import run as job

    run = made(tmp_path / "run", 20)
    rows = [Request(**json.loads(line)) for line in (run / "requests.jsonl").open()]
    monkeypatch.setattr(job, "LARGE", 50)
    with Run.open(run, CONFIG, rows) as opened:
        options = SimpleNamespace(picking=Picking())
        planned: Any = SimpleNamespace(rows=rows, options=options)
        found = job.conclude(planned, opened)[1:]
    assert found == (40, [])
    assert head(run)["images"] == 60
    data = (run / "selection.json").read_bytes()
    monkeypatch.setattr(job, "LARGE", 100)
    assert job.conclude(planned, opened)[1:] == found
    assert (run / "selection.json").read_bytes() == data


NEEDS = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with chromedriver is installed")
SHOWN = """return document.querySelectorAll('#grid .card').length === arguments[0]
    && document.getElementById('foot').textContent"""
PROMPTS = "return [...document.querySelectorAll('#grid .prompt')].map((node) => node.textContent.split('\\n').pop())"
SET = """const node = document.getElementById(arguments[0]);
    node.value = arguments[1]; node.dispatchEvent(new Event(arguments[2]))"""
OPENED = """return document.getElementById('view').open
    && document.getElementById('details').textContent.includes(arguments[0])"""
FIRST = """const one = document.querySelector('#grid .prompt');
    return one && one.textContent.endsWith(`\\n${arguments[0]}`)"""
FACTS = "return document.getElementById('facts').textContent"
SEARCHES = [("ROW77 number", 3, "77"), ("</script> 15", 3, "15"), ("nothing", 0, ""), ("number", 120, "0")]
LOST = "return document.getElementById('lost').textContent.includes('images/0/30.js cannot be read; genkit filter')"


@NEEDS
def test_a_browser_opens_searches_sorts_and_jumps(small: None, browser: Browser, tmp_path: Path) -> None:
    run = made(tmp_path / "50% #1 ?", 100)
    refilter(run, where="clip > 0.3", rank_by="clip", keep=1)
    cards: Callable[[int], None] = lambda number: browser.wait(SHOWN, number)  # noqa: E731
    browser.size(1200, 900)
    browser.driver.get((run / "index.html").as_uri())
    cards(120)
    assert browser.run(FACTS) == "null · 300 images · 70 kept · 100 failed"
    assert browser.run(PROMPTS)[:4] == ["0", "0", "0", "1"]
    browser.run("scrollTo(0, document.body.scrollHeight)")
    browser.wait("return document.querySelectorAll('#grid .card').length > 120")
    for typed, number, first in SEARCHES:
        browser.run(SET, "search", typed, "input")
        if number:
            browser.wait(FIRST, first)
            cards(number)
        else:
            browser.wait("return !document.getElementById('none').hidden")
    browser.run("document.querySelector('#tabs [value=kept]').click()")
    cards(70)
    browser.run(SET, "sort", "clip", "change")
    browser.wait(FIRST, "99")
    assert browser.run(PROMPTS)[:3] == ["99", "98", "97"]
    browser.run("document.querySelector('#tabs [value=all]').click()")
    browser.run(SET, "page", "3", "change")
    cards(60)
    assert browser.run("return document.getElementById('foot').textContent").startswith("Made with genkit")
    browser.run("location.hash = 'row41-02'")
    browser.wait(OPENED, "images/row41-02.png")
    details = browser.run("return document.getElementById('details').innerText")
    assert "proto\nown" in details and "<script>document.title='pwned'</script>" in details
    assert browser.run("return document.title") == "50% #1 ?"
    browser.run("document.getElementById('close').click(); location.hash = 'row41-07'")
    browser.run("document.querySelector('#tabs [value=failed]').click()")
    cards(100)
    browser.run("document.querySelector('#grid .card').click()")
    browser.wait(OPENED, "failed: </script>")
    assert browser.driver.get_log("browser") == [], "nothing against the page's policy"
    (run / head(run)["folder"] / "images/0/30.js").unlink()
    browser.driver.get("about:blank")
    browser.driver.get((run / "index.html").as_uri() + "#row80-00")
    browser.wait(LOST)
    assert browser.driver.get_log("browser") != []
