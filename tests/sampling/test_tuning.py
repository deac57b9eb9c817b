"""`genkit tune` on a tiny model, end to end: the files it writes, what generate makes of them, and being killed."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genkit import HostError, InputError, Request, TextToImage
from genkit.rows.plans import plan_for
from genkit.sampling import tuning
from genkit.sampling.tuning import TIMESTEPS, tune_model
from genkit.schedulers import Scheduler, tune
from genkit.schedulers.tuned import FILE
from tests.tiny import tiny_clip, tiny_ddpm, tiny_stable_diffusion

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_stable_diffusion(tmp_path / "sd")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit of a few iterations, with guards and all."""
    monkeypatch.setattr(tune, "fit", functools.partial(tune.fit, iterations=12, batch=4))


@pytest.mark.slow
def test_a_tuned_plan_is_written_beside_the_model_and_drawn_with(folder: Path, quick: None, capsys: Any) -> None:
    found = tune_model(str(folder), 4, guidance=2.0, noises=12)
    assert found["better"] and found["tuned_error"] < found["stock_error"] and found["held_out"] == 3
    assert found["file"] == str(folder / "scheduler" / FILE)
    assert "100 %  done" in capsys.readouterr().err
    listed = json.loads((folder / "scheduler" / TIMESTEPS).read_text())
    assert listed == {"4": found["timesteps"]} and sorted(found["timesteps"], reverse=True) == found["timesteps"]
    assert not list((folder / "scheduler").glob(".tune*"))
    second = tune_model(str(folder), 3, guidance=2.0, noises=12)
    plans = json.loads((folder / "scheduler" / FILE).read_text())["plans"]
    assert [*plans] == (["3", "4"] if second["better"] else ["4"])

    gen = TextToImage.from_pretrained(folder, device="cpu")
    rows = [Request(prompt="a cat", seed=1, scheduler=s, num_inference_steps=4, guidance_scale=2.0)
            for s in ("tuned", str(folder / "scheduler" / FILE), "dpmpp_2m")]  # fmt: skip
    tuned, named, plain = (gen.stream([row]).__next__().pixels for row in rows)
    assert np.array_equal(tuned, named) and not np.array_equal(tuned, plain)


def test_other_steps_guidance_or_strength_are_refused(folder: Path, quick: None) -> None:
    base = Scheduler.from_config(folder / "scheduler")
    with pytest.raises(InputError, match="is not there; make it with: genkit tune MODEL --steps 4"):
        plan_for(base, "tuned", 4, folder=folder)
    tune_model(str(folder), 4, guidance=2.0, noises=12)
    assert plan_for(base, "tuned", 4, guidance=2.0, folder=folder).nfe == 4
    for steps, strength, guidance, words in (
        (5, 1.0, 2.0, "num_inference_steps: no plan for 5 in .* but for 4"),
        (4, 0.5, 2.0, "cannot begin within, at strength 0.5"),
        (4, 1.0, 7.5, "guidance"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            plan_for(base, "tuned", steps, strength, guidance, folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="trained with"):
        plan_for(Scheduler(zero_snr=True), str(folder / "scheduler" / FILE), 4, guidance=2.0)
    with pytest.raises(InputError, match="needs a model that was loaded from a folder"):
        plan_for(base, "tuned", 4)


@pytest.mark.slow
def test_generate_takes_it_and_a_changed_file_is_noticed(folder: Path, quick: None, tmp_path: Path) -> None:
    tune_model(str(folder), 4, guidance=2.0, noises=12)
    command = [sys.executable, "-m", "genkit", "generate", "--prompt", "a cat", "--model", str(folder), "-o",
               str(tmp_path / "run"), "--scheduler", "tuned", "--steps", "4", "--guidance-scale", "2"]  # fmt: skip
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    first = run(command)
    assert first.returncode == 0, first.stderr
    assert run(command).returncode == 0
    file = folder / "scheduler" / FILE
    file.write_text(file.read_text() + " ")
    changed = run(command)
    assert changed.returncode == 2 and "tuned" in changed.stderr and "Traceback" not in changed.stderr
    wrong = run([*command[:-4], "--steps", "9", "--guidance-scale", "2"])
    assert wrong.returncode == 2 and "no plan for 9" in wrong.stderr


@pytest.mark.slow
def test_unconditional_models_are_tuned_too(tmp_path: Path, quick: None) -> None:
    found = tune_model(str(tiny_ddpm(tmp_path / "ddpm")), 4, noises=8)
    assert found["guidance_scale"] == 1.0 and np.isfinite([found["stock_error"], found["tuned_error"]]).all()


def test_fields_that_are_not_used_to_tune_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_tune", lambda *_: {})  # the fit itself
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a (fox)", "seed": 3, "syntax": "a1111"}\n{"prompt": "a cat"}\n')
    assert tune_model(str(folder), 4, rows) == {"notes": [f"{rows}: not used to tune: seed, syntax"]}


def test_bad_input_is_found_before_anything_loads(folder: Path, tmp_path: Path) -> None:
    clip, plain, missing = tiny_clip(tmp_path / "clip"), tiny_ddpm(tmp_path / "ddpm"), tmp_path / "none.txt"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": str(folder), "steps": 2}, "--steps: 2 is not within 3 to 50"),
        ({"model": str(folder), "steps": 8, "noises": 4}, "--noises: 4 is not within 8"),
        ({"model": str(folder), "steps": 8, "guidance": 0.5}, "--guidance-scale: 0.5"),
        ({"model": str(folder), "steps": 8, "prompts": missing}, "none.txt"),
        ({"model": str(folder), "steps": 8, "seed": 2**64}, "--seed: 18446744073709551616 is not within 0 to 42949"),
        ({"model": str(clip), "steps": 8}, "is a CLIP model"),
        ({"model": str(plain), "steps": 8, "guidance": 3.0}, "this model is unconditional"),
        ({"model": "emojo", "steps": 8}, "emojo"),
    ]
    for arguments, words in cases:
        with pytest.raises(InputError, match=words):
            tune_model(**arguments)
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="give another folder with -o"):
        tune_model(str(folder), 8, out=tmp_path / "file")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_it_goes_on_to_the_same_plan(folder: Path, tmp_path: Path) -> None:
    def start(out: Path) -> subprocess.Popen[str]:
        code = (
            "import functools; from genkit.schedulers import tune; import genkit.schedulers.tune as t; "
            "t.SAVE_EVERY = 0; t.fit = functools.partial(t.fit, iterations=10, batch=4); "
            f"from genkit.sampling.tuning import tune_model; from pathlib import Path; "
            f"print(tune_model({str(folder)!r}, 4, out=Path({str(out)!r}), guidance=2.0, noises=8)['tuned_error'])"
        )
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert whole.communicate(timeout=250)[0] and whole.returncode == 0
    killed = start(tmp_path / "cut")
    state = tmp_path / "cut" / ".tune-4.safetensors"
    deadline = time.monotonic() + 200
    while not state.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert start(tmp_path / "cut").wait(timeout=250) == 0
    assert (tmp_path / "cut" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    assert not state.exists()
