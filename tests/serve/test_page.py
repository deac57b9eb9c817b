"""The page's own routes: desks, their events and pictures, settings of a file, and what they refuse."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from genkit.components.info import weight_hashes
from genkit.pages.look import look
from genkit.rows.request import Request
from genkit.serve import desks
from genkit.serve.limits import Refused

if TYPE_CHECKING:
    from conftest import Served


class Desk:
    """A page without a browser: its stream of events, read in a thread."""

    def __init__(self, served: Served, desk: str = "") -> None:
        self.served, self.events, self.came = served, [], threading.Condition()
        self.http = httpx.Client(base_url=served.url, timeout=120)
        self.thread = threading.Thread(target=self._read, args=(desk,), daemon=True)
        self.open = True
        self.thread.start()
        self.id = self.wait("hello")["desk"]

    events: list[dict[str, Any]]

    def _read(self, desk: str) -> None:
        with (
            contextlib.suppress(httpx.HTTPError),
            self.http.stream("GET", "/app/events", params={"desk": desk}) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    with self.came:
                        self.events.append(json.loads(line[6:]))
                        self.came.notify_all()
                if not self.open:
                    return

    def wait(self, kind: str, seconds: float = 120.0, **about: Any) -> dict[str, Any]:
        """Return the first event of a kind; of "job", with the state that is asked for."""

        def found() -> dict[str, Any] | None:
            fits = (e for e in self.events if e["type"] == kind)
            return next((e for e in fits if (e["job"] if kind == "job" else e).items() >= about.items()), None)

        with self.came:
            assert self.came.wait_for(found, seconds), (kind, self.events)
            return found() or {}

    def post(self, what: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/app/{what}", json={"desk": self.id, **body})

    def draw(self, **fields: Any) -> str:
        answer = self.post("draw", fields={"prompt": "a red apple", "num_inference_steps": 2, **fields})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job"])

    def picture(self, job: str, name: Any) -> httpx.Response:
        return self.http.get(f"/app/pictures/{self.id}/{job}/{name}.png")


@pytest.fixture
def desk(served: Served) -> Iterator[Desk]:
    found = Desk(served)
    yield found
    found.open = False


def test_a_job_grows_and_its_picture_gives_its_settings_back(served: Served, desk: Desk) -> None:
    job = desk.draw(num_inference_steps=3, num_images=2, negative_prompt="blue", scheduler="euler", seed=5, keep=2)
    told = desk.wait("job", state="done")["job"]
    assert {e["type"] for e in desk.events} >= {"preview", "step", "picture"}
    assert next(e for e in desk.events if e["type"] == "preview")["image"].startswith("data:image/png;base64,")
    assert [p["seed"] for p in told["pictures"]] == [5, 6] and "clip" in told["pictures"][0]["scores"]
    assert told["settings"]["num_inference_steps"] == 3 and told["fields"]["negative_prompt"] == "blue"
    data = desk.picture(job, 1).content
    picture = Image.open(io.BytesIO(data))
    assert picture.size == (128, 128)
    weights = json.loads(picture.text["genkit"])["weights"]  # type: ignore[attr-defined]
    assert weights == weight_hashes(served.engine.models.info)
    found = desk.http.post("/app/settings", content=data).json()
    same = {"prompt": "a red apple", "negative_prompt": "blue", "seed": 6, "num_inference_steps": 3}
    assert found["fields"].items() >= (same | {"scheduler": "euler"}).items() and found["notes"] == []
    again = desk.draw(**found["fields"])
    desk.wait("job", id=again, state="done")
    one, other = (np.asarray(Image.open(io.BytesIO(desk.picture(*which).content))) for which in ((job, 1), (again, 0)))
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_a_reload_finds_everything_again(served: Served, desk: Desk) -> None:
    job = desk.draw()
    desk.wait("job", state="done")
    desk.post("keep", job=job, index=0, kept=True)
    later = Desk(served, desk.id)
    later.open = False
    assert later.id == desk.id
    told = later.wait("hello")["jobs"][0]
    assert told["pictures"][0]["kept"] is True and told["state"] == "done"
    with zipfile.ZipFile(io.BytesIO(desk.http.get(f"/app/kept/{desk.id}.zip").content)) as archive:
        assert archive.namelist() == ["0001-00.png"] and archive.read("0001-00.png") == desk.picture(job, 0).content
    assert desk.post("forget", job=job).status_code == 200
    assert desk.wait("forgotten")["job"] == job and desk.picture(job, 0).status_code == 404


def test_what_has_no_say_is_noted(desk: Desk) -> None:
    fields = {"prompt": "x", "negative_prompt": "blue", "guidance_scale": 1.0, "num_inference_steps": 1}
    assert any("negative_prompt: has no effect" in note for note in desk.post("draw", fields=fields).json()["notes"])


def test_a_picture_that_is_varied_is_held_with_its_mask(served: Served, desk: Desk) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128), "teal").save(buffer, "png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    job = desk.draw(image=url, mask_image=url, strength=0.5)
    told = desk.wait("job", state="done")["job"]
    assert told["inputs"] == ["image", "mask_image"] and "image" not in told["fields"]
    assert Image.open(io.BytesIO(desk.picture(job, "image").content)).getpixel((0, 0)) == (0, 128, 128)


def test_cancelled_and_left_jobs_free_their_slots(served: Served, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job = desk.draw(num_inference_steps=60, num_images=8)
    desk.wait("step")
    desk.post("cancel", job=job)
    assert desk.wait("job", state="cancelled")["job"]["count"] == 8
    assert served.settled()["slots_used"] == 0
    monkeypatch.setattr(desks, "GRACE", 0.2)
    left = Desk(served)
    left.draw(num_inference_steps=60, num_images=8)
    left.wait("step")
    left.open = False  # the stream ends at its next event, as when a page is closed
    served.settled()


@pytest.mark.parametrize(
    ("what", "body", "status", "field"),
    [
        ("draw", {"fields": {"prompt": "x", "num_inference_steps": 61}}, 400, "num_inference_steps"),
        ("draw", {"fields": {"prompt": "x", "scheduler": "tuned", "steps": 5}}, 400, "num_inference_steps"),
        ("draw", {"fields": {"prompt": "x", "image": "/etc/passwd"}}, 400, "image"),
        ("draw", {"fields": {"prompt": "x", "colour": "red"}}, 400, None),
        ("draw", {"fields": {"prompt": "x", "loras": [{"file": "/x.safetensors"}]}}, 400, "loras"),
        ("draw", {"fields": "x"}, 400, "fields"),
        ("draw", {"fields": {"prompt": "x", "model": ["emoji"]}}, 400, "model"),
        ("keep", {"job": "99"}, 404, "job"),
        ("cancel", {"job": "99", "more": 1}, 400, "more"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    desk: Desk, what: str, body: dict[str, Any], status: int, field: str | None
) -> None:
    answer = desk.post(what, **body)
    found = answer.json()
    assert answer.status_code == status and "\n" not in found["error"] and str(Path.cwd()) not in found["error"]
    assert field is None or found["field"] == field


def test_a_desk_belongs_to_who_opened_it(served: Served, desk: Desk) -> None:
    tray = desks.Desks(served.serving)
    own = tray.open("key 1", None)
    assert tray.open("key 1", own.id) is own and tray.open("key 2", own.id) is not own
    with pytest.raises(Refused, match="load it again"):
        tray.find("key 2", own.id)
    assert desk.http.get("/app/pictures/none/1/0.png").status_code == 404
    for name in ("../page.py", "..%2fpage.py", "%2e%2e/desks.py", "nothing.js"):
        assert desk.http.get(f"/app/static/{name}").status_code == 404
    evil = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert desk.http.post("/app/draw", json={"desk": desk.id, "fields": {}}, headers=evil).status_code == 403
    assert desk.http.get("/app/events", headers=evil).status_code == 403


def test_memory_is_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    tray = desks.Desks(served.serving)
    own, other = tray.open("key 1", None), tray.open("key 2", None)
    for desk, number, kept, state in ((own, "1", True, "done"), (own, "2", None, "done"), (other, "1", None, "done"),
                                      (other, "2", None, "drawing")):  # fmt: skip
        pictures = {0: desks.Picture({"index": 0}, b"x" * 100, kept)}
        desk.jobs[number] = desks.Work(number, {}, Request(num_images=2), served.serving, state, pictures=pictures)
    jobs = own.jobs["2"], other.jobs["1"]
    jobs[0].made, jobs[1].made = jobs[1].made, jobs[0].made  # of all pages the oldest goes first
    for most, left in ((400, "12 12"), (399, "12 2"), (250, "1 2"), (1, "1 2")):  # one that is over stays
        monkeypatch.setattr(desks, "BYTES", most)
        tray._make_room()
        assert " ".join("".join(desk.jobs) for desk in (own, other)) == left, most


def test_settings_of_other_tools_and_of_none(desk: Desk) -> None:
    info, buffer = PngInfo(), io.BytesIO()
    said = (
        "a (red:1.2) fox <lora:style:0.7>\nNegative prompt: blue\nSteps: 12, Sampler: Euler a, CFG scale: 6, Seed: 9, "
    )
    info.add_text("parameters", said + "Size: 128x64, Model: other")
    Image.new("RGB", (8, 8)).save(buffer, "png", pnginfo=info)
    found = desk.http.post("/app/settings", content=buffer.getvalue()).json()
    expected = {"prompt": "a (red:1.2) fox", "syntax": "a1111", "seed": 9, "width": 128, "scheduler": "euler_ancestral"}
    assert found["fields"].items() >= expected.items() and found["model"] == "other"
    assert any("style" in note for note in found["notes"])
    for content in (b"", b"x" * 100, buffer.getvalue()[:60]):
        answer = desk.http.post("/app/settings", content=content)
        assert answer.status_code == 400 and "/tmp" not in answer.text, answer.text


def test_the_page_loads_nothing_of_others(served: Served) -> None:
    answer = httpx.get(served.url, timeout=60)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    names = re.findall(r'(?:href|src)="(/[^"]+)"', answer.text)
    texts = [answer.text] + [httpx.get(served.url + name, timeout=60).raise_for_status().text for name in names]
    parts = re.findall(r'from "\./(\w+\.js)"', texts[-1] + answer.text)
    texts += [httpx.get(f"{served.url}/app/static/{name}", timeout=60).raise_for_status().text for name in parts]
    whole = "\n".join(texts).replace("http://www.w3.org/2000/svg", "")
    assert len(texts) > 7 and not re.search(r"https?://|innerHTML|insertAdjacent|document\.write|eval\(", whole)
    assert not re.search(r"<[^>]+ (style|on\w+)=", answer.text)  # which the policy forbids


def test_colours_of_text_have_contrast() -> None:
    def light(colour: str) -> float:
        full = "".join(c * 2 for c in colour[1:]) if len(colour) == 4 else colour[1:]
        parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in look().split("@media")[:2]:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6});", scheme))
        pairs = [
            (text, under) for text in ("ink", "soft", "good", "bad", "warn", "accent") for under in ("page", "card")
        ]
        for text, under in [
            *pairs,
            ("soft", "well"),
            ("ink", "well"),
            ("good", "well"),
            ("bad", "well"),
            ("on", "accent"),
        ]:
            high, low = sorted((light(colours[text]), light(colours[under])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, under, colours[text], colours[under])


def test_a_job_tells_no_path_of_its_controlnet(served: Served) -> None:
    control = {"file": "/secret/nets/canny", "image": Image.new("RGB", (8, 8))}
    row = Request(prompt="a fox", controls=[control])
    told = desks.Work("1", {"control": "canny"}, row, served.serving).told()
    assert told["inputs"] == ["control_image"] and "secret" not in json.dumps(told)
    assert desks.input_of(row, "control_image").size == (8, 8) and desks.input_of(row, "image") is None
