"""`genkit generate --control` and `genkit replay` on tiny models, as a user runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genkit.pictures.images import read_image
from tests.cli.test_cli import here
from tests.tiny import tiny_controlnet, tiny_sdxl, tiny_stable_diffusion

pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    tiny_controlnet(folder / "net", tiny_stable_diffusion(folder / "model"))
    tiny_controlnet(folder / "large", tiny_sdxl(folder / "xl"))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(np.concatenate([pixels, pixels])).save(folder / "tall.png")
    rows = [
        {"prompt": "a fox", "control_image": "a.png"},
        {"prompt": "a cat", "controls": []},
        {"prompt": "an owl", "control_image": "tall.png", "width": 16, "height": 16, "control_preprocess": "canny"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def generate(*arguments: str, out: str = "run") -> subprocess.CompletedProcess[str]:
    common = ("-o", out, "--model", "model", "--clip", "none", "--steps", "2", "--seed", "1")
    return here("generate", *arguments, *common)


def test_a_run_goes_on_and_its_pictures_are_replayed(place: Path) -> None:
    first = generate("rows.jsonl", "--control", "net:0.9", "--max-total-images", "1")
    assert first.returncode == 1, first.stderr
    done = generate("rows.jsonl", "--control", "net:0.9", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["new"] == 2, done.stderr
    rows = [json.loads(line) for line in (place / "run" / "requests.jsonl").read_text().splitlines()]
    assert [row["controls"] for row in rows] == [
        [{"file": str(place / "net"), "image": str(place / "a.png"), "weight": 0.9}], [],
        [{"file": str(place / "net"), "image": str(place / "tall.png"), "weight": 0.9, "preprocess": "canny"}],
    ]  # fmt: skip
    assert "rows.jsonl:3: controls: a picture of 16x32 is stretched to 16x16" in first.stderr
    images = place / "run" / "images"
    plain = np.asarray(read_image(images / "000001-00.png")).astype(int)
    assert abs(np.asarray(read_image(images / "000000-00.png")).astype(int) - plain).max() > 3
    lost = here("replay", "run/images", "-o", "again", "--model", "model")
    assert (
        lost.returncode == 2
        and "control_image: 'a.png' is not beside the picture; give control_image=FILE" in lost.stderr
    )
    for name in ("a.png", "tall.png"):
        shutil.copy(place / name, images)
    lost = here("replay", "run/images/000000-00.png", "-o", "again", "--model", "model")
    assert "control: 'net' is not beside the picture; give control=NETWORK" in lost.stderr
    same = here("replay", "run/images/000000-00.png", "control=net", "-o", "again", "--model", "model", "--json")
    found = json.loads(same.stdout)["pictures"][0]
    assert found["changed"] == [] and (found["result"] == "identical" or found["largest"] <= 1), found
    found = here("replay", "run/images/000000-00.png", "--control-dir", ".", "-o", "in", "--model", "model", "--json")
    assert json.loads(found.stdout)["pictures"][0]["changed"] == []
    tiny_controlnet(place / "net2", place / "model", seed=9)
    other = here("replay", "run/images/000000-00.png", "control=net2", "-o", "other", "--model", "model")
    assert other.returncode == 2 and "controls[0].file: " in other.stderr and "another picture" in other.stderr


WRONG = {
    "another model's": (("--control", "large", "--control-image", "a.png"), "cross_attention_dim: 40, but the model's UNet has 16"),  # noqa: E501
    "none": (("--control", "nowhere", "--control-image", "a.png"), "there is no such folder"),
    "a UNet": (("--control", "model/unet", "--control-image", "a.png"), "is no controlnet"),
    "no picture": (("--control", "net"), "'net' has no picture: give --control-image"),
    "absent": (("--control", "net", "--control-image", "b.png"), "--control-image: "),
    "no network": (("--control-image", "a.png"), "--control-image: needs --control"),
    "weight": (("--control", "net:much", "--control-image", "a.png"), "--control: 'much' is not a number"),
    "kind": (("--control", "net", "--control-image", "a.png", "--control-preprocess", "cany"), "did you mean 'canny'?"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_found_before_anything_loads(place: Path, kind: str) -> None:
    arguments, message = WRONG[kind]
    found = generate("--prompt", "x", *arguments, out="wrong")
    assert found.returncode == 2 and message in found.stderr, found.stderr
    assert found.stderr.count("\n") == 1 and not (place / "wrong").exists()


def test_dry_run_counts_its_memory() -> None:
    with_, without = (
        json.loads(generate("--prompt", "x", *more, "--dry-run", "--json", out="dry").stdout)
        for more in (("--control", "net", "--control-image", "a.png"), ())
    )
    assert with_["controls"] == ["net"] and "controls" not in without
    assert with_["memory_gib"]["cpu"]["weights"] >= without["memory_gib"]["cpu"]["weights"]
