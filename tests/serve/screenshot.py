"""A picture of the page for docs/serving.md: python -m tests.serve.screenshot docs/serving-page.webp."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from genkit.options import Options
from tests.serve.conftest import serve

PROMPTS = ("a red apple", "a blue fish", "a yellow sun with a face")


def main(out: Path) -> None:
    """Draw with the embedded model, and write what Chromium shows as WebP."""
    running = serve(Options(device="cpu", batch_size=8))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light", reduced_motion="reduce")
        page.goto(running.url)
        expect(page.locator("body[data-ready]")).to_have_count(1)
        for number, prompt in enumerate(PROMPTS):
            last = number == len(PROMPTS) - 1
            values = {"prompt": prompt, "num_images": 4, "num_inference_steps": 40 if last else 12, "seed": 40 + number}
            for name, value in values.items():
                page.fill(f"#{name}", str(value))
            page.click("#draw")
            if last:
                expect(page.locator(".card.growing img")).to_have_count(4, timeout=60_000)
            else:
                expect(page.locator(".job:first-child .card[data-drawn]")).to_have_count(4, timeout=60_000)
        page.locator(".job").nth(1).locator(".yes").first.click()
        page.locator(".job").nth(1).locator(".no").last.click()
        expect(page.locator(".card.rejected")).to_have_count(1)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        browser.close()
    running.server.should_exit = True
    running.thread.join(20)
    running.engine.close()
    picture.save(out, "webp", quality=80, method=6)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
