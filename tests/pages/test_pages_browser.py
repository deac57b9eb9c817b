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

from genkit.pages.label import PictureDesk
from genkit.pages.server import Server
from genkit.pages.sides import RowDesk
from genkit.selection.ballots import held
from genkit.selection.calibrate import read_pictures
from genkit.selection.votes import COLUMNS, VOTES, read_votes
from genkit.studies.compare import compare_runs
from genkit.studies.pairs import pair_runs
from genkit.studies.prefer import PairDesk
from genkit.studies.preferences import COLUMNS as PAIR_COLUMNS
from genkit.studies.preferences import PREFERENCES, choices_of
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
    with held(folder / VOTES, COLUMNS) as ballots:
        desk = PictureDesk(folder, pictures, ballots)
        with Server(desk, 0) as server:
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


SIDES = """
const box = (node) => { const r = node.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const tiles = [...document.querySelectorAll(".tile")].map((tile) => {
  const img = tile.firstChild, [left, top, right, bottom] = box(img);
  const middle = [(left + right) / 2, (top + bottom) / 2];
  const at = [[right - 2, top + 2], [left + 2, bottom - 2], [right - 2, bottom - 2], middle];
  return { box: [left, top, right, bottom], name: img.alt, natural: [img.naturalWidth, img.naturalHeight],
    covered: at.some(([x, y]) => document.elementFromPoint(x, y)?.closest(".tile") !== tile) };
});
const others = {};
for (const node of document.querySelectorAll("header, #prompt, footer button:not([hidden])")) {
  others[node.id || "header"] = box(node);
}
const cut = [...document.querySelectorAll("footer button")].filter((b) => b.scrollWidth > b.clientWidth);
return { tiles, others, cut: cut.map((b) => b.id),
  page: [document.documentElement.scrollWidth, document.documentElement.scrollHeight] };
"""
PRESS = """
const [key, code, shiftKey] = arguments;
document.dispatchEvent(new KeyboardEvent("keydown", { key, code, shiftKey, bubbles: true }));
"""
ROW = "return !busy && document.getElementById('name').textContent === arguments[0];"


