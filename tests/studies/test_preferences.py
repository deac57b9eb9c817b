"""The better picture of two runs, chosen without knowing which is whose: what is stored, counted and left out."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genkit.cli import run as command
from genkit.errors import InputError
from genkit.selection.ballots import held
from genkit.selection.intervals import share_interval
from genkit.studies.compare import compare_runs
from genkit.studies.pairs import pair_runs
from genkit.studies.prefer import PairDesk
from genkit.studies.preferences import COLUMNS, PREFERENCES, choices_of, line_of
from tests.judged_run import judged_run
from tests.label_page import Page, serve

HOSTILE = "</script><script>alert(1)</script>\x1b[31m"


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of 6 rows with 2 pictures each, all of which differ; each prompt is that of its row."""
    a, b = (judged_run(tmp_path / name, lambda n, k: {"clip": 0.1}, rows=6, images=2) for name in "ab")
    redraw(b, *(f"r{n}-0{k}" for n in range(6) for k in range(2)))
    config = json.loads((b / "run.json").read_text())
    config["info"]["started"] = "later"  # as any two runs do not begin at once
    (b / "run.json").write_text(json.dumps(config))
    return a, b


def redraw(folder: Path, *names: str, sha256: str = "f") -> None:
    """Record other pictures under these names."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for n, record in enumerate(records):
        if f"{record['id']}-{record['index']:02d}" in names:
            record["sha256"] = f"{sha256}{n:063d}"
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def served() -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []

    def opened(folder: Path, *arguments: str) -> Page:
        pages.append(Page(*serve(folder, *arguments)))
        return pages[-1]

    yield opened
    for page in pages:
        page.process.kill()
        page.process.communicate()


def whose(page: Page, runs: tuple[Path, Path], number: int) -> int:
    """Return 0 for a picture of the first run, 1 for one of the second: they hold different bytes under one name."""
    body = page.ask("GET", f"/{page.token}/image/{number}")[1]
    name = page.state()["pair"]["name"]
    return [(run / "images" / f"{name}.png").read_bytes() for run in runs].index(body)


def choose(page: Page, vote: str) -> Any:
    return page.send({"pair": page.state()["pair"]["number"], "vote": vote})


def chosen(folder: Path) -> list[list[str]]:
    return [line[:2] for line in list(csv.reader((folder / PREFERENCES).open()))[1:]]


def test_the_run_of_the_chosen_picture_is_stored_whichever_side_it_was_on(
    served: Callable[..., Page], runs: tuple[Path, Path]
) -> None:
    a, b = runs
    for picture in (b / "images").iterdir():
        picture.write_bytes(picture.read_bytes() + b"b")
    page = served(a, str(b), "--in-order")
    lefts, wanted = [], []
    for n in range(12):
        pair = page.state()["pair"]
        assert pair["name"] == f"r{n // 2}-0{n % 2}" and pair["prompt"] == f"picture {n // 2}"
        left = whose(page, runs, pair["images"][0])
        assert {left, whose(page, runs, pair["images"][1])} == {0, 1}
        lefts.append(left)
        vote = ("left", "right", "tie")[n % 3]
        wanted.append("tie" if vote == "tie" else ("run", "other")[left if vote == "left" else 1 - left])
        choose(page, vote)
    assert 2 <= sum(lefts) <= 10, "neither run has a side of its own"
    assert [choice for _, choice in chosen(a)] == wanted
    assert page.state()["pair"] is None and not (b / PREFERENCES).exists()


def test_choices_are_gone_on_with_and_taken_back(served: Callable[..., Page], runs: tuple[Path, Path]) -> None:
    a, b = runs
    page = served(a, str(b), "--shuffle", "5")
    first = page.state()["pair"]
    second = choose(page, "left")["pair"]
    assert page.send({"pair": first["number"], "vote": "right"})["pair"] == second, "a key held down is one choice"
    state = page.send({"pair": second["number"], "vote": "later"})
    assert state["left"] == 11 and state["pair"] != second
    choose(page, "tie")
    page.process.kill()
    page.process.wait()
    with open(a / PREFERENCES, "a") as file:
        file.write("images/r0-00.png,run,012")  # a line that a power cut tore
    page = served(a, str(b), "--shuffle", "5")
    again = page.state()
    assert (again["done"], again["left"], again["pair"]["number"]) == (2, 10, second["number"])
    assert page.send({"pair": -1, "vote": "undo"})["pair"]["name"] == state["pair"]["name"]
    other = subprocess.run([sys.executable, "-m", "genkit", "label", str(a), str(b)], capture_output=True, text=True)
    assert other.returncode == 3 and "one at a time" in other.stderr
    page.process.send_signal(signal.SIGINT)
    _, said = page.process.communicate(timeout=120)
    assert page.process.returncode == 130 and "11 of 12 pairs left" in said
    assert re.search(
        rf"by eye, {a} against {b}: [01] won, 0 tied, [01] lost; .* as half \(95 %: 0.0% to 100.0%\)", said
    )


def record(runs: tuple[Path, Path], choices: dict[str, str]) -> None:
    paired = pair_runs(*runs)
    named = {pair.name: pair for pair in paired.pairs}
    with held(runs[0] / PREFERENCES, COLUMNS) as ballots:
        ballots.add([line_of(named[name], paired.two, choice) for name, choice in choices.items()])


def test_wins_ties_and_losses_are_counted_by_prompt(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = runs
    assert compare_runs(a, b)["by_eye"] is None
    record(runs, {"r0-00": "run", "r0-01": "run", "r1-00": "run", "r1-01": "tie", "r2-00": "other", "r3-01": "other"})
    record(runs, {"r3-01": "undo", "r3-00": "run"})
    found = compare_runs(a, b)["by_eye"]
    share, *interval = share_interval([[1, 1], [1, 0.5], [0], [1]])
    assert (found["pairs"], found["a_wins"], found["ties"], found["b_wins"], found["stale"]) == (6, 4, 1, 1, 0)
    assert found["a_share"] == pytest.approx(share) == pytest.approx(0.75)
    assert found["a_interval"] == pytest.approx(interval, abs=1e-5)
    turned = compare_runs(b, a)["by_eye"]
    assert (turned["a_wins"], turned["b_wins"], turned["a_share"]) == (1, 4, pytest.approx(0.25))
    line = "by eye, A against B: 4 won, 1 tied, 1 lost; 75.0% won with ties as half "
    line += f"(95 %: {interval[0]:.1%} to {interval[1]:.1%})"
    assert command(["compare", str(a), str(b)]) == 0
    assert line in capsys.readouterr().out.splitlines()
    compare_runs(a, b)
    assert f'"eye": "{line}"' in (b / "compare.html").read_text()


def test_choices_on_pictures_drawn_again_and_on_other_runs_do_not_count(
    runs: tuple[Path, Path], tmp_path: Path, served: Callable[..., Page]
) -> None:
    a, b = runs
    c = judged_run(tmp_path / "c", lambda n, k: {}, rows=6, images=2)
    record((a, c), {"r0-00": "other"})
    record(runs, {"r0-00": "run", "r0-01": "run", "r1-00": "other"})
    redraw(b, "r0-00", sha256="e")
    redraw(a, "r1-00", sha256="d")
    found = compare_runs(a, b)["by_eye"]
    assert (found["pairs"], found["a_wins"], found["b_wins"], found["stale"]) == (1, 1, 0, 2)
    assert served(a, str(b)).state()["left"] == 11, "pairs that changed are asked about again"
    (tmp_path / "elsewhere").mkdir()
    moved = b.rename(tmp_path / "elsewhere" / "b")
    assert compare_runs(a, moved)["by_eye"] == found, "a run is known wherever it lies"


def test_pairs_of_one_file_are_not_asked_about(runs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = runs
    same = json.loads((a / "results.jsonl").read_text().splitlines()[3])
    records = [json.loads(line) for line in (b / "results.jsonl").read_text().splitlines()]
    records[3]["sha256"] = same["sha256"]
    (b / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(*serve(a, str(b)))
    left = page.state()["left"]
    page.process.kill()
    page.process.communicate()
    assert left == 11
    twin = judged_run(tmp_path / "twin", lambda n, k: {}, rows=6, images=2)
    found = subprocess.run([sys.executable, "-m", "genkit", "label", str(a), str(twin)], capture_output=True, text=True)
    assert found.returncode == 2 and "all 12 pairs are the same file twice" in found.stderr


def test_what_is_no_choice_is_an_error(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs
    paired = pair_runs(a, b)
    with held(a / PREFERENCES, COLUMNS) as ballots:
        desk = PairDesk(paired, paired.pairs, {}, ballots, 0)
        for answer in ({"pair": 0, "vote": "run"}, {"pair": "0", "vote": "left"}, {"vote": "left"}, {"row": 0}):
            with pytest.raises((ValueError, KeyError)):
                desk.take(answer)
    assert chosen(a) == []
    with open(a / PREFERENCES, "a") as file:
        file.write("images/r0-00.png,ties,,,\n")
    with pytest.raises(InputError, match=r"preferences\.csv:2: choice: 'ties' is none of .*did you mean 'tie'"):
        choices_of(paired)
    (a / PREFERENCES).write_text("image,choices,other,sha256,other_sha256\n")
    assert command(["compare", str(a), str(b)]) == 2
    assert "did you mean 'choices'" in capsys.readouterr().err
    for option in (["--where", "clip > 0"], ["--side-by-side"]):
        assert command(["label", str(a), str(b), *option]) == 2
        assert f"{option[0]}: has no effect with a second run" in capsys.readouterr().err


def test_the_page_of_pairs_says_nothing_of_the_runs(served: Callable[..., Page], tmp_path: Path) -> None:
    a, b = (judged_run(tmp_path / name, lambda n, k: {}, rows=1, prompt=HOSTILE) for name in ("mine", "theirs"))
    redraw(b, "r0-00", "r0-01")
    page = served(a, str(b))
    status, body, headers = page.ask("GET", f"/{page.token}/")
    assert status == 200 and b"innerHTML" not in body and b"// from" not in body and b"alert(1)" not in body
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    state = page.state()
    assert state["pair"]["prompt"] == HOSTILE and "mine" not in json.dumps(state) and "theirs" not in json.dumps(state)
    assert page.ask("GET", f"/{page.token}/image/3")[0] == 200
    assert page.ask("GET", f"/{page.token}/image/4")[0] == 404
    assert page.send({"pair": 0, "vote": "yes"}) == 400
