"""The API of AUTOMATIC1111, called by webuiapi, against a real server on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from genkit.rows.request import Request

webuiapi = pytest.importorskip("webuiapi")
SMALL = {"width": 32, "height": 32, "steps": 2, "sampler_name": "Euler", "seed": 5, "cfg_scale": 2.0}


@pytest.fixture(scope="module")
def api(served: Any) -> Any:
    at = urlsplit(served.url)
    return webuiapi.WebUIApi(host=at.hostname, port=at.port)


@pytest.fixture(scope="module")
def plain(served: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{served.url}/sdapi/v1", timeout=60) as client:
        yield client


def difference(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other, int)).max())


def test_txt2img_is_what_the_generator_draws(api: Any, served: Any) -> None:
    found = api.txt2img(prompt="a (red:1.2) apple", negative_prompt="blue", batch_size=2, eta=None, **SMALL)
    assert len(found.images) == 2 and found.info["all_seeds"] == [5, 6] and found.info["sampler_name"] == "Euler"
    row = Request(
        prompt="a (red:1.2) apple", negative_prompt="blue", syntax="a1111", width=32, height=32, seed=5, num_images=2,
        num_inference_steps=2, guidance_scale=2.0, scheduler="euler",
    )  # fmt: skip
    drawn = sorted(served.engine.generator.stream([row]), key=lambda r: r.index)
    assert max(difference(*pair) for pair in zip(found.images, (r.pixels for r in drawn), strict=True)) <= 1
    info = api.png_info(found.images[1])
    assert info.info == found.info["infotexts"][1] and info.json["parameters"]["Seed"] == "6"
    assert info.json["parameters"]["Prompt"] == "a (red:1.2) apple"
    with pytest.raises(RuntimeError, match="prompt: missing"):
        api.txt2img(prompt="", **SMALL)


def test_img2img_draws_where_the_mask_shows(api: Any, plain: httpx.Client) -> None:
    start = Image.new("RGB", (48, 48), "red")
    mask = Image.new("L", (48, 48), 0)
    mask.paste(255, (16, 0, 32, 32))
    given = {"images": [start], "prompt": "a dog", "denoising_strength": 0.9, **SMALL}
    whole = api.img2img(**given).image
    assert whole.size == (32, 32) and difference(whole, Image.new("RGB", (32, 32), "red")) > 5
    masked = {**given, "mask_image": mask, "inpaint_full_res": False, "mask_blur": 0}
    for fill in (0, 1):
        kept = np.asarray(api.img2img(**masked, inpainting_fill=fill).image, int)
        assert np.abs(kept[24:] - (255, 0, 0)).max() <= 3 and np.abs(kept[:21, :9] - (255, 0, 0)).max() <= 3
        assert np.abs(kept[:21, 11:21] - (255, 0, 0)).max() > 5
    other = np.asarray(api.img2img(**masked, inpainting_fill=1, inpainting_mask_invert=1).image, int)
    assert np.abs(other[2:19, 12:20] - (255, 0, 0)).max() <= 3
    with pytest.raises(RuntimeError, match="inpaint_full_res"):
        api.img2img(**given, mask_image=mask)
    assert plain.post("/img2img", json={"prompt": "x", "init_images": []}).status_code == 422


REFUSED = [
    ({"enable_hr": True}, "enable_hr"),
    ({"tiling": True}, "tiling"),
    ({"styles": ["cinematic"]}, "styles"),
    ({"subseed_strength": 0.5}, "subseed_strength"),
    ({"script_name": "xyz"}, "script_name"),
    ({"refiner_checkpoint": "xl"}, "refiner_checkpoint"),
    ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": True}]}}}, "controlnet: image"),
    ({"override_settings": {"sd_model_checkpoint": "other"}}, "sd_model_checkpoint"),
    ({"override_settings": {"eta_noise_seed_delta": 31337}}, "eta_noise_seed_delta"),
    ({"sampler_name": "Eular a"}, "did you mean"),
    ({"sampler_name": "Restart"}, "Restart"),
    ({"scheduler": "Turbo"}, "Turbo"),
    ({"sampler_name": "Euler a", "eta": 0.5}, "eta"),
    ({"prompt": "<lora:/etc/passwd:1>"}, "loras"),
    ({"init_images": ["x"]}, "init_images"),
    ({"stepz": 3}, "did you mean 'steps'"),
    ({"steps": "many"}, "steps"),
    ({"steps": 0}, "steps: 0"),
    ({"n_iter": -2, "batch_size": -2}, "batch_size: -2"),
    ({"override_settings": {"CLIP_stop_at_last_layers": "x"}}, "CLIP_stop_at_last_layers: 'x'"),
    ({"sampler_name": "DDIM", "eta": "x"}, "eta: 'x'"),
    ({"eta": 0.5}, "eta: 0.5: needs sampler_name"),
]


@pytest.mark.parametrize(("body", "said"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_genkit_lacks_is_refused_by_name(plain: httpx.Client, body: dict[str, Any], said: str) -> None:
    answer = plain.post("/txt2img", json={"prompt": "x", "steps": 1, "width": 32, "height": 32, **body})
    assert answer.status_code in (400, 422), answer.text
    assert said in answer.json()["detail"] and "\n" not in answer.json()["detail"]


def test_what_is_off_is_taken(plain: httpx.Client) -> None:
    off: dict[str, Any] = {
        "enable_hr": False, "hr_scale": 2, "tiling": None, "styles": [], "subseed": 77, "subseed_strength": 0,
        "script_name": None, "script_args": [], "alwayson_scripts": {
            "ADetailer": {"args": [False]}, "ControlNet": {"args": [{"enabled": False}]}, "x": {"args": []},
        }, "override_settings": {"sd_model_checkpoint": "emoji", "CLIP_stop_at_last_layers": 1}, "s_noise": 1,
        "save_images": True, "prompt": "a {dog} __x__", "scheduler": "Karras", "sampler_name": "DPM++ 2M",
        "send_images": False, "n_iter": 2,
    }  # fmt: skip
    answer = plain.post("/txt2img", json={"steps": 2, "width": 32, "height": 32, "seed": -1, **off})
    assert answer.status_code == 200, answer.text
    info = json.loads(answer.json()["info"])
    assert answer.json()["images"] == [] and len(info["all_seeds"]) == 2 and info["all_seeds"][1] - info["seed"] == 1
    assert "saves none" in info["notes"][0] and "Schedule type: Karras" in info["infotexts"][0]


def test_numbers_that_json_lacks_are_echoed_as_null(plain: httpx.Client) -> None:
    body = '{"prompt": "x", "steps": 1, "width": 32, "height": 32, "hr_scale": 1e400, "force_task_id": "\\ud800"}'
    answer = plain.post("/txt2img", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200 and answer.json()["parameters"]["hr_scale"] is None


def test_progress_and_interrupt(api: Any, served: Any) -> None:
    served.settled()
    assert api.get_progress()["progress"] == 0.0
    found: list[Any] = []
    many = {**SMALL, "width": 128, "height": 128, "steps": 50, "batch_size": 4, "n_iter": 2}
    thread = threading.Thread(target=lambda: found.append(api.txt2img(prompt="a dog", **many)))
    thread.start()
    seen = api.get_progress()
    while thread.is_alive() and not (seen["progress"] and seen["current_image"]):
        time.sleep(0.02)
        seen = api.get_progress()
    assert 0 < seen["progress"] < 1 and seen["state"]["job_count"] == 8 and seen["state"]["sampling_steps"] == 50
    api.interrupt()
    thread.join()
    assert len(found) == 1 and len(found[0].images) < 8
    assert served.settled()["images_in_flight"] == 0 and api.get_progress()["progress"] == 0.0


def test_lists_and_options(api: Any, plain: httpx.Client) -> None:
    assert api.util_get_model_names() == ["emoji"]
    assert {"Euler a", "DPM++ 2M", "UniPC"} <= set(api.util_get_sampler_names())
    assert {"automatic", "karras", "sgm_uniform"} <= {one["name"] for one in plain.get("/schedulers").json()}
    assert api.get_loras() == [] and api.get_options()["sd_model_checkpoint"] == "emoji"
    assert plain.get("/embeddings").json() == {"loaded": {}, "skipped": {}}
    api.set_options({"sd_model_checkpoint": "emoji", "samples_format": "png"})
    for settings in ({"sd_model_checkpoint": "xl"}, {"CLIP_stop_at_last_layers": 2}, {"face_restoration": True}):
        assert plain.post("/options", json=settings).status_code == 422
    assert plain.post("/png-info", json={"image": "aGk="}).status_code == 422
