"""The pages as Chromium lays them out: what is in sight, what covers what, at the sizes of desks and phones."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genkit.pages.label import Ballots, Desk, Server
from genkit.selection.calibrate import read_pictures
from genkit.studies.compare import compare_runs
from tests.judged_run import judged_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
failures = pytest.importorskip("selenium.common.exceptions", reason="selenium is not installed")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with chromedriver is installed")

WINDOWS = [(1200, 900), (600, 1400), (1600, 500), (390, 844), (320, 568), (844, 390)]
PICTURES = {"square": (128, 128), "tall": (128, 512), "wide": (512, 128), "large": (1536, 1024)}
PROMPTS = {"short": "a red fox", "long": "a red fox in the snow, " * 80, "word": "x" * 1900}
CASES = [*itertools.product(("square", "tall", "wide"), ("short", "long")), ("large", "word")]

# Boxes as [left, top, right, bottom]; of the picture, the part that is painted within its element.
LABEL = """
const box = (node) => { const r = node.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const picture = document.getElementById("picture"), [left, top, right, bottom] = box(picture);
const { naturalWidth: width, naturalHeight: height } = picture;
const scale = Math.min((right - left) / width, (bottom - top) / height);
const across = (right - left - scale * width) / 2, down = (bottom - top - scale * height) / 2;
const painted = [left + across, top + down, right - across, bottom - down];
const [x, y, X, Y] = painted;
const at = [[x + 2, y + 2], [X - 2, y + 2], [x + 2, Y - 2], [X - 2, Y - 2], [(x + X) / 2, (y + Y) / 2]];
const others = {};
for (const id of ["prompt", "undo", "no", "yes", "later"]) others[id] = box(document.getElementById(id));
return { painted, others, header: box(document.querySelector("header")),
  hidden: at.filter(([x, y]) => document.elementFromPoint(x, y) !== picture),
  cut: [...document.querySelectorAll("button")].filter((b) => b.scrollWidth > b.clientWidth).map((b) => b.id),
  page: [document.documentElement.scrollWidth, document.documentElement.scrollHeight] };
"""
LOADED = """
const picture = document.getElementById("picture");
return picture.complete && picture.naturalWidth > 0 && document.getElementById("name").textContent === arguments[0];
"""


class Browser:
    """Chromium with an exact viewport."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for name in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", "no-first-run",
            "disable-background-networking", "disable-component-update", "disable-sync", f"user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(f"--{name}")
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def size(self, width: int, height: int) -> None:
        phone = min(width, height) < 480
        given = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", given)
        self.wait("return innerWidth === arguments[0] && innerHeight === arguments[1]", width, height)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: Any) -> None:
        """Until the script returns true, seen by the next frame."""
        wrapped = (
            "const done = arguments[arguments.length - 1], given = arguments;"
            f"const asked = function () {{ {script} }};"
            "const look = () => asked.apply(null, given) ? requestAnimationFrame(() => done(true))"
            " : setTimeout(look, 5); look();"
        )
        assert self.driver.execute_async_script(wrapped, *arguments)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        found = Browser(tmp_path_factory.mktemp("profile"))
    except failures.WebDriverException as error:
        pytest.skip(f"Chromium does not start: {error}")
    found.driver.set_script_timeout(120)
    yield found
    found.driver.quit()


def apart(one: list[float], two: list[float]) -> bool:
    return one[2] <= two[0] + 0.5 or two[2] <= one[0] + 0.5 or one[3] <= two[1] + 0.5 or two[3] <= one[1] + 0.5