@pytest.fixture
def sides(browser: Browser, tmp_path: Path) -> Iterator[tuple[Browser, Path, RowDesk]]:
    """Rows of 4 squares, 9 wide, 2 tall and 11 large pictures."""
    folder = judged_run(tmp_path / "run", lambda n, k: {"clip": 0.5}, rows=4, images=11, prompt=PROMPTS["long"])
    pictures = read_pictures(folder)[0]
    for n, (kind, count) in enumerate((("square", 4), ("wide", 9), ("tall", 2), ("large", 11))):
        for k in range(11):
            if k < count:
                Image.new("RGB", PICTURES[kind], "teal").save(folder / "images" / f"r{n}-{k:02d}.png")
            else:
                del pictures[f"r{n}-{k:02d}"]
    pictures["r0-00"].prompt = PROMPTS["short"]
    with held(folder / VOTES, COLUMNS) as ballots:
        desk = RowDesk(folder, pictures, ballots)
        with Server(desk, 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser.driver.get(server.url)
            browser.wait(ROW, "r0")
            yield browser, folder, desk
            server.shutdown()
    assert [entry for entry in browser.driver.get_log("browser") if "favicon" not in entry["message"]] == []


def test_the_pictures_of_a_row_are_whole_side_by_side(sides: tuple[Browser, Path, RowDesk]) -> None:
    browser, _, _ = sides
    for name, count, natural in (("r0", 4, 128), ("r1", 9, 512), ("r2", 2, 128), ("r3 · 1–9 of 11", 9, 1536)):
        browser.wait(ROW, name)
        for width, height in WINDOWS:
            browser.size(width, height)
            found, case = browser.run(SIDES), (name, width, height)
            boxes = [tile["box"] for tile in found["tiles"]]
            assert len(boxes) == count and found["tiles"][0]["natural"][0] == natural, case
            assert not any(tile["covered"] for tile in found["tiles"]), (case, found)
            assert found["page"] == [width, height] and found["cut"] == [], (case, found)
            for left, top, right, bottom in [*boxes, *found["others"].values()]:
                assert left >= -0.5 and top >= -0.5 and right <= width + 0.5 and bottom <= height + 0.5, (case, found)
            for one, two in itertools.combinations([*boxes, *found["others"].values()], 2):
                assert apart(one, two), (case, found)
            for tile in found["tiles"]:
                (left, top, right, bottom), (w, h) = tile["box"], tile["natural"]
                assert (right - left) / (bottom - top) == pytest.approx(w / h, rel=0.1), (case, "no margin is wasted")
                assert max(right - left, bottom - top) >= 0.16 * min(width, height), (case, tile)
        browser.run(PRESS, "Enter", "Enter", False)


def test_a_row_is_judged_by_keys(sides: tuple[Browser, Path, RowDesk]) -> None:
    browser, folder, desk = sides
    browser.size(1200, 900)

    def press(key: str, shown: str, code: str = "", shift: bool = False) -> None:
        browser.run(PRESS, key, code, shift)
        browser.wait(ROW, shown)

    def marked() -> list[str]:
        return browser.run("return [...document.querySelectorAll('[aria-pressed=true] img')].map((img) => img.alt);")

    press("2", "r0", "Digit2")
    press("3", "r0", "Numpad3")
    press("7", "r0", "Digit7")  # there is none
    press("3", "r0", "Digit3")
    browser.run("document.querySelectorAll('.tile')[3].click()")
    assert marked() == ["r0-01", "r0-03"]
    press("!", "r0", "Digit1", shift=True)
    assert browser.run("return document.getElementById('view').open") and marked() == ["r0-01", "r0-03"]
    press("Enter", "r0")
    press("Enter", "r1")
    press("u", "r0")
    assert marked() == ["r0-01", "r0-03"]
    press("Enter", "r1")
    press(" ", "r2")
    press("Enter", "r3 · 1–9 of 11")
    press("n", "r3 · 10–11 of 11")
    press("2", "r3 · 10–11 of 11", "Digit2")
    press("p", "r3 · 1–9 of 11")
    press("ArrowRight", "r3 · 10–11 of 11")
    assert marked() == ["r3-10"]
    press("Enter", "r1")
    assert desk.state()["left"] == 1
    votes = [(vote.image[7:-4], vote.good) for vote in read_votes(folder / VOTES) if vote.image.startswith("images/r3")]
    assert votes == [(f"r3-{k:02d}", k == 10) for k in range(11)]


def test_no_picture_is_called_bad_unseen_and_none_flashes(sides: tuple[Browser, Path, RowDesk]) -> None:
    browser, _, desk = sides
    browser.run(
        "window.bare = 0; new MutationObserver(() => { const images = [...document.querySelectorAll('.tile img')];"
        " if (!images.length || !images.every((img) => img.complete && img.naturalWidth)) bare++; })"
        ".observe(document.getElementById('grid'), { childList: true });"
    )
    for name in ("r1", "r2", "r3 · 1–9 of 11", "r3 · 10–11 of 11"):
        browser.run("document.getElementById('next').click()")
        browser.wait(ROW, name)
    assert desk.state()["done"] == 3 and browser.run("return bare") == 0
    browser.run("document.getElementById('next').click()")
    browser.wait("return !document.getElementById('over').hidden")
    assert desk.state()["left"] == 0


def test_a_pair_is_judged_by_keys_and_by_clicks(browser: Browser, tmp_path: Path) -> None:
    paired = pair_runs(*(judged_run(tmp_path / name, lambda n, k: {}, rows=5, images=1) for name in "ab"))
    shapes = ["square", "tall", "wide", "large", "square"]
    for n, shape in enumerate(shapes):
        for letter, colour in (("a", "teal"), ("b", "plum")):
            Image.new("RGB", PICTURES[shape], colour).save(tmp_path / letter / "images" / f"r{n}-00.png")
    with held(tmp_path / "a" / PREFERENCES, PAIR_COLUMNS) as ballots:
        desk = PairDesk(paired, paired.pairs, {}, ballots, 0)
        with Server(desk, 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser.driver.get(server.url)
            for n, key in enumerate(("ArrowLeft", "ArrowRight", "=", "ArrowDown")):
                browser.wait(ROW, f"r{n}-00")
                for width, height in WINDOWS:
                    browser.size(width, height)
                    browser.wait("return document.querySelector('.tile').getBoundingClientRect().right <= innerWidth")
                    found, case = browser.run(SIDES), (n, width, height)
                    boxes = [tile["box"] for tile in found["tiles"]]
                    assert len(boxes) == 2 and found["page"] == [width, height] and not found["cut"], (case, found)
                    for left, top, right, bottom in [*boxes, *found["others"].values()]:
                        assert left >= -0.5 and top >= -0.5 and right <= width + 0.5, (case, found)
                        assert bottom <= height + 0.5, (case, found)
                    for one, two in itertools.combinations([*boxes, *found["others"].values()], 2):
                        assert apart(one, two), (case, found)
                    stacked = boxes[0][3] <= boxes[1][1]
                    said = browser.run("return document.getElementById('left').innerText")
                    assert ("Upper" if stacked else "Left") in said, (case, said)
                browser.run(PRESS, key, "", False)
            browser.wait(ROW, "r4-00")
            browser.run("document.querySelectorAll('.tile')[1].click()")
            browser.wait("return !document.getElementById('over').hidden")
            browser.run(PRESS, "u", "", False)
            browser.wait(ROW, "r4-00")
            server.shutdown()
        shown = [[desk.files[2 * n + k].parent.parent.name for k in range(2)] for n in range(5)]
    found, _ = choices_of(paired)
    run = {"a": "run", "b": "other"}
    assert found == {"r0-00": run[shown[0][0]], "r1-00": run[shown[1][1]], "r2-00": "tie", "r3-00": "tie"}
    assert [entry for entry in browser.driver.get_log("browser") if "favicon" not in entry["message"]] == []


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
