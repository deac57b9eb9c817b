"""`genkit interrogate`: sensible words for the embedded model's pictures, own lists, and pictures drawn like them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import genkit
from genkit import ClipScorer, InputError, TextToImage, cli
from genkit.scoring.lists import EMOJI, GENERAL, joined, read_lists
from tests.tiny import tiny_siglip

PROMPTS = {
    "fox": "a red fox", "lemon": "a lemon on a purple background", "heart": "a pink heart", "taxi": "a yellow taxi",
    "whale": "a blue whale", "apple": "a green apple on a yellow background",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    gen = TextToImage.from_pretrained("emoji", device="cpu")
    for name, prompt in PROMPTS.items():
        gen(prompt, seed=3).images[0].save(folder / f"{name}.png")
    return folder


@pytest.mark.slow
def test_the_embedded_models_pictures_are_called_what_they_are(drawn: Path) -> None:
    found = {Path(one.file).stem: one for one in genkit.interrogate(drawn)}
    assert found.keys() == PROMPTS.keys()
    right = [name for name, one in found.items() if name in one.caption]
    assert len(right) >= 5, {name: one.caption for name, one in found.items()}
    assert "on a purple background" in found["lemon"].caption and "pink" in found["heart"].caption
    scorer = ClipScorer.from_pretrained("emoji-clip", device="cpu")
    for one in found.values():
        picture = Image.open(one.file)
        assert scorer.score([picture], one.caption)[0] == pytest.approx(one.score, abs=1e-3)
        assert list(one.phrases) == ["subject", "colours", "style", "background"]
        assert one.score >= one.phrases["subject"][0][1] - 1e-3, "a caption says no less than its subject"
        for phrases in one.phrases.values():
            assert [score for _, score in phrases] == sorted((score for _, score in phrases), reverse=True)
            assert len(phrases) == 3


def test_lines_and_json_say_the_same(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(drawn / "fox.png"), str(drawn / "heart.png")]
    assert cli.run(["interrogate", *files]) == 0
    text = capsys.readouterr().out.splitlines()
    assert cli.run(["interrogate", *files, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == files == [line for line in text if line in files]
    assert f"  {lines[0]['caption']}  ({lines[0]['score']:.3f})" in text


def test_lists_of_ones_own(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "animal.txt").write_text("# mine\ndog face\n\nfox\nfox\npenguin\n")
    (lists / "what.txt").write_text("red {}\nblue {}\n")
    assert cli.run(["interrogate", str(drawn / "fox.png"), "--lists", str(lists), "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["caption"] == "red fox" and list(line["phrases"]) == ["animal", "what"]
    assert len(line["phrases"]["animal"]) == 3


def test_any_scorer_with_the_general_lists(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = tiny_siglip(tmp_path / "siglip")
    assert cli.run(["interrogate", str(drawn / "fox.png"), "--clip", str(clip), "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    names = ["subject", "colours", "medium", "style", "composition", "lighting"]
    assert list(line["phrases"]) == names and line["caption"]


def test_shipped_lists_are_sound() -> None:
    for folder in (GENERAL, EMOJI):
        lists = read_lists(folder)
        assert next(iter(lists)) == "subject" and len(lists["subject"]) > 200
    assert all(60 <= len(phrases) <= 220 for phrases in read_lists(GENERAL).values())


def test_articles() -> None:
    assert joined("owl", "a {}") == "an owl" and joined("fox", "a flat emoji of a {}") == "a flat emoji of a fox"
    assert joined("owl", "a flat emoji of a {}") == "a flat emoji of an owl"
    assert joined("", "a cat") == "a cat" and joined("a cat", "at night") == "a cat, at night"


@pytest.mark.slow
def test_pictures_like_these_are_drawn_and_gone_on_with(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = tmp_path / "in", tmp_path / "run"
    folder.mkdir()
    shutil.copy(drawn / "heart.png", folder)
    command = ["interrogate", str(folder), "--generate", "2", "-o", str(run), "--json"]
    assert cli.run(command) == 0
    caption = json.loads(capsys.readouterr().out)["caption"]
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["status"]) for r in records] == [(caption, "done")] * 2
    pictures = {path.name: path.read_bytes() for path in (run / "images").iterdir()}
    shutil.copy(drawn / "fox.png", folder / "a fox.png")
    assert cli.run(command) == 0
    again = {path.name: path.read_bytes() for path in (run / "images").iterdir()}
    assert len(again) == 4 and pictures.items() <= again.items(), "of another picture two more; nothing is redrawn"


def test_a_torn_picture_in_a_folder_is_named(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(drawn / "fox.png", tmp_path / "in: fox.png")
    (tmp_path / "torn: b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert cli.run(["interrogate", str(tmp_path), "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {Path(line["file"]).name: "error" in line for line in lines} == {"torn: b.png": True, "in: fox.png": False}


REFUSED: dict[str, tuple[list[str], str]] = {
    "nowhere": (["nowhere.png"], "pictures: nowhere.png: is absent"),
    "empty folder": (["empty"], "empty: holds no PNG"),
    "no lists": (["fox.png", "--lists", "empty"], "--lists: empty holds no .txt file"),
    "lists nowhere": (["fox.png", "--lists", "no"], "--lists: no is no folder"),
    "empty list": (["fox.png", "--lists", "blank"], "--lists: blank/a.txt: has 0 phrases"),
    "two slots": (["fox.png", "--lists", "slots"], "--lists: slots/b.txt:2: '{} and {}' has {} twice"),
    "slot at first": (["fox.png", "--lists", "first"], "--lists: first/a.txt: 'a {}' has {}, and is what captions"),
    "no CLIP": (["fox.png", "--clip", "emoji"], "--clip: emoji is a model of kind text-to-image"),
    "generate alone": (["fox.png", "--generate", "2"], "--generate, --out: the one needs the other"),
    "out alone": (["fox.png", "-o", "x"], "--generate, --out: the one needs the other"),
    "generate 0": (["fox.png", "--generate", "0", "-o", "x"], "num_images: "),
    "model": (["fox.png", "--generate", "1", "-o", "x", "--model", "emoji-clip"], "--model: emoji-clip draws no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("fox.png")
    files: dict[str, Any] = {
        "blank/a.txt": "# x\n",
        "slots/a.txt": "x",
        "slots/b.txt": "a {}\n{} and {}",
        "first/a.txt": "a {}",
    }
    for name in ("empty", "blank", "slots", "first"):
        Path(name).mkdir()
    for name, text in files.items():
        Path(name).write_text(text)
    arguments, message = REFUSED[case]
    assert cli.run(["interrogate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.match(f"genkit: {re.escape(message)}", err), err
    assert not Path("x").exists()


def test_python_finds_out_at_once() -> None:
    with pytest.raises(InputError, match="pictures: none are given"):
        genkit.interrogate([])
