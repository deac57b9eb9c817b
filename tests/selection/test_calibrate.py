"""A gate fitted to labels: its interval holds, its errors say what to do, its expression is what filter takes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from scipy.stats import beta

from genkit.cli import run as command
from genkit.errors import InputError
from genkit.selection.calibrate import calibrate, chosen, fit, named_gate
from genkit.selection.intervals import clopper_pearson
from tests.judged_run import judged_run

GOOD = {(n, k): (n * 5 + k) % 3 != 0 for n in range(20) for k in range(5)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 pictures; good ones score from 0.4 up, bad ones from 0 up to 0.6."""

    def scores(n: int, k: int) -> dict[str, float]:
        lot = random.Random(n * 5 + k)
        return {"clip": (0.4 if GOOD[n, k] else 0.0) + 0.6 * lot.random(), "sharpness": 1.0}

    return judged_run(tmp_path / "run", scores, rows=20)


def votes(folder: Path, text: str = "", header: str = "image,vote") -> Path:
    path = folder / "votes.csv"
    lines = [f"r{n}-{k:02d},{int(good)}" for (n, k), good in GOOD.items()]
    path.write_text("\n".join([header, *(lines if not text else []), text]) + "\n")
    return path


@pytest.mark.parametrize(("good", "of", "confidence"), [(0, 10, 0.95), (7, 10, 0.95), (19, 20, 0.99), (30, 30, 0.9)])
def test_exact_interval_is_that_of_the_beta_distribution(good: int, of: int, confidence: float) -> None:
    low, high = clopper_pearson(good, of, confidence)
    tail = (1 - confidence) / 2
    assert low == pytest.approx(beta.ppf(tail, good, of - good + 1) if good else 0, abs=1e-9)
    assert high == pytest.approx(beta.ppf(1 - tail, good + 1, of - good) if good < of else 1, abs=1e-9)


def test_interval_of_the_chosen_threshold_covers_the_truth() -> None:
    """Of 300 label sets, at least 95 % less luck; pictures with score s are good with probability s."""
    held = asked = 0
    for seed in range(300):
        lot = random.Random(seed)
        scored = [(s, lot.random() < s) for s in (lot.random() for _ in range(60))]
        best = chosen(fit(scored, 0.95, 10), 0.8, 0.95, sure=False)
        if best is not None:
            truth = (1 + float(best.threshold)) / 2  # of uniform scores above the threshold
            asked += 1
            held += best.low <= truth <= best.high
    assert asked > 150
    assert held / asked >= 0.94


def test_sure_promises_what_it_says() -> None:
    broken = 0
    for seed in range(200):
        lot = random.Random(seed)
        scored = [(s, lot.random() < s) for s in (lot.random() for _ in range(150))]
        best = chosen(fit(scored, 0.9, 10), 0.7, 0.9, sure=True)
        broken += best is not None and (1 + float(best.threshold)) / 2 < 0.7
    assert broken <= 30  # a tenth of 200, and luck


def test_gate_is_written_and_filter_takes_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["calibrate", str(folder), "--labels", str(votes(folder)), "--precision", "0.9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["expression"].startswith("clip > 0.")
    assert found["low"] <= found["precision"] <= found["high"]
    assert named_gate(folder, "@calibrated") == found["expression"]
    assert command(["filter", str(folder), "--where", "@calibrated", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == found["passed"]
    kept = json.loads((folder / "selection.json").read_text())["images"]
    above = {(int(name[1:].split("-")[0]), int(name[-2:])) for name, d in kept.items() if d["kept"]}
    assert sum(GOOD[key] for key in above) / len(above) == pytest.approx(found["precision"], abs=0.011)


def test_list_of_good_pictures_needs_to_know_what_was_looked_at(folder: Path) -> None:
    names = folder / "good.txt"
    names.write_text("# the good ones\n" + "\n".join(f"images/r{n}-{k:02d}.png" for (n, k), g in GOOD.items() if g))
    with pytest.raises(InputError, match="--others-bad"):
        calibrate(folder, names, 0.9)
    with pytest.raises(InputError, match=r"godo\.txt: is absent"):
        calibrate(folder, folder / "godo.txt", 0.9)
    assert calibrate(folder, names, 0.9, others_bad=True) == calibrate(folder, votes(folder), 0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r0-00,1\nr0-99,1", r"votes\.csv:3: 'r0-99' is no picture of this run"),
        ("r0-00,maybe", r"votes\.csv:2: vote: 'maybe' is none of 1, 0, yes, no, undo"),
        ("r0-00,ye", "did you mean 'yes'"),
        ('r0-00,"1', "is not CSV"),
        ("r0-00,1\nr0-01,0", "labels 2 pictures"),
        ("\n".join(f"r{n}-{k:02d},1" for n, k in GOOD), "all 100 labelled pictures are good"),
        ("=cmd|' /C calc'!A0,1", r"votes\.csv:2: "),
        ("\x1b[31mr0,1", r"votes\.csv:2: '\\x1b\[31mr0'"),
        ("x" * 300_000 + ",1", r"votes\.csv:2: 'x+… is no picture of this run"),
    ],
)
def test_bad_votes_are_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        calibrate(folder, votes(folder, text), 0.9)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    assert not (folder / "gates.json").exists()


def test_votes_that_are_a_byte_order_mark_alone_are_refused(folder: Path) -> None:
    (folder / "votes.csv").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(InputError, match=r"votes\.csv:1: needs one column 'image'"):
        calibrate(folder, folder / "votes.csv", 0.9)


def test_hostile_labels_are_text_and_the_gate_still_means_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = "\x1b[2J\u202e<b>\x9b"
    scores = {key: {"clip": n / 100, "p": {label: n / 100}} for n, key in enumerate(sorted(GOOD))}
    folder = judged_run(tmp_path / "run", lambda n, k: scores[n, k], rows=20, labels=[label, "other"])
    arguments = ["calibrate", str(folder), "--labels", str(votes(folder)), "--precision", "0.5", "--name", "odd"]
    printed = []
    for more in ([], ["--json"], ["--quiet"]):
        assert command([*arguments, "--where", f"p['{label}'] > 0.2", *more]) == 0
        printed.append(capsys.readouterr().out)
        assert "".join(printed[-1].splitlines()).isprintable()
    passed = json.loads(printed[1])["passed"]
    for where in ("@odd", printed[2].strip()):
        assert command(["filter", str(folder), "--where", where, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kept"] == passed
    assert command([*arguments, "--where", "@odd", "--score", "clip", "--json"]) == 0, "a gate can be named here, too"
    assert json.loads(capsys.readouterr().out)["passed"] <= passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": 1.5}, "--precision: 1.5"),
        ({"precision": 0.9, "score": "clipp"}, r"--score: .*did you mean 'clip'"),
        ({"precision": 0.9, "score": "clip > 0.5"}, "--score: "),
        ({"precision": 0.9, "score": "aesthetic"}, "no picture of this run has that score"),
        ({"precision": 0.9, "score": "sharpness"}, "too many labelled pictures have the same value"),
        ({"precision": 0.9, "score": "-clip"}, r"try -\(-clip\)"),
        ({"precision": 0.9, "where": "clip"}, "--where: "),
        ({"precision": 0.9, "name": "a b"}, "--name: 'a b'"),
    ],
)
def test_bad_arguments_are_named(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(folder, votes(folder), **arguments)


def test_unknown_gate_is_an_error_with_the_nearest(folder: Path) -> None:
    calibrate(folder, votes(folder), 0.9)
    with pytest.raises(InputError, match="did you mean 'calibrated'"):
        named_gate(folder, "@calibratd")
