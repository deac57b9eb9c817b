"""`genkit search`: exact, of runs and of folders, and its index survives whatever happens to files and processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import genkit
from genkit import ClipScorer, InputError, cli
from genkit.components import inspect_model, weight_hashes
from genkit.durable import lock_folder
from genkit.runs.embeddings import EMBEDDINGS, read_embeddings
from genkit.selection import index
from genkit.selection.index import FILES, folder_index, index_folder, top
from tests.tiny import tiny_clip, tiny_siglip

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer.from_pretrained("emoji-clip", device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (name, colour) in enumerate({"red": "red", "blue": "blue", "green": "green", "pink": "pink"}.items()):
        path = tmp_path / "in" / ("deeper" if number % 2 else "") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30 + number), colour).save(path)
    (tmp_path / "in" / "red.txt").write_text("a wall,\npainted red\n")
    return tmp_path / "in"


def indexed(folder: Path, scorer: ClipScorer, files: list[Path] | None = None) -> index.Indexed:
    info = inspect_model("emoji-clip")
    found = sorted(folder.rglob("*.png")) if files is None else files
    return folder_index(folder, found, weight_hashes(info), info.embedding_width, scorer, quiet=True)


@pytest.mark.parametrize("width", [64, 130])
def test_it_finds_what_float64_finds(width: int) -> None:
    random = np.random.default_rng(0)
    plain = random.standard_normal((3000, width))
    plain[1000:2000] = plain[0] + 0.05 * random.standard_normal((1000, width))  # many within the rounding of halves
    records = np.zeros(3000, [("before", "S100"), ("number", "<u4"), ("vector", "<f2", (width,))])
    records["vector"] = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    vectors, query = records["vector"], plain[0] / np.linalg.norm(plain[0])
    rows = random.permutation(3000)[:2500]
    exact = vectors[rows].astype(np.float64)
    exact = exact @ query / np.linalg.norm(exact, axis=1)
    for k in (1, 20, 2500, 9999):
        found = top(vectors, rows, query, k)
        order = np.argsort(-exact, kind="stable")[:k]
        assert [at for at, _ in found] == order.tolist() and len(found) == min(k, 2500)
        assert np.allclose([score for _, score in found], exact[order])


def test_a_folder_is_searched_by_texts_and_pictures(
    folder: Path, tmp_path: Path, scorer: ClipScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", str(folder), "--text", "red", "-k", "20", "--json"]
    assert cli.run(command) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err.endswith("4 of 4 pictures, by emoji-clip, 4 of them embedded now\n"), "fewer than -k is no error"
    text = scorer.embed_texts(["red"])[0].numpy()
    for line in found["results"]:
        image = scorer.embed_images([Image.open(line["file"])])[0].numpy()
        assert line["score"] == pytest.approx(float(image @ text), abs=1e-3)
    scores = [line["score"] for line in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert {Path(r["file"]).name: r["caption"] for r in found["results"]}["red.png"] == "a wall, painted red"
    shutil.copy(folder / "deeper" / "blue.png", tmp_path / "blue.png")
    assert cli.run(["search", str(folder), "--image", str(tmp_path / "blue.png"), "-k", "1"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"(1\.0000|0\.999\d)  .*/deeper/blue\.png\n", out) and "embedded now" not in err


def test_means_and_what_is_taken_away(folder: Path, scorer: ClipScorer) -> None:
    found = genkit.search(folder, ["red", "a wall"], Image.new("RGB", (9, 9), "red"), without=["blue"], k=4)
    plus = np.stack([*scorer.embed_texts(["red", "a wall"]).numpy(), scorer.embed_images(
        [Image.new("RGB", (9, 9), "red")]).numpy()[0]]).mean(axis=0)  # fmt: skip
    query = plus - scorer.embed_texts(["blue"]).numpy()[0]
    query /= np.linalg.norm(query)
    for line in found.results:
        image = scorer.embed_images([Image.open(line["file"])])[0].numpy()
        assert line["score"] == pytest.approx(float(image @ query), abs=1e-3)
    assert found.query == {"text": ["red", "a wall"], "image": ["(a picture)"], "not": ["blue"]}
    with pytest.raises(InputError, match="--not: takes away all"):
        genkit.search(folder, "red", without="red")


def test_only_what_is_new_is_embedded(folder: Path, scorer: ClipScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert indexed(folder, scorer).new == 4
    reads: list[str] = []
    real = index.picture_bytes

    def counted(path: Path) -> bytes:
        reads.append(path.name)
        return real(path)

    monkeypatch.setattr(index, "picture_bytes", counted)
    assert indexed(folder, scorer).new == 0 and not reads, "what did not change is not even read"
    (folder / "deeper" / "pink.png").rename(folder / "rose.png")
    shutil.copy(folder / "red.png", folder / "red again.png")
    assert indexed(folder, scorer).new == 0 and sorted(reads) == ["red again.png", "rose.png"], "moved, copied"
    Image.new("RGB", (40, 30), "yellow").save(folder / "red.png")
    (folder / "green.png").unlink()
    found = indexed(folder, scorer)
    assert found.new == 1 and [f.name for f in found.files] == ["blue.png", "red again.png", "red.png", "rose.png"]
    for file, row in zip(found.files, found.rows, strict=True):
        expected = scorer.embed_images([Image.open(file)])[0].numpy()
        assert np.allclose(found.vectors[row].astype(np.float32), expected, atol=2e-3), file


@pytest.mark.parametrize("torn", ["half a vector", "half a line", "both", "no lines", "zeros"])
def test_a_torn_index_is_mended(folder: Path, scorer: ClipScorer, torn: str) -> None:
    before = indexed(folder, scorer)
    expected = {f: before.vectors[row].tolist() for f, row in zip(before.files, before.rows, strict=True)}
    home = index_folder(folder, weight_hashes(inspect_model("emoji-clip")))
    size = (home / EMBEDDINGS).stat().st_size
    if torn in ("half a vector", "both"):
        os.truncate(home / EMBEDDINGS, size - 100)
    if torn == "zeros":
        with open(home / EMBEDDINGS, "r+b") as file:
            file.seek(size - 200)
            file.write(bytes(200))
    if torn in ("half a line", "both"):
        os.truncate(home / FILES, (home / FILES).stat().st_size - 30)
    if torn == "no lines":
        (home / FILES).unlink()
    after = indexed(folder, scorer)
    assert after.new == (1 if torn in ("half a vector", "both", "zeros") else 0)
    found = {f: after.vectors[row].tolist() for f, row in zip(after.files, after.rows, strict=True)}
    assert found.keys() == expected.keys()
    assert all(np.allclose(found[f], expected[f], atol=2e-3) for f in found)
    assert indexed(folder, scorer).new == 0


@pytest.mark.slow
def test_it_goes_on_after_kill_9(tmp_path: Path, cache: Path, scorer: ClipScorer) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(320):
        Image.new("RGB", (24, 24), (number % 256, number // 256, 50)).save(folder / f"{number}.png")
    command = [sys.executable, "-m", "genkit", "search", str(folder), "--text", "red", "-k", "1"]
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    home = index_folder(folder, weight_hashes(inspect_model("emoji-clip")))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and child.poll() is None:
        if (home / FILES).is_file() and (home / FILES).stat().st_size > 2000:
            break
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    files = sorted(folder.iterdir())
    after = indexed(folder, scorer, files)
    assert len(after.files) == 320 and after.new < 320, "what was embedded stays"
    assert np.isfinite(after.vectors[after.rows].astype(np.float32)).all()
    assert indexed(folder, scorer, files).new == 0


def test_another_process_writes_the_index(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = index_folder(folder, weight_hashes(inspect_model("emoji-clip")))
    home.mkdir(parents=True)
    lock = lock_folder(home)
    assert cli.run(["search", str(folder), "--text", "red"]) == 3
    assert "in use by another genkit" in capsys.readouterr().err
    os.close(lock)


def test_torn_pictures_are_named_and_the_rest_is_searched(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "torn.png").write_bytes((folder / "red.png").read_bytes()[:60])
    for _ in range(2):
        assert cli.run(["search", str(folder), "--text", "red"]) == 1
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 4 and len(re.findall(r"torn\.png: ", err)) == 1
    (folder / "torn").mkdir()
    (folder / "torn.png").rename(folder / "torn" / "torn.png")
    assert cli.run(["search", str(folder / "torn"), "--text", "red"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "0 of 0 pictures" in err


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    prompts = out.parent / "p.txt"
    prompts.write_text("\n".join(f"a {name} heart" for name in ("red", "blue", "green")))
    assert cli.run(["generate", str(prompts), "-o", str(out), "--steps", "2"]) == 0
    return out


def test_a_run_is_searched_by_what_it_stored(
    drawn: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(drawn, tmp_path / "run")
    capsys.readouterr()
    assert cli.run(["search", str(run), "--text", "a heart"]) == 0
    out, err = capsys.readouterr()
    assert "embedded now" not in err and not (cache / "genkit" / "search").exists()
    _, vectors = read_embeddings(run)
    assert len(out.splitlines()) == len(vectors) == 3 and out.count("heart\n") == 3, "captions are prompts"
    os.truncate(run / EMBEDDINGS, (run / EMBEDDINGS).stat().st_size - 100)
    assert cli.run(["search", str(run), "--text", "a heart"]) == 0
    again, err = capsys.readouterr()
    assert "1 of them embedded now" in err and again == out
    assert len(read_embeddings(run)[0]) == 3, "and stored with the run"
    lock = lock_folder(run)
    os.truncate(run / EMBEDDINGS, (run / EMBEDDINGS).stat().st_size - 100)
    assert cli.run(["search", str(run), "--text", "a heart"]) == 0
    assert capsys.readouterr().out == out, "of a run that is being drawn, too"
    os.close(lock)


def test_another_model_than_the_runs(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (drawn / EMBEDDINGS).read_bytes()
    for make in (tiny_clip, tiny_siglip):
        other = make(tmp_path / make.__name__)
        assert cli.run(["search", str(drawn), "--text", "a heart", "--clip", str(other), "-k", "2"]) == 0
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 2 and "heart" in out
        assert "was scored with emoji-clip: its pictures are embedded by" in err and "3 of them embedded now" in err
    assert (drawn / EMBEDDINGS).read_bytes() == before


def test_a_long_text_is_said_to_be_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["search", str(folder), "--text", "red " * 200]) == 0
    assert re.search(r"is longer than the \d+ tokens that emoji-clip reads", capsys.readouterr().err)


def test_the_page_has_pictures_and_escapes(folder: Path, tmp_path: Path) -> None:
    (folder / "red.txt").write_text("<script>alert(1)</script>")
    page = tmp_path / "found.html"
    assert cli.run(["search", str(folder), "--text", "<b>red", "--page", str(page)]) == 0
    text = page.read_text()
    assert text.count("<figure>") == 4 and text.count("data:image/webp;base64,") == 4
    assert "<script>" not in text and "&lt;script&gt;alert" in text and "&lt;b&gt;red" in text
    assert "img-src data:" in text and "style-src 'sha256-" in text


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing asked": ([], "--text, --image: nothing to search for"),
    "empty text": (["--text", " "], "--text: ' ' is empty"),
    "empty not": (["--text", "a", "--not", ""], "--not: '' is empty"),
    "k 0": (["--text", "a", "-k", "0"], "-k: 0 is not a number from 1 to 1000"),
    "no picture": (["--image", "nowhere.png"], "--image: nowhere.png: "),
    "no CLIP": (["--text", "a", "--clip", "emoji"], "--clip: emoji is a model of kind text-to-image"),
    "page": (["--text", "a", "--page", "x.txt"], "--page: 'x.txt' is not a file that ends in .html"),
    "page nowhere": (["--text", "a", "--page", "no/where/x.html"], "--page: 'no/where' is no folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_one_line(folder: Path, case: str, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    arguments, message = REFUSED[case]
    assert cli.run(["search", str(folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"genkit: {message}"), err
    assert not cache.exists()


def test_folders_that_hold_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_bytes(b"x")
    cases: dict[str, Any] = {"empty": "holds no PNG", "nowhere": "is no folder", "file.png": "is no folder"}
    for name, problem in cases.items():
        assert cli.run(["search", str(tmp_path / name), "--text", "a"]) == 2
        assert problem in capsys.readouterr().err
