"""Boxes of a run: recorded as pictures are drawn, kept when it is killed, looked for again when rows ask for others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from genkit import cli
from genkit.runs.look_again import look_again, unseen
from genkit.runs.run import Run
from genkit.scoring.senses import Asked
from tests.detectors import tiny_owlv2, tiny_owlvit
from tests.null_run import CONFIG, draw, rows_of

ROOT = Path(__file__).parents[2]
SMALL = "--steps 1 --width 64 --height 64".split()  # noqa: SIM905


def _records(run: Path) -> dict[int, dict[str, Any]]:
    return {r["index"]: r for r in map(json.loads, (run / "results.jsonl").read_text().splitlines())}


@pytest.mark.slow
def test_a_gate_on_count_is_killed_and_resumed_and_filtered_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_owlvit(tmp_path / "owl")
    rows = tmp_path / "rows.csv"
    gate = "\"count['a cat', 0.3] >= 2\""
    rows.write_text(f'id,prompt,num_images,detect,gate\nfox,a red fox,6,"a dog,a cat",{gate}\n')
    command = ["generate", str(rows), *SMALL, "--detector", "owl", "--device", "cpu", "--batch-size", "1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "genkit", *command, "-o", "killed"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    journal = tmp_path / "killed" / "results.jsonl"
    until = time.monotonic() + 200
    while not (journal.exists() and journal.read_bytes().count(b"\n")) and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = journal.read_bytes()
    assert cli.run([*command, "-o", "killed"]) == 0
    assert journal.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert cli.run([*command, "-o", "whole"]) == 0
    killed, whole = _records(tmp_path / "killed"), _records(tmp_path / "whole")
    for n in range(6):
        a, b = killed[n]["scores"], whole[n]["scores"]
        assert a["detected"] == b["detected"] == {
            "words": ["a dog", "a cat"], "size": [64, 64], "threshold": 0.1, "floor": 0.05,
        }  # fmt: skip
        assert len(a["boxes"]) == len(b["boxes"]) > 0
        assert all(abs(x[1] - y[1]) < 1e-3 for x, y in zip(a["boxes"], b["boxes"], strict=True))
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "genkit.vision.detector", None)  # no model from here on
    counted = [sum(box[0] == "a cat" for box in r["scores"]["boxes"]) for r in whole.values()]
    assert cli.run(["filter", "whole", "--where", "count['a cat', 0.06] >= 1 and not nan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == sum(number > 0 for number in counted)
    assert cli.run(["filter", "whole", "--where", "count['a horse'] >= 1"]) == 2
    assert "--where: \"count['a horse'] >= 1\": 'a horse' was not looked for" in capsys.readouterr().err


def test_a_run_is_bound_to_the_detectors_weights_and_looks_again_for_new_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_owlvit(tmp_path / "owl")
    tiny_owlvit(tmp_path / "moved")
    tiny_owlv2(tmp_path / "other")
    command = ["generate", "--prompt", "a red fox", *SMALL, "-n", "2", "--device", "cpu", "-o", "run"]
    assert cli.run([*command, "--detector", "owl", "--detect", "a cat"]) == 0
    assert (
        cli.run([*command, "--detector", "moved", "--gate", "count['a cat'] >= 1 and not left_of('a cat', 'a dog')"])
        == 0
    )
    told = capsys.readouterr()
    assert "2 images are looked at again" in told.err and "new                0" in told.out
    assert {tuple(r["scores"]["detected"]["words"]) for r in _records(tmp_path / "run").values()} == {
        ("a cat", "a dog")
    }
    for words, message in (
        (["--detector", "other", "--detect", "a cat"], "detector.weights.model.safetensors"),
        (["--detect", "a cat"], "detect: 'a cat' needs a detector, and there is none: give --detector"),
        (["--gate", "count['a cat'] > 1"], "there is no detector: give --detector"),
        (["--detector", "owl", "--detect", "a very long " * 9], "tokens, more than the 16 that owl reads"),
        (["--detector", "owl", "--detect", "a cat,"], "--detect: ['a cat', ''] '' is nothing to look for"),
        (["--detector", "emoji", "--detect", "a cat"], "--detector: 'emoji' is no detector"),
        (["--detector", "run", "--detect", "a cat"], "config.json: is absent"),
    ):
        assert cli.run([*command, *words]) == 2, words
        assert message in capsys.readouterr().err
    assert cli.run([*command, "--detector", "owl", "--rank-by", "area['a cat']", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["detector"] == "owl"


class Eye:
    """A panel that sees nothing, and remembers in how many pictures."""

    def __init__(self) -> None:
        self.looked = 0

    @property
    def senses(self) -> Any:
        return self

    def look(self, pictures: Sequence[torch.Tensor], asked: Sequence[Asked]) -> list[dict[str, Any]]:
        self.looked += len(pictures)
        return [
            {"boxes": [], "detected": {"words": list(a.words), "size": [1, 1], "threshold": 0.1, "floor": 0.05}}
            for a in asked
        ]


def test_looking_again_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    draw(tmp_path, rows_of(20))
    rows, eye = rows_of(20, detect=["a cat"]), Eye()
    with Run.open(tmp_path, CONFIG, rows) as run:
        assert len(stale := unseen(run)) == 20
        assert next(look_again(run, eye, stale)) == 8  # type: ignore[arg-type]
    with Run.open(tmp_path, CONFIG, rows) as run:
        assert list(look_again(run, eye, unseen(run))) == [8, 12]  # type: ignore[arg-type]
        assert unseen(run) == [] and eye.looked == 20


def test_pictures_are_searched_and_drawn_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    tiny_owlvit(tmp_path / "owl")
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("a.jpg", "c.jpg", "c.png"):
        Image.effect_noise((64, 48), 60).convert("RGB").save(tmp_path / "photos" / "deep" / name)
    (tmp_path / "photos" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    command = ["detect", "photos", "--detector", "owl", "--words", "a cat,a dog", "--device", "cpu"]
    assert cli.run([*command, "--draw", "drawn", "--threshold", "0.2"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    good = next(line for line in lines if "boxes" in line)
    assert "error" in next(line for line in lines if line is not good)
    assert (good["width"], good["height"], good["words"]) == (64, 48, ["a cat", "a dog"])
    assert all(box[1] > 0.2 and 0 <= box[2] <= box[4] <= 64 and 0 <= box[3] <= box[5] <= 48 for box in good["boxes"])
    with Image.open(tmp_path / "drawn" / "deep" / "a.png") as image:
        assert image.size == (64, 48)
    assert {"c.jpg.png", "c.png.png"} <= {path.name for path in (tmp_path / "drawn" / "deep").iterdir()}
    for words, message in (
        (["detect", "photos", "--detector", "owl"], "--words, --like: give one of them"),
        ([*command, "--threshold", "3"], "--threshold: 3 is not above 0 and below 1"),
        ([*command, "--draw", "photos/drawn"], "lies where the pictures are"),
    ):
        assert cli.run(words) == 2
        assert message in capsys.readouterr().err
