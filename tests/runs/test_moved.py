"""What binds a run is what its files hold, not where they lie: models, pictures and runs that moved go on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from genkit import InputError, generate
from genkit.job.load import reopen
from tests.tiny import tiny_stable_diffusion

FEW: dict[str, Any] = {"num_inference_steps": 1, "width": 16, "height": 16, "scheduler": "ddim"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_stable_diffusion(tmp_path / "sd")
    Image.new("RGB", (16, 16), "orange").save(tmp_path / "in.png")
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a fox"}\n{"prompt": "a cat", "image": "in.png", "strength": 1.0}\n'
    )
    return tmp_path


def draw(model: str, rows: str | Path = "rows.jsonl", out: str | Path = "run", steps: int = 1) -> int:
    """Return how many images are new."""
    defaults = {**FEW, "num_inference_steps": steps}
    return generate(rows, out, model=model, clip="none", device="cpu", quiet=True, defaults=defaults).new


@pytest.mark.parametrize("spelling", ["sd/", "./sd", "sd/../sd", "~/sd", "$HOME/sd", "{here}/sd", "link"])
def test_another_spelling_of_the_model(spelling: str, here: Path) -> None:
    (here / "link").symlink_to("sd")
    assert draw("sd") == 2
    assert draw(spelling.format(here=here)) == 0


def test_a_model_that_moved_is_found_again(here: Path) -> None:
    assert draw("sd") == 2
    shutil.move("sd", "models")
    with pytest.raises(InputError, match="sd: there is no such folder"):
        draw("sd")
    assert draw("models") == 0
    recorded = json.loads((here / "run" / "run.json").read_text())["binding"]["model"]
    assert recorded["name"] == "models" and recorded["folder"] == str(here / "models")
    os.chdir("/")
    reopen(here / "run", device="cpu")  # from elsewhere


def test_another_model_at_the_same_place_is_refused(here: Path) -> None:
    draw("sd")
    file = here / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.neg(weight) for name, weight in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"was begun otherwise: model\.weights\.unet/"):
        draw("sd")
    shutil.move("sd", "other")
    with pytest.raises(InputError, match=r"model\.name: sd -> other; .*model\.weights\.unet/"):
        draw("other")


def test_a_run_goes_on_where_it_was_moved_with_its_pictures(here: Path) -> None:
    assert draw("sd") == 2
    (here / "elsewhere").mkdir()
    for name in ("run", "rows.jsonl", "in.png", "sd"):
        shutil.move(name, here / "elsewhere" / name)
    os.chdir(here / "elsewhere")
    assert draw("sd") == 0
    Image.new("RGB", (16, 16), "blue").save("in.png")
    assert draw("sd") == 1, "a changed picture under the same name"
