"""ControlNets in rows: a list, columns of their own, defaults of the command line, and the words of other tools."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from genkit.errors import InputError
from genkit.pictures.metadata import Origin, texts
from genkit.rows.controls import read_unit
from genkit.rows.infotext import read_infotext
from genkit.rows.pictures import read_overrides, read_pictures
from genkit.rows.prompts import read_prompts
from genkit.rows.request import Request, canonical

ONE = {"file": "canny", "image": "a.png"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("fields", [
    {"controls": [{"file": "canny", "image": "x.png", "weight": 0.8, "end": 0.5}]},
    {"control": "canny", "control_image": "x.png", "control_weight": 0.8, "control_end": 0.5},
    {"Control": "canny", "Control Image": "x.png", "controlnet_conditioning_scale": 0.8, "control_guidance_end": 0.5},
])  # fmt: skip
def test_all_spellings_are_one(fields: dict[str, Any]) -> None:
    row = Request(prompt="a fox", **canonical(fields))
    assert row.controls == [{"file": "canny", "image": "x.png", "weight": 0.8, "end": 0.5}]


def test_files_of_rows(folder: Path) -> None:
    (folder / "p.jsonl").write_text(
        '{"prompt": "a", "control_image": "a.png"}\n{"prompt": "b", "control": "none"}\n{"prompt": "c"}\n'
    )
    (folder / "p.csv").write_text(
        "prompt,control_image,control_weight,control\na,a.png,0.5,\nb,,,none\nc,a.png,,owner/depth\n"
    )
    (folder / "p.yaml").write_text(
        "defaults: {control: own.safetensors, control_weight: 0.7}\nrequests:\n  - {prompt: a, control_image: a.png}\n"
    )
    picture = str(folder / "a.png")
    command = {"controls": [{"file": "/nets/canny", "weight": 0.9}]}
    found = {name: [row.filled(command).controls for row in read_prompts(folder / name, command)]
             for name in ("p.jsonl", "p.csv", "p.yaml")}  # fmt: skip
    assert found["p.jsonl"] == [
        [{"file": "/nets/canny", "image": picture, "weight": 0.9}], [], [{"file": "/nets/canny", "weight": 0.9}],
    ]  # fmt: skip
    assert found["p.csv"] == [
        [{"file": "/nets/canny", "image": picture, "weight": 0.5}], [],
        [{"file": "owner/depth", "image": picture, "weight": 0.9}],
    ]  # fmt: skip
    assert found["p.yaml"] == [[{"file": str(folder / "own.safetensors"), "image": picture, "weight": 0.7}]]


WRONG = {
    "imge": ([{"imge": "a.png"}], "has no 'imge' (did you mean 'image'?)"),
    "weight": ([{**ONE, "weight": "much"}], "weight must be a number from -10 to 10, not 'much'"),
    "flag": ([{**ONE, "weight": True}], "weight must be a number"),
    "range": ([{**ONE, "start": 0.5, "end": 0.5}], "start 0.5 must be less than end 0.5"),
    "outside": ([{**ONE, "end": 1.5}], "end must be a number from 0 to 1"),
    "preprocess": ([{**ONE, "preprocess": "cany"}], "'cany' is none of none, canny, invert (did you mean 'canny'?)"),
    "preprocess as a list": ([{**ONE, "preprocess": ["canny"]}], "preprocess: ['canny'] is none of none, canny"),
    "picture": ([{"file": "canny", "image": 7}], "image must be a path, not 7"),
    "file": ([{"file": "", "image": "a.png"}], "file must be a path, not ''"),
    "many": ([ONE] * 9, "must have at most 8 items"),
    "no list": ("canny", "must be a list"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named(kind: str) -> None:
    value, message = WRONG[kind]
    with pytest.raises(InputError, match=re.escape(message)) as found:
        Request(prompt="a", controls=value)
    assert str(found.value).startswith("controls") and "\n" not in str(found.value)


def test_given_twice_and_missing_pictures(folder: Path) -> None:
    for fields, message in (
        ({"controls": [ONE], "control_image": "a.png"}, "controls: is given, and also one in fields of its own"),
        ({"control_weight": 1, "controlnet_conditioning_scale": 1}, "is given twice, also under another name"),
        ({"control_imag": "a.png"}, "did you mean 'control_image'?"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            canonical(fields)
    (folder / "p.jsonl").write_text('{"prompt": "a", "control_image": "b.png"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl:1: control_image: .*b\.png: is absent"):
        read_prompts(folder / "p.jsonl")


def test_infotext_says_what_was_used_as_other_tools_do(folder: Path) -> None:
    row = Request(
        id="a", prompt="a fox", seed=1, num_inference_steps=4, guidance_scale=5.0, width=16, height=16,
        controls=[{**ONE, "weight": 0.8, "end": 0.5, "preprocess": "canny"}, ONE],
    )  # fmt: skip
    record = {"id": "a", "index": 0, "seed": 1, "steps": 4, "nfe": 8, "width": 16, "height": 16, "scores": {},
              "fingerprint": row.fingerprint()}  # fmt: skip
    text = texts(row.to_json(), record, Origin("m", "0", solver="ddim"))["parameters"]
    assert 'ControlNet 0: "Module: canny, Model: canny, Weight: 0.8, Guidance Start: 0, Guidance End: 0.5, ' in text
    found = read_infotext(text)
    assert found.about["controls"][0] == {"preprocess": "canny", "weight": 0.8, "start": 0.0, "end": 0.5}
    assert found.lacking == ("ControlNet",), "its picture is not there"
    assert any("give control and control_image" in note for note in found.notes)
    theirs = "Module: canny, Model: control_v11p_sd15_canny [d14c016b], Weight: 0.75, Resize Mode: Crop and Resize"
    assert read_unit(theirs) == {"preprocess": "canny", "weight": 0.75}
    pose = read_infotext(text.replace("Module: canny", "Module: openpose_full"))
    assert any("no preprocessor 'openpose_full': give what it made of the picture" in note for note in pose.notes)


def test_a_picture_of_another_tool_is_drawn_with_a_network_and_picture_that_are_given(folder: Path) -> None:
    unit = (
        "Module: canny, Model: control_v11p_sd15_canny [d14c016b], Weight: 0.75, Guidance Start: 0, Guidance End: 0.8"
    )
    text = (
        f'a fox\nSteps: 4, Sampler: DDIM, CFG scale: 5, Seed: 1, Size: 16x16, ControlNet 0: "{unit}", Version: v1.9.0'
    )
    told = PngInfo()
    told.add_text("parameters", text)
    Image.new("RGB", (16, 16), "teal").save(folder / "old.png", pnginfo=told)
    shots, rows = read_pictures([folder / "old.png"])
    assert shots[0].lacking == ("ControlNet",) and rows[0].controls is None
    given = read_overrides([f"control={folder / 'net.safetensors'}", f"control_image={folder / 'a.png'}"])
    shots, rows = read_pictures([folder / "old.png"], given)
    told_now = {"weight": 0.75, "start": 0.0, "end": 0.8, "preprocess": "canny"}
    files = {"file": str(folder / "net.safetensors"), "image": str(folder / "a.png")}
    assert shots[0].lacking == () and rows[0].controls == [{**files, **told_now}]