def test_label_shows_the_whole_picture_with_prompt_and_buttons(browser: Browser, tmp_path: Path) -> None:
    folder = judged_run(tmp_path / "run", lambda n, k: {"clip": 0.5}, rows=len(CASES), images=1)
    for n, (picture, _) in enumerate(CASES):
        Image.new("RGB", PICTURES[picture], "teal").save(folder / "images" / f"r{n}-00.png")
    pictures = read_pictures(folder)[0]
    for name, r in pictures.items():
        r.prompt = PROMPTS[CASES[int(name[1:-3])][1]]
    desk = Desk(pictures, ballots := Ballots(folder), seed=0)
    with Server(folder, desk, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.driver.get(server.url)
        while (image := desk.state()["image"]) is not None:
            browser.wait(LOADED, image["name"])
            for window in WINDOWS:
                browser.size(*window)
                check_label(browser.run(LABEL), (*CASES[int(image["name"][1:-3])], *window))
            browser.run("document.getElementById('yes').click()")
            browser.wait("return document.getElementById('name').textContent !== arguments[0]", image["name"])
        server.shutdown()
    ballots.close()
    assert [entry for entry in browser.driver.get_log("browser") if "favicon" not in entry["message"]] == []


def check_label(found: dict[str, Any], case: tuple[str, str, int, int]) -> None:
    """Whether the picture is whole and as large as is fair, and nothing lies on another thing or out of sight."""
    _, _, width, height = case
    painted, others = found["painted"], found["others"]
    assert found["hidden"] == [], (case, "the picture is covered")
    assert found["page"] == [width, height], (case, "the page scrolls")
    assert found["cut"] == [], (case, "a button's word is cut")
    for name, (left, top, right, bottom) in {"picture": painted, **others}.items():
        assert left >= -0.5 and top >= -0.5 and right <= width + 0.5 and bottom <= height + 0.5, (case, name, found)
    for one, two in itertools.combinations({**others, "picture": painted, "header": found["header"]}.items(), 2):
        assert apart(one[1], two[1]), (case, one, two)
    enough = 0.45 * min(width, height)
    assert max(painted[2] - painted[0], painted[3] - painted[1]) >= enough, (case, painted)
    assert others["prompt"][3] - others["prompt"][1] >= 20, (case, "no line of the prompt is in sight")


COMPARE = """
const box = (node) => { const r = node.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const shown = (rows) => [...rows].filter((row) => row.checkVisibility()).map((row) => row.cells[0].textContent);
return { pair: box(document.querySelector(".card .two")), verdict: box(document.getElementById("verdict")),
  usual: shown(document.querySelectorAll("#about tbody tr")),
  folded: shown(document.querySelectorAll("#others tbody tr")),
  table: box(document.getElementById("about")), width: document.documentElement.scrollWidth };
"""
BROUGHT = """
const halves = [...document.querySelectorAll(".card:first-child img")];
return halves.length === 2 && halves.every((img) => img.complete && img.naturalWidth > 0);
"""


def scored(n: int, k: int) -> dict[str, Any]:
    usual = {"aesthetic": 5.0 + n, "clip": 0.1 * k, "clip_margin": 0.1, "clip_z": 2.0, "sharpness": 9.0}
    return {**usual, "p": {f"label {i} of a sort": 0.01 for i in range(24)} | ({"a cat": 0.5} if n < 3 else {})}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("50% #1 ?")
    a, b = (judged_run(folder / name, scored, rows=10, images=2) for name in "ab")
    return Path(compare_runs(a, b)["page"]).as_uri()


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_compare_begins_with_pictures(browser: Browser, comparison: str, window: tuple[int, int]) -> None:
    browser.size(*window)
    browser.driver.get(comparison)
    browser.wait(BROUGHT)
    found = browser.run(COMPARE)
    assert found["usual"] == ["aesthetic", "clip", "clip_margin", "clip_z"] and found["folded"] == []
    assert found["verdict"][3] <= found["table"][1] < found["table"][3] <= found["pair"][1], found
    assert found["pair"][1] < window[1] - 30, (found, "the first pair begins on the first screen")
    if window[1] >= 800:
        assert found["pair"][3] <= window[1], (found, "the first pair is whole on the first screen")
    assert found["width"] <= window[0], "the page scrolls to the side"


def test_compare_folds_labels_and_says_which_rows_have_them(browser: Browser, comparison: str) -> None:
    browser.size(1200, 900)
    browser.driver.get(comparison)
    browser.run("document.querySelector('#rest summary').click()")
    folded = browser.run(COMPARE)["folded"]
    assert folded[:2] == ["sharpness", "p['label 0 of a sort']"], "most rows first"
    assert len(folded) == 26 and folded[-1] == "p['a cat'] (in 3 of 10 rows)"
    assert browser.run("return document.querySelector('#rest summary').textContent") == "26 more scores"
    browser.run("document.querySelector('#others tbody tr:last-child').click()")
    assert browser.run(COMPARE)["folded"] == folded, "stays open when one of its scores is chosen"
    said = "return document.getElementById('verdict').textContent"
    assert browser.run(said).startswith("No clear winner by p['a cat'] (in 3 of 10 rows): B wins 50.0% of 6 pairs")
    assert browser.run("return document.querySelector('tr.chosen').cells[0].textContent") == folded[-1]
    loaded = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith("file:") for name in loaded)
    assert browser.driver.get_log("browser") == [], "nothing against the page's policy"


def test_compare_says_that_it_shows_a_part(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (judged_run(tmp_path / x, lambda n, k, x=x: {"clip": (n + k) / 9 * (x == "b")}) for x in "ab")  # type: ignore[misc]
    monkeypatch.setattr("genkit.studies.compare.PAGE_BYTES", 2000)
    found = compare_runs(a, b)
    browser.driver.get(Path(found["page"]).as_uri())
    said = browser.run("return document.getElementById('part').innerText")
    assert said.startswith(f"Here are {found['shown']} of 20 pairs: those furthest apart") and "compare.jsonl" in said
    assert browser.run("return document.querySelectorAll('#grid .card').length") == found["shown"] < 20
