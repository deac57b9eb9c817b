"""The images API of OpenAI with OpenAI's own package, against a real server on loopback."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from genkit.errors import InputError
from genkit.rows.request import Request
from genkit.sampling.stream import Stream
from genkit.serve.line import Line
from genkit.serve.openaifields import of_form

if TYPE_CHECKING:
    from conftest import Served

PROMPT = "a red apple"


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def pixels(b64: str | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64 or ""))).convert("RGB")).astype(int)


def drawn(served: Served, **fields: Any) -> list[np.ndarray]:
    """Return what the generator itself draws of a row."""
    assert served.engine.generator is not None
    results = sorted(served.engine.generator.stream([Request(**fields)], slots=8), key=lambda r: r.index)
    return [r.pixels.astype(int) for r in results]


def test_a_served_picture_is_that_of_the_generator(served: Served) -> None:
    more = {"seed": 3, "steps": 2, "guidance_scale": 4.0, "scheduler": "dpmpp_2m"}
    got = client(served).images.generate(prompt=PROMPT, n=2, model="gpt-image-1", extra_body=more)
    own = drawn(
        served, prompt=PROMPT, seed=3, num_images=2, num_inference_steps=2, guidance_scale=4.0, scheduler="dpmpp_2m"
    )
    assert got.data is not None and [d.seed for d in got.data] == [3, 4]  # type: ignore[attr-defined]
    for one, other in zip(got.data, own, strict=True):
        assert np.abs(pixels(one.b64_json) - other).max() <= 1
    assert (got.output_format, got.size) == ("png", "128x128")


def test_requests_with_other_settings_share_the_batch(served: Served) -> None:
    asked: list[dict[str, Any]] = [
        {"seed": 1, "steps": 4, "guidance_scale": 1.0, "width": 64, "height": 64},
        {"seed": 2, "steps": 2, "guidance_scale": 6.0, "scheduler": "unipc", "width": 64, "height": 64},
        {"seed": 3, "steps": 3, "scheduler": "euler_ancestral", "negative_prompt": "blue", "width": 64, "height": 64},
        {"seed": 4, "steps": 2, "width": 64, "height": 96},
    ]
    found: dict[int, Any] = {}

    def one(number: int) -> None:
        found[number] = client(served).images.generate(prompt=PROMPT, extra_body=asked[number]).data

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, fields in enumerate(asked):
        row = {**fields, "num_inference_steps": fields["steps"], "prompt": PROMPT}
        del row["steps"]
        assert np.abs(pixels(found[number][0].b64_json) - drawn(served, **row)[0]).max() <= 1, fields


def test_a_streamed_picture_comes_with_unfinished_ones(served: Served) -> None:
    events: list[Any] = list(
        client(served).images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"steps": 6, "seed": 1})
    )
    assert [e.type.split(".")[1] for e in events] == ["partial_image", "partial_image", "completed"]
    assert [e.partial_image_index for e in events[:2]] == [0, 1]
    first, second, last = (pixels(e.b64_json) for e in events)
    assert first.shape == last.shape == (128, 128, 3)
    assert np.abs(second - last).mean() < np.abs(first - last).mean() + 5 < 80  # it comes closer, roughly in colour


def test_an_edit_draws_what_is_transparent_in_the_mask(served: Served) -> None:
    rng = np.random.default_rng(0)
    start = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((128, 128))
    alpha = np.full((128, 128), 255, np.uint8)
    alpha[:, 64:] = 0
    mask = Image.merge("RGBA", (*start.split(), Image.fromarray(alpha)))
    got = client(served).images.edit(
        image=("i.png", png(start)), mask=("m.png", png(mask)), prompt=PROMPT, output_format="webp",
        extra_body={"steps": "3", "seed": "5"},
    )  # fmt: skip
    assert got.data is not None
    picture = np.abs(pixels(got.data[0].b64_json) - np.asarray(start).astype(int)).mean(axis=2)
    assert picture[:, 80:].mean() > 2 * picture[:, :48].mean()
    whole = client(served).images.edit(image=("i.png", png(start)), prompt=PROMPT, extra_body={"steps": 2})
    assert whole.size == "128x128"


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_urls_models_and_formats(served: Served) -> None:
    ours = client(served)
    assert [m.id for m in ours.models.list()] == ["emoji"]
    assert ours.models.retrieve("dall-e-3").id == "dall-e-3"
    got = ours.images.generate(
        prompt=PROMPT, model="dall-e-2", output_format="jpeg", output_compression=80, extra_body={"steps": 1}
    )
    assert got.data is not None and got.data[0].url is not None
    answer = httpx.get(got.data[0].url, timeout=60)
    assert answer.headers["content-type"] == "image/jpeg" and answer.content[:2] == b"\xff\xd8"
    assert httpx.get(got.data[0].url + "x", timeout=60).status_code == 404
    with pytest.raises(openai.NotFoundError) as caught:
        ours.images.generate(prompt=PROMPT, model="gpt-9")
    assert caught.value.code == "model_not_found"


def test_the_snippets_of_the_guide_run(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        for written, cheaper in (("http://127.0.0.1:7860", served.url), ('"steps": 12', '"steps": 2')):
            code = code.replace(written, cheaper)
        exec(code, names)
    lines = capsys.readouterr().out.split()
    assert lines == ["7", *["image_generation.partial_image"] * 3, "image_generation.completed"]
    assert Image.open("apple.png").size == (128, 128)


def test_a_gate_says_which_pictures_are_returned(served: Served) -> None:
    ours = client(served)
    got = ours.images.generate(prompt=PROMPT, n=3, size="64x64", extra_body={"steps": 2, "seed": 1, "keep": 1})
    assert got.data is not None and len(got.data) == 1 and "clip" in got.data[0].scores  # type: ignore[attr-defined]
    more = {"steps": 1, "guidance_scale": 1.0, "negative_prompt": "blue", "width": 64, "height": 64}
    noted = ours.images.generate(prompt="apple " * 99, extra_body=more)
    assert [note.split(":")[0] for note in noted.notes] == ["negative_prompt", "prompt"]  # type: ignore[attr-defined]
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        ours.images.generate(prompt=PROMPT, size="64x64", extra_body={"steps": 1, "gate": "clip > 0.99"})
    assert caught.value.code == "none_passed"


def test_a_caller_who_leaves_frees_the_slots(served: Served) -> None:
    before = served.settled()
    body = json.dumps({"prompt": PROMPT, "n": 8, "steps": 60, "size": "128x128"})
    caller = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60)
    caller.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    served.wait(lambda: served.engine.snapshot()["slots_used"] > 0)
    caller.close()
    after = served.settled()
    assert after["images"] < before["images"] + 8 and after["slots_used"] == 0
    assert after["failures"]["cancelled"] > before["failures"].get("cancelled", 0)


def test_a_full_queue_says_when_to_come_back(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "most_cost", 0.01)
    many = Request(prompt=PROMPT, num_inference_steps=60, num_images=1000)
    ticket = served.engine.submit(served.engine.plan([many]).rows, "other")
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            client(served).images.generate(prompt=PROMPT, extra_body={"steps": 1})
    finally:
        ticket.cancel()
    assert caught.value.code == "rate_limit_exceeded" and int(caught.value.response.headers["retry-after"]) >= 1
    served.settled()


def test_an_error_of_the_engine_ends_what_is_there_and_no_more(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(served.engine.generator, "begin", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            client(served).images.generate(prompt=PROMPT, extra_body={"steps": 1})
    got = client(served).images.generate(prompt=PROMPT, extra_body={"steps": 1})
    assert got.data and got.data[0].b64_json


def test_an_image_without_numbers_is_drawn_again_while_others_come(served: Served) -> None:
    """Retries in float32 wait for nothing but what is in flight: here as half precision would have them."""
    queue = Line(lambda row: 1.0, lambda latent: latent)
    assert served.engine.generator is not None
    stream = Stream(served.engine.generator, queue, None, 0)
    queue.submit([Request(prompt=PROMPT)], "a")
    stream.retries.append((Request(id="x", prompt=PROMPT), 0, 1))
    assert stream._draw() is None
    stream.retries.clear()
    assert stream._draw() is not None


def test_numbers_of_forms_are_those_of_prompt_files() -> None:
    form = {"n": "2.0", "partial_images": " 1 ", "output_compression": "", "seed": "7.0", "steps": "3"}
    assert of_form(form) == {"n": 2, "partial_images": 1, "output_compression": None, "seed": 7, "steps": 3}
    for text in ("2.5", "two", "1e3", "²", "9" * 5000):
        with pytest.raises(InputError, match=r"^n: .{1,70} (is not a whole number|was shortened by a spreadsheet)"):
            of_form({"n": text})
