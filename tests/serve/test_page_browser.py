"""The page in Chromium, as people use it: with a mouse, with keys alone, on a phone."""

from __future__ import annotations

import base64
import io
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from genkit.options import Options
from tests.serve.conftest import Served, serve
from tests.tiny import tiny_controlnet, tiny_stable_diffusion

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
api.expect.set_options(timeout=60_000)  # milliseconds
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
HOSTILE = "<script>document.title='owned'</script>\"'`><img src=x onerror=document.title=1> \u202egnp.exe مرحبا"
DROP = """async ({data}) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "picture.png", {type: "image/png"}));
  for (const type of ["dragover", "drop"]) {
    const event = new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true});
    document.body.dispatchEvent(event);
  }
}"""


UNNAMED = """[...document.querySelectorAll("button, input, select, textarea, a, img, dialog, canvas")]
  .filter((node) => node.checkVisibility() && !node.ariaLabel && !node.textContent.trim() && !node.labels?.length)
  .filter((node) => !node.hasAttribute("alt") && !node.hasAttribute("aria-labelledby"))
  .map((node) => node.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, served: Served) -> Iterator[Any]:
    """A loaded page. After the test there must have been no error in its console."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    found = context.new_page()
    errors: list[str] = []
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.on("console", lambda m: errors.append(m.text) if m.type == "error" and "400" not in m.text else None)
    load(found, served.url)
    yield found
    context.close()
    assert errors == []


def load(page: Any, url: str) -> None:
    page.goto(url)
    api.expect(page.locator("body[data-ready]")).to_have_count(1)


def ask(page: Any, prompt: str = "a red apple", steps: int = 2, images: int = 2, **others: Any) -> None:
    fields = {"prompt": prompt, "num_inference_steps": steps, "num_images": images, **others}
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.click("#draw")


def drawn(page: Any, count: int, where: str = "") -> Any:
    """Return the cards of pictures once there are so many, within an element."""
    cards = page.locator(f"{where} .card[data-drawn]")
    api.expect(cards).to_have_count(count)
    return cards


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def fits(page: Any) -> None:
    """Assert that nothing makes the page scroll sideways."""
    wide, window = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= window
    cut = page.evaluate(
        "[...document.querySelectorAll('button')].filter((b) => b.checkVisibility())"
        ".filter((b) => b.scrollWidth > b.clientWidth + 1).map((b) => b.textContent)"
    )
    assert cut == []


