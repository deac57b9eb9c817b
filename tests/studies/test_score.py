"""`genkit classify` and `genkit score`: right tables, one picture in memory at a time, and hostile names as text."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from genkit import InputError, cli
from genkit.scoring.panel import Panel
from genkit.selection.intervals import wilson
from genkit.studies import score as judge
from genkit.studies.accuracy import Confusion


class Brightness:
    """A stand-in for a CLIP model of width 2: an embedding says how bright a picture is, and whether a text is."""

    logit_scale = 10.0
    logit_bias = None

    def __init__(self) -> None:
        self.batches: list[int] = []

    def preprocess(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().mean(dim=(1, 2, 3), keepdim=True) / 255

    def embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixels))
        angle = pixels.flatten() * torch.pi / 2
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    def embed_texts(self, labels: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0] if "dark" in label else [0.0, 1.0] for label in labels])

    directions = embed_texts


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Brightness:
    clip = Brightness()
    monkeypatch.setattr(judge, "_panel", lambda *_: Panel(clip, ["x"]))  # type: ignore[arg-type]
    return clip


def picture(path: Path, level: int, size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Of 5 dark pictures one is bright, of 3 bright ones none is dark; one lies beside the folders, one is torn."""
    for k in range(5):
        picture(tmp_path / "in" / "very_dark" / f"{k}.png", 240 if k == 0 else 9)
    for k in range(3):
        picture(tmp_path / "in" / "light" / "deeper" / f"{k}.png", 250)
    picture(tmp_path / "in" / "loose.png", 250)
    (tmp_path / "in" / "light" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    return tmp_path / "in"


def test_a_folder_for_each_label_gives_a_confusion_table(
    folders: Path, stub: Brightness, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["classify", str(folders)]) == 1, "one could not be read"
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[-4:] == [
        "true       light  very_dark  right",
        "light          3          0   100%",
        "very_dark      1          4    80%",
        "accuracy 87.5% (7 of 8; 95 % interval 52.9% to 97.8%)",
    ]
    assert len(lines) == 9 + 4 and "torn.png" in err
    assert err.splitlines()[-1] == "light: 5  very_dark: 4  (failed): 1"


def test_the_same_as_json(folders: Path, stub: Brightness, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (folders / "light" / "torn.png").unlink()
    assert cli.run(["classify", str(folders), "--json"]) == 0
    *each, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert total.pop("interval") == pytest.approx([0.5291, 0.9776], abs=1e-4)
    assert total == {
        "accuracy": 0.875, "right": 7, "of": 8,
        "confusion": {"light": {"light": 3}, "very_dark": {"light": 1, "very_dark": 4}},
    }  # fmt: skip
    assert [line.get("folder") for line in each] == ["light"] * 3 + [None] + ["very_dark"] * 5
    assert sum(line["label"] == line.get("folder") for line in each) == 7
    assert cli.run(["classify", str(folders), "-o", str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().out.endswith("52.9% to 97.8%)\n"), "the table, when the lines go to a file"
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 10


def test_labels_beside_the_folders(folders: Path, stub: Brightness, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "light" / "torn.png").unlink()
    assert cli.run(["classify", str(folders), "--labels", "very dark,something else", "--json"]) == 0
    out, err = capsys.readouterr()
    total = json.loads(out.splitlines()[-1])
    assert total["confusion"] == {"very dark": {"very dark": 4, "something else": 1}}, "light is none of the labels"
    assert "in no label's folder, and not counted: 'light' (3)\n" in err
    assert cli.run(["classify", str(folders), "--labels", "Light,Dark"]) == 0
    assert "not counted: 'very_dark' (5), 'light' (3) (did you mean 'Light'?)\n" in capsys.readouterr().err
    assert cli.run(["classify", str(folders), "--labels", "dark,bright", "--json"]) == 0
    assert "accuracy" not in capsys.readouterr().out, "no folder is called that"
    assert cli.run(["classify", str(folders / "light"), "--json"]) == 2
    assert "has 1 subfolders with pictures" in capsys.readouterr().err


def test_where_nothing_can_be_written_is_said_before_the_work(
    folders: Path, stub: Brightness, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["classify"], ["score", "--prompt", "x"]):
        for out, problem in ((folders, "is a folder; name a file"), (folders / "no" / "x", "is no folder")):
            assert cli.run([*command, str(folders), "-o", str(out)]) == 2
            out_, err = capsys.readouterr()
            assert out_ == "" and err.startswith("genkit: --out: ") and problem in err and err.count("\n") == 1


def test_one_picture_is_in_memory_at_a_time(
    tmp_path: Path, stub: Brightness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(300):
        picture(tmp_path / "dark" / f"{k}.png", k % 256)
    picture(tmp_path / "light" / "0.png", 255)
    held: list[weakref.ref[Any]] = []
    most = 0
    whole = judge.read_image

    def counted(path: str | Path) -> Any:
        nonlocal most
        found = whole(path)
        held[:] = [picture for picture in (*held, weakref.ref(found)) if picture() is not None]
        most = max(most, len(held))
        return found

    monkeypatch.setattr(judge, "read_image", counted)
    gc.disable()  # none may wait for the collector
    try:
        assert cli.run(["classify", str(tmp_path)]) == 0
    finally:
        gc.enable()
    assert most <= 2 and not any(p() for p in held), "the one that is read, and the one before it"
    assert max(stub.batches) == judge.BATCH and sum(stub.batches) == 301


def test_many_labels_are_listed_line_by_line(
    tmp_path: Path, stub: Brightness, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(12):
        picture(tmp_path / f"dark {k:02d}" / "a.png", 0)
    assert cli.run(["classify", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[12].startswith("true ") and lines[12].endswith("most often taken for")
    assert lines[14] == "dark 01       1     0%  dark 00 1"
    assert lines[-1].startswith("accuracy 8.3% (1 of 12;")


HOSTILE = "dark\x1b]0;owned\x07\x1b[31m <script>\x9b2J"


def test_hostile_names_are_shown_as_text(tmp_path: Path, stub: Brightness, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / HOSTILE / "a\x1b[2J.png", 0)
    picture(tmp_path / "=cmd|' /C calc'!A0" / "b.png", 255)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "torn\x1b[31m.png").write_bytes(b"\x89PNG\r\n\x1a\n no")
    for more in ([], ["--json"], ["--labels", f"{HOSTILE},light"], ["-o", str(tmp_path / "out.jsonl")]):
        cli.run(["classify", str(tmp_path), *more])
        out, err = capsys.readouterr()
        written = (tmp_path / "out.jsonl").read_text() if more[:1] == ["-o"] else ""
        for text in (out, err, written):
            assert all(c.isprintable() or c == "\n" for c in text), ascii(text)
        if "--json" in more:
            labels = [json.loads(line).get("label") for line in out.splitlines()]
            assert HOSTILE in labels, "and the data are what they were"
        else:
            assert "\\x1b]0;owned" in err
    cli.run(["score", str(tmp_path), "--prompt", HOSTILE, "--labels", "a,b"])
    assert all(c.isprintable() or c == "\n" for text in capsys.readouterr() for c in text)


def test_a_folder_whose_name_is_no_text(tmp_path: Path, stub: Brightness, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/dark\xff")
    except OSError:
        pytest.skip("this file system takes text only")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", os.fsencode(tmp_path) + b"/dark\xff/x.png")
    picture(tmp_path / "light" / "a.png", 255)
    for more in ([], ["--json"]):
        assert cli.run(["classify", str(tmp_path), *more]) == 0, capsys.readouterr().err
        capsys.readouterr().out.encode()


def test_the_interval_is_wilsons() -> None:
    for right, of in [(0, 5), (5, 5), (7, 8), (30, 200), (999, 1000)]:
        expected = binomtest(right, of).proportion_ci(0.95, method="wilson")
        assert wilson(right, of) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)
    assert Confusion(["a", "b"]).summary()["accuracy"] is None


def test_labels_that_read_the_same_are_refused(folders: Path) -> None:
    with pytest.raises(InputError, match="are the same to CLIP: give one of them"):
        judge.classify_images(folders, "a_b,a b", None, "emoji-clip", "cpu", "auto", False)
