"""ControlNets over HTTP: by name, with pictures that are sent; in rows, prompt files, and as AUTOMATIC1111 has them."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from genkit import Request, TextToImage
from genkit.components.collection import collection
from genkit.errors import InputError
from genkit.options import Options
from genkit.pictures.edges import PREPROCESS
from genkit.pictures.images import read_image
from genkit.serve.a1111control import control_of
from genkit.serve.choice import Choice
from genkit.serve.rows import Intake, Most
from genkit.serve.server import Listen, prepare
from tests.tiny import tiny_controlnet, tiny_sdxl, tiny_stable_diffusion

if TYPE_CHECKING:
    from conftest import Served

pytest.importorskip("cv2", reason="OpenCV is not installed")


def picture(side: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def sent(image: Image.Image, prefix: str = "data:image/png;base64,") -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return prefix + base64.b64encode(data.getvalue()).decode()


UNIT = {"model": "canny", "image": sent(picture(), "")}


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nets")
    tiny_controlnet(root / "controls" / "canny", tiny_stable_diffusion(root / "model"))
    tiny_controlnet(root / "controls" / "of-xl", tiny_sdxl(root / "xl"))
    return root


@pytest.fixture(scope="module")
def running(nets: Path, start: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = Options(
        model=str(nets / "model"), clip="none", device="cpu", batch_size=4, control_dir=str(nets / "controls")
    )
    found = start(options, runs=tmp_path_factory.mktemp("runs"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def expected(nets: Path) -> np.ndarray:
    """The picture of the row that the tests ask for."""
    control = {"file": str(nets / "controls" / "canny"), "image": picture(), "weight": 0.8, "preprocess": "canny"}
    row = Request(prompt="a fox", seed=7, num_inference_steps=4, guidance_scale=5.0, controls=[control])
    (result,) = TextToImage.from_pretrained(nets / "model", device="cpu").stream([row])
    return np.asarray(result.pixels).astype(int)


ROW: dict[str, Any] = {"prompt": "a fox", "seed": 7, "num_inference_steps": 4, "guidance_scale": 5.0}


def drawn(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(read_image(base64.b64decode(answer.json()["data"][0]["b64_json"]))).astype(int)


@pytest.mark.parametrize("fields", [
    {"controls": [{"name": "canny", "image": sent(picture()), "weight": 0.8, "preprocess": "canny"}]},
    {"control": "canny", "control_image": sent(picture()), "control_weight": 0.8, "control_preprocess": "canny"},
], ids=["list", "flat"])  # fmt: skip
def test_a_served_row_is_the_row_drawn_here(running: Served, expected: np.ndarray, fields: dict[str, Any]) -> None:
    answer = httpx.post(f"{running.url}/v1/images/generations", json={**ROW, **fields}, timeout=120)
    assert np.abs(drawn(answer) - expected).max() <= 1
    plain = httpx.post(f"{running.url}/v1/images/generations", json={**ROW, "control": "none"}, timeout=120)
    assert np.abs(drawn(plain) - expected).max() > 3


def test_automatic1111s_units(running: Served, expected: np.ndarray) -> None:
    unit = {
        "enabled": True, "module": "canny", "model": "canny [d14c016b]", "weight": 0.8, "image": sent(picture(), ""),
        "control_mode": "Balanced", "pixel_perfect": True, "processor_res": 512, "threshold_a": 100, "threshold_b": 200,
        "resize_mode": "Crop and Resize", "guidance_start": 0.0, "guidance_end": 1.0,
    }  # fmt: skip
    body = {"prompt": "a fox", "seed": 7, "steps": 4, "cfg_scale": 5, "sampler_name": "DDIM"}
    off = {"enabled": False, "module": "openpose"}
    for name in ("ControlNet", "controlnet"):
        scripts = {name: {"args": [unit, off]}}
        answer = httpx.post(
            f"{running.url}/sdapi/v1/txt2img", json={**body, "alwayson_scripts": scripts}, timeout=120
        ).json()  # fmt: skip
        data = base64.b64decode(answer["images"][0])
        assert np.abs(np.asarray(read_image(data)).astype(int) - expected).max() <= 1
        text = Image.open(io.BytesIO(data)).info["parameters"]
        assert 'ControlNet 0: "Module: canny, Model: canny, Weight: 0.8' in text
        assert sent(picture(), "") not in json.dumps(answer["parameters"])
    own = {**unit, "image": None, "module": "none"}
    answer = httpx.post(
        f"{running.url}/sdapi/v1/img2img",
        json={**body, "init_images": [sent(picture(), "")], "alwayson_scripts": {"ControlNet": {"args": [own]}}},
        timeout=120,
    )  # fmt: skip
    assert answer.status_code == 200, "without a picture it takes the initial one"


def test_what_its_clients_list(running: Served) -> None:
    def get(name: str) -> Any:
        return httpx.get(f"{running.url}/controlnet/{name}", timeout=60).json()

    assert get("version") == {"version": 2}
    assert get("model_list")["model_list"] == ["canny"], "the other one is of another kind of model"
    assert get("module_list")["module_list"][:2] == ["none", "canny"]
    body = {"controlnet_module": "canny", "controlnet_input_images": [sent(picture(), "")]}
    answer = httpx.post(f"{running.url}/controlnet/detect", json=body, timeout=60).json()
    made = np.asarray(read_image(base64.b64decode(answer["images"][0])))
    assert np.array_equal(made, np.asarray(PREPROCESS["canny"](picture())))
    for change, said in (
        ({"controlnet_module": "openpose"}, "openpose"), ({"controlnet_threshold_a": 50}, "canny has 100 here"),
        ({"controlnet_input_images": [sent(picture(200), "")]}, "pixels of this server"),
        ({"controlnet_input_images": ["/etc/passwd"]}, "is no base64"),
    ):  # fmt: skip
        wrong = httpx.post(f"{running.url}/controlnet/detect", json={**body, **change}, timeout=60)
        assert wrong.status_code == 422 and said in wrong.json()["detail"], wrong.text


def test_a_file_of_rows_is_drawn_as_a_run(running: Served, expected: np.ndarray) -> None:
    usual = {"width": 16, "height": 16}
    flat = {"control": "canny", "control_image": sent(picture()), "control_weight": 0.8, "control_preprocess": "canny"}
    listed = [{"name": "canny", "image": sent(picture()), "weight": 0.8, "preprocess": "canny"}]
    rows = [{**ROW, **usual, **flat}, {**ROW, **usual, "controls": listed}, {**ROW, **usual, "control": "none"}]
    data = "".join(json.dumps(row) + "\n" for row in rows)
    answer = httpx.post(
        f"{running.url}/v1/runs", content=data, headers={"Content-Type": "application/jsonl"}, timeout=120
    )  # fmt: skip
    assert answer.status_code in (200, 201, 202), answer.text
    place = f"{running.url}/v1/runs/{answer.json()['id']}"
    end = time.monotonic() + 120
    while httpx.get(place, timeout=60).json()["finished"] is None and time.monotonic() < end:
        time.sleep(0.1)
    assert httpx.get(place, timeout=60).json()["images"]["done"] == 3
    pictures = [httpx.get(f"{place}/images/{n:06d}-00.png", timeout=60) for n in range(3)]
    found = [np.asarray(read_image(answer.content)).astype(int) for answer in pictures]
    assert [np.abs(one - expected).max() <= 1 for one in found] == [True, True, False]


ABSENT = "is no ControlNet of this server"
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a path": ({"controls": [{"file": "/etc/passwd", "image": sent(picture())}]}, ABSENT),
    "a path in flat": ({"control": "../model/unet", "control_image": sent(picture())}, ABSENT),
    "near": ({"control": "cany", "control_image": sent(picture())}, "did you mean 'canny'?"),
    "a picture's path": ({"control": "canny", "control_image": "/etc/passwd"}, "none is read from a path or a URL"),
    "in a list": ({"controls": [{"name": "canny", "image": "/etc/hosts"}]}, "none is read from a path or a URL"),
    "a URL": ({"control": "canny", "control_image": "https://example.org/a.png"}, "none is read from a path or a URL"),
    "no picture": ({"control": "canny"}, "has no picture"),
    "no list": ({"controls": "canny"}, "is not a list"),
    "another model's": ({"control": "of-xl", "control_image": sent(picture())}, ABSENT),
    "nine": ({"controls": [{"name": "canny", "image": sent(picture())}] * 9}, "9 of them; a row has 8 at most"),
    "too heavy": ({"control": "canny", "control_image": sent(picture()), "control_weight": 1000}, "from -10 to 10"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_names_a_file(running: Served, nets: Path, kind: str) -> None:
    fields, message = HOSTILE[kind]
    answer = httpx.post(f"{running.url}/v1/images/generations", json={**ROW, **fields}, timeout=60)
    assert answer.status_code == 400 and message in answer.text, answer.text
    assert str(nets) not in answer.text and "\\n" not in answer.text
    data = json.dumps({**ROW, **fields}) + "\n"
    sent_as = {"content": data, "headers": {"Content-Type": "application/jsonl"}, "timeout": 60}
    answer = httpx.post(f"{running.url}/v1/runs", **sent_as)  # type: ignore[arg-type]
    assert answer.status_code in (400, 422) and str(nets) not in answer.text, answer.text
    if kind != "no picture":  # a row of a file may have that from its defaults
        assert message in answer.text, answer.text


WRONG_UNITS: list[tuple[dict[str, Any], str]] = [
    ({"module": "openpose"}, "module: 'openpose'"),
    ({"control_mode": "ControlNet is more important"}, "control_mode"),
    ({"guess_mode": True}, "guess_mode"),
    ({"module": "canny", "threshold_a": 50}, "threshold_a: 50: canny has 100"),
    ({"wieght": 1}, "did you mean 'weight'"),
    ({"weight": "much"}, "weight"),
    ({"image": None}, "image: is missing"),
    ({"image": 5}, "no picture in base64"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_UNITS)
def test_units_that_ask_for_more_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    unit = {"model": "canny", "image": sent(picture(), ""), **change}
    with pytest.raises(InputError, match=message):
        control_of(unit, (16, 16))


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"args": 5}, "no such script"),
    ({"args": True}, "no such script"),
    ({"args": [[UNIT]]}, "no such script"),
    ({"args": [UNIT] * 9}, "9 of them"),
    ({"args": [{**UNIT, "image": "/etc/passwd"}]}, "is no base64"),
    ({"args": [{**UNIT, "image": "https://example.org/a.png"}]}, "is no base64"),
    ({"args": [{**UNIT, "model": "/etc/passwd"}]}, ABSENT),
]


@pytest.mark.parametrize(("script", "said"), MALFORMED, ids=[str(n) for n in range(len(MALFORMED))])
def test_malformed_scripts_are_refused_in_a_line(running: Served, nets: Path, script: Any, said: str) -> None:
    body = {"prompt": "a", "steps": 1, "alwayson_scripts": {"ControlNet": script}}
    answer = httpx.post(f"{running.url}/sdapi/v1/txt2img", json=body, timeout=60)
    assert answer.status_code in (400, 422) and said in answer.json()["detail"], answer.text
    assert str(nets) not in answer.text and "\\n" not in answer.text
    for side in ("width", "height"):
        none = {**body, "alwayson_scripts": {"ControlNet": {"args": [UNIT]}}, side: 0}
        answer = httpx.post(f"{running.url}/sdapi/v1/txt2img", json=none, timeout=60)
        assert answer.status_code == 422 and "is no size of a picture" in answer.text, answer.text


def test_pictures_of_a_row_are_not_too_large_together(running: Served) -> None:
    flat = Image.new("1", (8192, 4096))  # some kilobytes, 100 MB decoded
    controls = [{"name": "canny", "image": sent(flat)}] * 3
    answer = httpx.post(f"{running.url}/v1/images/generations", json={**ROW, "controls": controls}, timeout=60)
    assert answer.status_code == 400 and "pixels together" in answer.text, answer.text


def test_forms_send_them_inline(running: Served) -> None:
    data = io.BytesIO()
    picture().save(data, "PNG")
    usual: dict[str, Any] = {"prompt": "a fox", "steps": "2", "seed": "7"}
    stated = json.dumps([{"name": "canny", "image": sent(picture())}])
    forms = [{"controls": stated}, {"control": "canny", "control_image": sent(picture())}, {}]
    found = []
    for fields in forms:
        answer = httpx.post(
            f"{running.url}/v1/images/edits", data={**usual, **fields}, files={"image": data.getvalue()}, timeout=60
        )  # fmt: skip
        found.append(drawn(answer))
    assert (found[0] == found[1]).all() and np.abs(found[0] - found[2]).max() > 3
    for hostile in ({"control": "canny", "control_image": "/etc/passwd"}, {"controls": "/etc/passwd:1"}):
        answer = httpx.post(
            f"{running.url}/v1/images/edits", data={**usual, **hostile}, files={"image": data.getvalue()}, timeout=60
        )  # fmt: skip
        assert answer.status_code == 400 and "root:" not in answer.text, answer.text


def test_webuiapi_draws_and_detects(running: Served, expected: np.ndarray) -> None:
    webuiapi = pytest.importorskip("webuiapi")
    at = urlsplit(running.url)
    api = webuiapi.WebUIApi(host=at.hostname, port=at.port)
    unit = webuiapi.ControlNetUnit(
        image=picture(), model="canny", module="canny", weight=0.8, threshold_a=100, threshold_b=200
    )
    found = api.txt2img(
        prompt="a fox", seed=7, steps=4, cfg_scale=5, sampler_name="DDIM", width=16, height=16, eta=None,
        controlnet_units=[unit], alwayson_scripts={},  # its own default is one object, which keeps the units
    )  # fmt: skip
    assert np.abs(np.asarray(found.image.convert("RGB")).astype(int) - expected).max() <= 1
    assert api.controlnet_version() == 2 and api.controlnet_model_list() == ["canny"]
    made = api.controlnet_detect([picture()], module="canny", threshold_a=100, threshold_b=200).images[0]
    assert np.array_equal(np.asarray(made.convert("RGB")), np.asarray(PREPROCESS["canny"](picture())))


def test_one_that_does_not_fit_is_told_at_the_start(nets: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = Options(model=str(nets / "model"), clip="none", device="cpu", control_dir=str(nets / "controls"))
    assert list(prepare(options, {}, Listen(), Most(), 8.0, []).intake.controls) == ["canny"]
    said = capfd.readouterr().err
    assert said.startswith("--control-dir: of-xl is not served: ") and "another kind of model" in said
    assert said.count("\n") == 1
    absent = dataclasses.replace(options, control_dir=str(nets / "absent"))
    with pytest.raises(InputError, match=r"--control-dir: .*absent: is no folder"):
        prepare(absent, {}, Listen(), Most(), 8.0, [])


def test_of_several_models_it_fits_one(nets: Path) -> None:
    first = prepare(Options(clip="none", device="cpu"), {}, Listen(), Most(), 8.0, [], Choice(nets))
    row = {"prompt": "a fox", "control": "of-xl", "control_image": sent(picture())}
    assert first.of("xl").intake.rows([row])[0].controls
    with pytest.raises(InputError, match=r"of-xl/config\.json: cross_attention_dim: 40") as wrong:
        first.of("model").intake.rows([row])
    assert str(nets) not in str(wrong.value)


def test_a_unit_crops_or_stretches_as_it_says() -> None:
    unit = {"model": "canny [0123abcd]", "image": sent(picture(32).resize((64, 32)), "")}
    assert control_of(unit, (16, 16))["image"].size == (32, 32)
    assert control_of(unit, (16, 32))["image"].size == (16, 32)
    assert control_of({**unit, "resize_mode": None}, (16, 16))["image"].size == (32, 32)
    assert control_of({**unit, "resize_mode": "Just Resize"}, (16, 16))["image"].size == (64, 32)
    assert control_of({**unit, "resize_mode": "Resize and Fill"}, (32, 16))["image"].size == (64, 32)
    with pytest.raises(InputError, match="resize_mode"):
        control_of({**unit, "resize_mode": "Resize and Fill"}, (16, 16))


def test_a_folder_lists_them(nets: Path) -> None:
    kinds = {item.name: item.kind for item in collection(nets)}
    assert kinds["canny"] == kinds["of-xl"] == "controlnet" and kinds["model"] == "text-to-image"


def test_intake_of_a_server_without_any(running: Served) -> None:
    intake = Intake(running.engine, running.serving.most)
    intake.controls = {}
    with pytest.raises(InputError, match="there: it was started with none"):
        intake.rows([{**ROW, "control": "canny", "control_image": sent(picture())}])
