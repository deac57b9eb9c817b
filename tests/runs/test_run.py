"""A run folder: what it keeps, what it takes up again, what it redoes, and where it refuses to be."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genkit.durable import disk, json_line, write_whole
from genkit.errors import HostError, InputError
from genkit.rows.request import Request
from genkit.runs import outdated as stock
from genkit.runs import recorder
from genkit.runs.destination import check_folder, free_name
from genkit.runs.records import read_config, read_results, read_rows
from genkit.runs.run import Run
from tests.check_run import check, grown, lines_of, newest, outcome
from tests.null_run import CONFIG, draw, png, result_of, rows_of


def opened(folder: Path, rows: list[Request], config: dict[str, Any] = CONFIG) -> Run:
    """Open and close: what is found is what stays in the object."""
    with Run.open(folder, config, rows) as run:
        return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run of four rows of two images."""
    draw(tmp_path / "run", rows_of(4, 2))
    return tmp_path / "run"


def test_a_finished_run_is_whole_and_is_not_done_again(folder: Path) -> None:
    assert check(folder) == []
    assert (folder / "images/r3-01.png").is_file()
    before = (folder / "results.jsonl").read_bytes()
    run = opened(folder, rows_of(4, 2))
    assert run.notes == []
    assert set(run.done) == {(f"r{n}", k) for n in range(4) for k in range(2)}
    assert run.done["r1", 1].file == "images/r1-01.png"
    assert run.done["r1", 1].seed == 1001
    assert (folder / "results.jsonl").read_bytes() == before


def test_a_model_may_lie_in_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    config["binding"]["model"] = {"name": "m", "folder": os.fsdecode(b"/models/m\xff"), "weights": {}}
    opened(tmp_path / "run", rows_of(1, 1), config)
    assert read_config(tmp_path / "run") == config


def test_the_files_can_be_read_back(folder: Path) -> None:
    assert read_config(folder) == CONFIG
    assert read_rows(folder) == rows_of(4, 2)
    assert [(r.id, r.index) for r in read_results(folder)] == [(f"r{n}", k) for n in range(4) for k in range(2)]


# -- what a crash or a hand did to the folder --


@pytest.mark.parametrize("cut", [1, 2, 3, 10, 50, 150])
def test_a_torn_last_line_is_cut_off_and_its_image_drawn_again(cut: int, folder: Path) -> None:
    wanted, journal = outcome(folder), folder / "results.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-cut])
    assert draw(folder, rows_of(4, 2)) == [("r3", 1)]
    assert check(folder) == []
    assert outcome(folder) == wanted
    assert grown(whole[:-cut], journal.read_bytes())