def test_draw_keep_and_more_on_a_desk_and_on_a_phone(page: Any) -> None:
    ask(page, HOSTILE, steps=6)
    api.expect(page.locator(".card.growing img[src^='data:image/png']").first).to_be_visible()
    cards = drawn(page, 2)
    assert page.title() == "emoji · genkit" and page.locator(".job script, .job .prompt img").count() == 0
    assert page.locator(".job .prompt").text_content() == HOSTILE
    assert "clip" in cards.first.locator(".under span").text_content()
    cards.first.locator(".open").focus()
    page.keyboard.press("k")
    api.expect(cards.first).to_have_class(re.compile("kept"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("x")
    api.expect(cards.nth(1)).to_have_class(re.compile("rejected"))
    api.expect(page.locator("#said")).to_have_text("Rejected")
    seeds = page.locator(".job .settings").text_content()
    page.keyboard.press("m")
    api.expect(page.locator(".job")).to_have_count(2)
    drawn(page, 2, ".job:first-child")
    first = int(re.search(r"seed (\d+)", seeds)[1])  # type: ignore[index]
    assert f"seed {(first + 2) % 2**32}" in page.locator(".job .settings").first.text_content()
    page.set_viewport_size({"width": 360, "height": 740})
    fits(page)
    page.locator("#tabs button", has_text="Kept").click()
    api.expect(page.locator(".card:visible")).to_have_count(1)
    page.locator(".card:visible .open").click()
    api.expect(page.locator("#view-prompt")).to_have_text(HOSTILE)
    fits(page)


@pytest.mark.slow
def test_errors_are_said_at_their_field(page: Any) -> None:
    ask(page, steps=99)
    api.expect(page.locator("#problem")).to_have_text(re.compile("num_inference_steps: 99 is more"))
    assert page.evaluate("document.activeElement.id") == "num_inference_steps"
    assert page.get_attribute("#num_inference_steps", "aria-invalid") == "true"
    page.fill("#num_inference_steps", "2")
    api.expect(page.locator("#problem")).to_be_hidden()
    page.fill("#width", "100")
    page.click("#draw")
    api.expect(page.locator("#problem")).to_have_text(re.compile("width"))


@pytest.mark.slow
def test_cancel_reload_and_remove(page: Any, served: Served) -> None:
    ask(page, steps=60, images=8)
    api.expect(page.locator(".card.growing").first).to_be_visible()
    page.locator(".job button", has_text="Cancel").click()
    api.expect(page.locator(".job .state")).to_have_text(re.compile(r"cancelled after \d of 8"))
    assert served.settled()["slots_used"] == 0
    ask(page, images=1)
    drawn(page, 1)
    page.locator(".card .yes").click()
    api.expect(page.locator(".card.kept")).to_have_count(1)
    page.reload()
    drawn(page, 1)
    api.expect(page.locator(".card.kept")).to_have_count(1)
    with page.expect_download() as download:
        page.click("#zip")
    assert download.value.suggested_filename == "kept.zip"
    remove = page.locator(".job:first-child .ends button")
    remove.click()
    api.expect(remove).to_have_text("Remove kept ones too?")
    remove.click()
    api.expect(page.locator(".job")).to_have_count(1)


@pytest.mark.slow
def test_a_dropped_picture_gives_its_settings_back(page: Any, served: Served) -> None:
    ask(page, "a blue fish", steps=3, images=2, seed=7, guidance_scale="4.5", negative_prompt="red")
    drawn(page, 2)
    data = httpx.get(served.url + page.locator(".card img").nth(1).get_attribute("src"), timeout=60).content
    page.click("#usual")
    page.fill("#prompt", "something else")
    page.evaluate(DROP, {"data": base64.b64encode(data).decode()})
    api.expect(page.locator("#prompt")).to_have_value("a blue fish")
    values = {"negative_prompt": "red", "seed": "8", "num_inference_steps": "3", "guidance_scale": "4.5"}
    for name, value in values.items():
        assert page.input_value(f"#{name}") == value
    page.fill("#num_images", "1")
    page.click("#draw")
    api.expect(page.locator(".job")).to_have_count(2)
    drawn(page, 1, ".job:first-child")
    again = httpx.get(served.url + page.locator(".job:first-child img").get_attribute("src"), timeout=60).content
    assert np.abs(pixels(again) - pixels(data)).max() <= 1
    page.evaluate(DROP, {"data": base64.b64encode(b"nothing").decode()})
    api.expect(page.locator("#problem")).not_to_be_empty()


@pytest.mark.slow
def test_what_is_painted_is_drawn_anew_and_the_rest_stays(page: Any, served: Served) -> None:
    ask(page, "a red apple", steps=8, images=1)
    drawn(page, 1).first.locator(".open").click()
    page.keyboard.press("p")
    api.expect(page.locator("#paint")).to_be_visible()
    box = page.locator("#canvas").bounding_box()
    for down in range(2, 9):  # the upper left
        page.mouse.move(box["x"] + box["width"] * 0.05, box["y"] + box["height"] * 0.05 * down)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.05 * down, steps=3)
        page.mouse.up()
    page.click("#paint-on")
    api.expect(page.locator("#stencil")).to_be_visible()
    assert page.input_value("#strength") == "1"
    page.fill("#prompt", "a green tree")
    page.fill("#num_images", "1")
    page.click("#draw")
    api.expect(page.locator(".job")).to_have_count(2)
    drawn(page, 1, ".job:first-child")
    urls = [page.locator(f".job:{which}-child img").get_attribute("src") for which in ("last", "first")]
    before, after = (pixels(httpx.get(served.url + url, timeout=60).content) for url in urls)
    change = np.abs(before - after).mean(axis=2)
    assert change[20:50, 10:50].mean() > 3 * max(1.0, change[80:, 80:].mean())


@pytest.mark.slow
def test_everything_by_keys_alone(page: Any) -> None:
    def tab_to(name: str, most: int = 40) -> None:
        for _ in range(most):
            if page.evaluate("document.activeElement.id") == name:
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{name} is not reached by Tab")

    tab_to("prompt")
    page.keyboard.type("a red apple")
    tab_to("num_images")
    page.keyboard.press("Control+a")
    page.keyboard.type("2")
    tab_to("num_inference_steps")
    page.keyboard.press("Control+a")
    page.keyboard.type("2")
    page.keyboard.press("Control+Enter")
    drawn(page, 2)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "open":
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "2px"
    page.keyboard.press("Enter")
    api.expect(page.locator("#view")).to_be_visible()
    page.keyboard.press("k")
    api.expect(page.locator("#view-keep")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("v")
    api.expect(page.locator(".job")).to_have_count(2)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.className") == "open"
    page.keyboard.press("p")
    api.expect(page.locator("#paint")).to_be_visible()
    for key in (" ", "Shift+ArrowLeft", "Shift+ArrowUp", "ArrowDown", " "):
        page.keyboard.press(key)
    tab_to("paint-on")
    page.keyboard.press("Enter")
    api.expect(page.locator("#stencil")).to_be_visible()
    drawn(page, 4)


@pytest.mark.slow
def test_what_is_heard_and_named(page: Any) -> None:
    ask(page, images=1)
    drawn(page, 1).first.locator(".open").click()
    unnamed = page.evaluate(UNNAMED)
    assert unnamed == []
    assert page.locator("[role=alert]").count() == 1 and page.get_attribute("html", "lang") == "en"
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", back)[0]) > 128) == (scheme == "light")


@pytest.mark.slow
def test_with_a_key_the_browser_asks_once(chromium: Any, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("k" * 32)
    file.chmod(0o600)
    running = serve(Options(device="cpu"), keys=["k" * 32])
    try:
        context = chromium.new_context(http_credentials={"username": "me", "password": "k" * 32})
        page = context.new_page()
        load(page, running.url)
        ask(page, images=1)
        drawn(page, 1)
        context.close()
        assert httpx.get(running.url, timeout=60).status_code == 401
    finally:
        running.close()
    assert not running.thread.is_alive() and threading.main_thread().is_alive()


@pytest.mark.slow
def test_runs_are_listed_as_the_server_has_them(chromium: Any, tmp_path: Path) -> None:
    running = serve(Options(device="cpu"), runs=tmp_path / "runs")
    lines = {"content-type": "application/x-ndjson"}

    def begin(name: str, text: str) -> str:
        answer = httpx.post(f"{running.url}/v1/runs", params={"name": name}, content=text, headers=lines, timeout=60)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    try:
        page = chromium.new_page(viewport={"width": 390, "height": 800})
        load(page, running.url)
        api.expect(page.locator("#runs")).to_be_hidden()
        small = begin("<img src=x onerror=document.title=1>.jsonl", '{"prompt": "a dog", "num_images": 2, "steps": 1}')
        runs = page.locator(".run")
        api.expect(runs).to_have_count(1)
        api.expect(runs.locator(".about")).to_contain_text("done · 2 pictures · 2 kept")
        assert runs.locator(".name").text_content() == "<img src=x onerror=document.title=1>.jsonl"
        assert page.title() == "emoji · genkit" and page.locator(".run img").count() == 0
        api.expect(runs.locator("button")).to_be_hidden()
        begin("large.jsonl", '{"prompt": "a cat", "num_images": 1000, "steps": 40}')
        api.expect(runs).to_have_count(2)
        api.expect(runs.first.locator(".about")).to_contain_text(" of 1000 pictures")
        api.expect(page.locator("#runs-live")).to_have_text("1 to draw")
        fits(page)
        assert page.evaluate(UNNAMED) == []
        other = chromium.new_page()  # which has seen nothing of it
        load(other, running.url)
        api.expect(other.locator(".run")).to_have_count(2)
        other.locator(".run button:visible").click()
        api.expect(runs.first.locator(".about")).to_contain_text("cancelled")
        api.expect(page.locator("#runs-live")).to_have_text("")
        with page.context.expect_page() as opened:
            runs.last.locator("a").click()
        api.expect(opened.value.locator("img").first).to_be_visible()
        assert f"/v1/runs/{small}/gallery" in opened.value.url
        other.close()
        page.close()
    finally:
        running.server.drain()
        running.thread.join(20)
        running.serving.runs.close()
        running.server.listener.close()


@pytest.fixture(scope="module")
def steering(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("steering")
    tiny_controlnet(root / "nets" / "canny", tiny_stable_diffusion(root / "model"))
    found = start(Options(model=str(root / "model"), clip="none", device="cpu", control_dir=str(root / "nets")))
    yield found
    found.close()


def test_a_picture_is_followed_by_a_controlnet(chromium: Any, steering: Served, tmp_path: Path) -> None:
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    asked: list[dict[str, Any]] = []
    page.on("request", lambda r: asked.append(r.post_data_json["fields"]) if r.url.endswith("/app/draw") else None)
    load(page, steering.url)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "lines.png")
    assert page.locator("#follow").is_hidden()
    page.fill("#seed", "5")
    ask(page, "a fox", images=1)
    drawn(page, 1, ".job:first-child")
    page.set_input_files("#follow-file", str(tmp_path / "lines.png"))
    api.expect(page.locator("#followed")).to_be_visible()
    assert page.evaluate(UNNAMED) == []
    page.fill("#control_weight", "0.9")
    ask(page, "a fox", images=1)
    api.expect(page.locator(".job")).to_have_count(2)
    drawn(page, 1, ".job:first-child")
    assert page.locator(".job:first-child .settings").text_content().endswith(" · follows a picture")
    plain, steered = asked
    picture = {"control": "canny", "control_weight": 0.9, "control_preprocess": "none"}
    assert "control" not in plain and picture.items() <= steered.items()
    assert np.array_equal(pixels(base64.b64decode(steered["control_image"].split(",")[1])), noise)
    page.locator(".job:first-child .open").first.focus()
    page.keyboard.press("m")  # more like this: with its picture
    api.expect(page.locator(".job")).to_have_count(3)
    drawn(page, 1, ".job:first-child")
    page.click("#unfollow")
    assert page.locator("#follow").is_hidden()
    page.locator(".job:first-child .open").first.focus()
    page.keyboard.press("s")
    api.expect(page.locator("#follow")).to_be_visible()
    assert page.input_value("#control_weight") == "0.9"
    page.set_viewport_size({"width": 360, "height": 740})
    fits(page)
    context.close()
    assert asked[2].items() >= picture.items() and asked[2]["control_image"].startswith("data:image/png")
    assert errors == []
