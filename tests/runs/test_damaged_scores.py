"""A record whose scores have a type that genkit never writes is a damaged line: every command passes it over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from genkit.cli import run as command
from genkit.runs.run import Run
from genkit.selection.calibrate import read_pictures
from tests.judged_run import judged_run
from tests.null_run import CONFIG, rows_of

BOX = ["a cat", 0.9, 0, 0, 2, 3, "red"]
DETECTED = {"words": ["a cat"], "size": [4, 5], "threshold": 0.1, "floor": 0.01}
DAMAGE: dict[str, Any] = {
    "p": [5, "text", [0.5], {"a cat": "0.5"}, {"a cat": [1]}],
    "classes": [5, ["tabby"], {"tabby": "high"}, {"tabby": None}],
    "answers": [5, "yes", {"is it red?": 5}],
    "detected": [5, {}, {**DETECTED, "words": 5}, {**DETECTED, "size": [4]}, {**DETECTED, "threshold": "low"}],
    "boxes": [5, [5], [["a cat"]], [[*BOX[:3], "x", *BOX[4:]]], [[5, *BOX[1:]]], [[*BOX[:6], 5]]],
    "clip": ["0.5", int("9" * 400)],
    "mine": ["0.5"],
}
EXPRESSION = (
    "clip + mine + p['a cat'] + p_class['tabby'] + count['a cat'] + area['a cat'] > 0.3 "
    "and answer['is it red?'] == 'yes' and color['a cat'] == 'red'"
)


def scores(n: int, k: int) -> dict[str, Any]:
    part = (5 * n + k) / 50
    return {
        "clip": part, "mine": part, "p": {"a cat": part, "a dog": 1 - part}, "classes": {"tabby": part},
        "answers": {"is it red?": "yes"}, "boxes": [BOX], "detected": DETECTED,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run; `lost`: its copy with a third line that is not even JSON; a vote for each picture."""
    folder = tmp_path_factory.mktemp("runs")
    run = judged_run(folder / "whole", scores, rows=8, labels=["a cat", "a dog"])
    votes = [f"r{n}-{k:02d},{int(n > 3)}" for n in range(8) for k in range(5)]
    (run / "votes.csv").write_text("\n".join(["image,vote", *votes]) + "\n")
    broken(run, folder / "lost", b"not json")
    return folder


def broken(run: Path, copy: Path, line: bytes) -> Path:
    shutil.copytree(run, copy)
    lines = (copy / "results.jsonl").read_bytes().splitlines()
    lines[2] = line
    (copy / "results.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return copy


def said(run: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """What every command says of a run, which it calls X."""
    found: list[Any] = []
    for words in (
        ["filter", str(run), "--where", EXPRESSION, "--rank-by", "mine", "--keep", "2", "--json"],
        ["calibrate", str(run), "--labels", str(run / "votes.csv"), "--precision", "0.6", "--score", "mine",
         "--where", EXPRESSION.replace("0.3", "0.0"), "--json"],
        ["study", str(run), "--json"],
        ["compare", str(whole), str(run), "--json"],
        ["label", str(run), "--where", EXPRESSION.replace("0.3", "99")],
    ):  # fmt: skip
        code = command(words)
        told = capsys.readouterr()
        found.append((code, told.out.replace(str(run), "X"), told.err.replace(str(run), "X")))
    return found


def test_the_commands_read_a_sound_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else the comparison below would be one of refusals."""
    found = said(runs / "whole", runs / "lost", capsys)
    assert [code for code, *_ in found] == [0, 0, 0, 0, 2], found
    assert json.loads(found[0][1])["kept"] > 5


def test_every_command_names_the_line_that_it_passes_over(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for run in (runs / "lost", tmp_path / "parts"):
        if run.name == "parts":  # as of several workers
            shutil.copytree(runs / "lost", run)
            (run / "results.jsonl").rename(run / "results-w1.jsonl")
            (run / "results.jsonl").touch()
        file = run / ("results-w1.jsonl" if run.name == "parts" else "results.jsonl")
        for words in (
            ["filter", str(run), "--where", "clip > 0"], ["study", str(run)],
            ["compare", str(run), str(runs / "whole")],
            ["calibrate", str(run), "--labels", str(runs / "lost" / "votes.csv"), "--precision", "0.6"],
        ):  # fmt: skip
            caplog.clear()
            assert command(words) == 2 * (words[0] == "calibrate"), "it refuses a vote on the picture of that line"
            assert f"{file}:3 is damaged and passed over" in caplog.messages, words
    caplog.clear()
    assert command(["filter", str(runs / "whole"), "--where", "clip > 0"]) == 0
    assert not caplog.messages


@pytest.mark.parametrize("name", DAMAGE)
def test_a_record_with_damaged_scores_is_passed_over(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = said(runs / "lost", runs / "whole", capsys)
    record = json.loads((runs / "whole" / "results.jsonl").read_bytes().splitlines()[2])
    record["scores"][name] = DAMAGE[name][0]
    run = broken(runs / "whole", tmp_path / "run", json.dumps(record).encode())
    assert said(run, runs / "whole", capsys) == lost
    with Run.open(run, CONFIG, rows_of(8, 5)) as opened:
        assert "results.jsonl:3: damaged; its image is drawn again" in opened.notes


@pytest.mark.parametrize(
    ("name", "number"), [(name, k) for name, values in DAMAGE.items() for k in range(1, len(values))]
)
def test_so_is_damage_further_inside(
    name: str, number: int, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--where", EXPRESSION, "--rank-by", "mine", "--json"]
    assert command(["filter", str(runs / "lost"), *words]) == 0
    lost = capsys.readouterr().out
    record = json.loads((runs / "whole" / "results.jsonl").read_bytes().splitlines()[2])
    record["scores"][name] = DAMAGE[name][number]
    run = broken(runs / "whole", tmp_path / "run", json.dumps(record).encode())
    assert command(["filter", str(run), *words]) == 0
    assert capsys.readouterr().out.replace(str(run), str(runs / "lost")) == lost
    assert len(read_pictures(run)[0]) == 39


@pytest.mark.parametrize("name", ["reason", "sha256", "meta"])
def test_a_record_with_another_damaged_field_is_passed_over(name: str, runs: Path, tmp_path: Path) -> None:
    record = json.loads((runs / "whole" / "results.jsonl").read_bytes().splitlines()[2])
    run = broken(runs / "whole", tmp_path / "run", json.dumps({**record, name: 5}).encode())
    assert len(read_pictures(run)[0]) == 39


def test_what_a_newer_genkit_may_write_is_read(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((runs / "whole" / "results.jsonl").read_bytes().splitlines()[2])
    record["scores"] |= {"relief": {"near": 1}, "p": None, "classes": None, "answers": {"is it red?": None}}
    record["scores"] |= {"boxes": None, "clip": None}
    run = broken(runs / "whole", tmp_path / "run", json.dumps(record).encode())
    assert len(read_pictures(run)[0]) == 40
    assert [code for code, *_ in said(run, runs / "whole", capsys)] == [0, 0, 0, 0, 2]
    assert command(["filter", str(run), "--where", "relief > 1"]) == 2
    assert "relief: {'near': 1} is no number" in capsys.readouterr().err