def swap(path: Path) -> None:
    other = path.with_name("r2-00.png")
    mine, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(mine)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.png")
    path.symlink_to("../elsewhere.png")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "has 0 bytes"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "bytes, and had"),
    "zero tail": (lambda p: p.write_bytes(p.read_bytes()[:-40] + bytes(40)), "another content"),
    "flipped bit": (flip, "another content"),
    "swapped": (swap, "another content"),
    "missing": (lambda p: p.unlink(), "missing"),
    "folder": (to_folder, "no file of its own"),
    "link": (to_link, "no file of its own"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_image_is_announced_and_drawn_again(kind: str, folder: Path) -> None:
    wanted = outcome(folder)
    damage, text = DAMAGE[kind]
    damage(folder / "images/r1-00.png")
    notes = opened(folder, rows_of(4, 2)).notes
    assert any("row r1, image 0" in note and text in note for note in notes)
    assert ("r1", 0) in draw(folder, rows_of(4, 2))
    assert check(folder) == []
    assert outcome(folder) == wanted
    assert opened(folder, rows_of(4, 2)).notes == []


def test_beyond_the_limit_only_the_newest_images_are_hashed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest_two = sum(r.bytes or 0 for r in read_results(folder)[-2:])
    monkeypatch.setattr(stock, "HASHED", newest_two)
    flip(folder / "images/r3-01.png")
    run = opened(folder, rows_of(4, 2))
    assert ("r3", 1) not in run.done
    assert "checked the size of 8 images and the SHA-256 of the newest 2" in run.notes


@pytest.mark.parametrize("line", [b"\x00" * 90, b"not json", b"[1]", b"{}", b'{"id": 3, "index": 0, "seed": 1}'])
def test_a_damaged_line_is_passed_over_and_its_image_drawn_again(line: bytes, folder: Path) -> None:
    wanted, journal = outcome(folder), folder / "results.jsonl"
    lines = journal.read_bytes().split(b"\n")
    lines[2] = line
    journal.write_bytes(b"\n".join(lines))
    with Run.open(folder, CONFIG, rows_of(4, 2)) as run:
        assert "results.jsonl:3: damaged; its image is drawn again" in run.notes
    assert draw(folder, rows_of(4, 2)) == [("r1", 0)]
    assert outcome(folder) == wanted
    assert lines[2] in journal.read_bytes()


@pytest.mark.parametrize("file", ["../../secret.png", "/etc/passwd", "images/../../x", "images", 7, None])
def test_a_record_cannot_name_a_file_outside(file: Any, folder: Path) -> None:
    record = {**lines_of(folder / "results.jsonl")[0], "file": file}
    with open(folder / "results.jsonl", "a") as journal:
        journal.write(json.dumps(record) + "\n")
    assert all(str(r.file).startswith("images/r") for r in read_results(folder))
    assert opened(folder, rows_of(4, 2)).done["r0", 0].file == "images/r0-00.png"


def test_leftovers_of_a_crash_go_and_a_users_own_files_stay(folder: Path) -> None:
    (folder / ".tmp-selection.json.77.part").write_text("x")
    (folder / "images/.tmp-r0-00.png.77.part").write_text("x")
    (folder / "images/notes.txt").write_text("mine")
    shutil.copy(folder / "images/r0-00.png", folder / "images/r9-00.png")
    run = opened(folder, rows_of(4, 2))
    assert run.notes == ["images/r9-00.png: finished but not recorded; now replaced/r9-00.1.png"]
    assert not list(folder.rglob(".tmp-*"))
    assert (folder / "images/notes.txt").read_text() == "mine"


def test_a_row_may_have_an_odd_name(tmp_path: Path) -> None:
    rows = [Request(id=".tmp-x.part", prompt="a fox"), Request(id="a..b", prompt="two dots")]
    draw(tmp_path / "run", rows)
    assert draw(tmp_path / "run", rows) == []


# -- changes between two starts --


def test_only_a_changed_row_is_drawn_again_and_its_old_images_stay(folder: Path) -> None:
    rows, kept = rows_of(4, 2), (folder / "images/r2-00.png").stat().st_mtime_ns
    old = (folder / "images/r1-01.png").read_bytes()
    for times, prompt in ((1, "a blue fox"), (2, "a green fox")):
        before = rows[1].prompt
        rows[1] = Request(**{**rows[1].to_json(), "prompt": prompt})
        with Run.open(folder, CONFIG, rows) as run:
            assert len(run.notes) == 1
            assert run.notes[0].startswith(f"row r1: prompt: '{before}' -> '{prompt}'; drawn again")
        assert draw(folder, rows) == [("r1", 0), ("r1", 1)]
        assert check(folder) == []
        assert len(list((folder / "replaced").iterdir())) == 2 * times
    assert old in [p.read_bytes() for p in (folder / "replaced").iterdir()]
    assert newest(folder)["r1", 0]["prompt"] == "a green fox"
    assert (folder / "images/r2-00.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize("change", [{"keep": 1}, {"gate": "clip > 0.2"}, {"meta": {"a": 1}}, {"rank_by": "-clip"}])
def test_a_change_of_what_is_kept_draws_nothing(change: dict[str, Any], folder: Path) -> None:
    rows = [Request(**{**row.to_json(), **change}) for row in rows_of(4, 2)]
    assert draw(folder, rows) == []
    assert read_rows(folder) == rows


def test_new_labels_need_scores_and_so_new_drawing(folder: Path) -> None:
    rows = rows_of(4, 2)
    rows[0] = Request(**{**rows[0].to_json(), "labels": ["a cat", "a dog"]})
    assert draw(folder, rows) == [("r0", 0), ("r0", 1)]
    rows[0] = Request(**{**rows[0].to_json(), "labels": ["a dog", "a cat"]})
    assert draw(folder, rows) == []


def test_more_images_are_added_and_fewer_lose_none(folder: Path) -> None:
    assert draw(folder, rows_of(4, 3)) == [(f"r{n}", 2) for n in range(4)]
    assert draw(folder, rows_of(4, 1)) == []
    assert len(list((folder / "images").iterdir())) == 12


def test_a_row_that_goes_and_comes_back_keeps_its_images(folder: Path) -> None:
    rows = rows_of(4, 2)
    run = opened(folder, rows[1:])
    assert ("r0", 0) not in run.results
    assert (folder / "images/r0-00.png").is_file()
    assert draw(folder, rows) == []


def test_an_input_picture_with_another_content_changes_its_row(tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    Image.new("RGB", (8, 8), "red").save(start)
    rows = [Request(id="a", prompt="a fox", image=str(start)), Request(id="b", prompt="a fox")]
    draw(tmp_path / "run", rows)
    Image.new("RGB", (8, 8), "blue").save(start)
    with Run.open(tmp_path / "run", CONFIG, rows) as run:
        assert run.notes == ["row a: its input changed; drawn again, old images in replaced/"]
        assert set(run.done) == {("b", 0)}


def test_a_long_prompt_and_one_named_like_a_file_are_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox").write_text("one")
    rows = [Request(id="a", prompt="long " * 3000), Request(id="b", prompt="fox")]
    draw(tmp_path / "run", rows)
    (tmp_path / "fox").write_text("two")
    assert draw(tmp_path / "run", rows) == []


def test_a_run_goes_on_with_what_it_was_begun_with(folder: Path) -> None:
    other = json.loads(json.dumps(CONFIG))
    other["binding"] |= {"seed": 7, "model": {"name": "null", "weights": {"unet": "f" * 64}}}
    journal, config = (folder / "results.jsonl").read_bytes(), (folder / "run.json").read_bytes()
    with pytest.raises(InputError) as refused:
        Run.open(folder, other, rows_of(4, 2))
    assert "seed: 0 -> 7" in str(refused.value)
    assert "model.weights.unet: 000000000000… -> ffffffffffff…" in str(refused.value)
    assert "--new-run" in str(refused.value)
    later = {**CONFIG, "info": {"genkit": "99"}}
    assert opened(folder, rows_of(4, 2), later).config == CONFIG
    assert (folder / "run.json").read_bytes() == config
    assert (folder / "results.jsonl").read_bytes() == journal


def test_failed_images_are_tried_again_and_pruned_ones_are_not(tmp_path: Path) -> None:
    rows = rows_of(3, 2, prune={})
    with Run.open(tmp_path / "run", CONFIG, rows) as run:
        run.fail(result_of(rows[0], 0, status="failed", reason="nan", scores={"clip": math.nan, "nan": True}))
        run.fail(result_of(rows[1], 0, status="pruned", reason="rank"))
        run.save(result_of(rows[2], 0), png(rows[2], 0))
        assert set(run.results) == {("r0", 0), ("r1", 0), ("r2", 0)}
    assert "NaN" not in (tmp_path / "run/results.jsonl").read_text()
    assert draw(tmp_path / "run", rows) == [("r0", 0), *((f"r{n}", 1) for n in range(3))]
    assert newest(tmp_path / "run")["r0", 0]["status"] == "done"
    assert draw(tmp_path / "run", rows_of(3, 2)) == [("r1", 0)], "without prune it is drawn after all"


# -- names and lines --


def test_past_a_thousand_rows_images_go_to_subfolders_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "BLOCK", 3)
    draw(tmp_path / "flat", rows_of(3))
    assert (tmp_path / "flat/images/r2-00.png").is_file()
    draw(tmp_path / "run", rows_of(7), threads=3)
    assert (tmp_path / "run/images/000/r2-00.png").is_file()
    assert (tmp_path / "run/images/002/r6-00.png").is_file()
    assert check(tmp_path / "run") == []
    assert draw(tmp_path / "flat", rows_of(7)) == [(f"r{n}", 0) for n in range(3, 7)]
    assert check(tmp_path / "flat") == []
    assert draw(tmp_path / "flat", rows_of(7)) == []


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "selection.json").mkdir()
    with pytest.raises(HostError, match=r"/selection\.json: Is a directory"), disk(tmp_path):
        write_whole(tmp_path / "selection.json", b"{}")


def test_lone_surrogates_are_written_as_escapes() -> None:
    value = {os.fsdecode(b"a\xff.png"): ["\ud800", math.nan]}
    assert json.loads(json_line(value).encode()) == {os.fsdecode(b"a\xff.png"): ["\ud800", None]}


def test_any_prompt_is_one_line(tmp_path: Path) -> None:
    prompt = 'a\u2028b\u2029c\x85d\x1be\nf "g" \U0001f98a \u202e </script>'
    draw(tmp_path / "run", [Request(id="a", prompt=prompt)])
    for name in ("requests.jsonl", "results.jsonl"):
        (line,) = (tmp_path / "run" / name).read_text("utf-8").splitlines()
        assert json.loads(line)["prompt"] == prompt
    assert read_rows(tmp_path / "run")[0].prompt == prompt


def test_an_image_is_saved_once(folder: Path) -> None:
    row = rows_of(4, 2)[0]
    with Run.open(folder, CONFIG, rows_of(4, 2)) as run, pytest.raises(ValueError, match="saved already"):
        run.save(result_of(row, 0), png(row, 0))


def test_pixels_are_not_held(tmp_path: Path) -> None:
    row = rows_of(1)[0]
    with Run.open(tmp_path / "run", CONFIG, [row]) as run:
        result = dataclasses.replace(result_of(row, 0), pixels=[[0]])
        run.save(result, png(row, 0))
        assert run.results["r0", 0].pixels is None
        assert result.sha256 == run.results["r0", 0].sha256


# -- where a run may be --


def test_folders_that_a_run_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/run.json").write_text('{"binding": ')
    cases = {
        "file": "is not a folder",
        "file/run": "is not a folder",
        "foreign": "holds 'thesis.tex' and no run.json",
        "broken": "is not JSON",
        "x" * 256: "is longer than a file name may be",
        "/".join(["long" * 20] * 60): "is longer than a file name may be",
        "spaces ": "has a space at an end",
        "line\nbreak": "a character that no file name should",
        os.fsdecode(b"latin-\xe4"): "a character that no file name should",
    }
    before = sorted(tmp_path.rglob("*"))
    for name, text in cases.items():
        with pytest.raises(InputError) as refused:
            Run.open(tmp_path / name, CONFIG, rows_of(1))
        assert text in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="no place for a run"):
        check_folder(Path("/"))
    with pytest.raises((InputError, HostError)):
        check_folder(tmp_path / "loop/run")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_prompt_files_folder_and_an_unwritable_one_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="is where the prompt file lies"):
        check_folder(tmp_path, tmp_path / "demo.txt")
    check_folder(tmp_path / "run", tmp_path / "demo.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(HostError, match="cannot be written to"):
        check_folder(tmp_path / "run")


def test_what_a_start_killed_before_its_first_write_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("7\n")
    (tmp_path / "run/.tmp-run.json.7.part").write_text("{")
    draw(tmp_path / "run", rows_of(1))
    assert check(tmp_path / "run") == []


def test_a_free_name(tmp_path: Path) -> None:
    assert free_name(tmp_path / "run") == tmp_path / "run"
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    assert free_name(tmp_path / "run") == tmp_path / "run-3"
