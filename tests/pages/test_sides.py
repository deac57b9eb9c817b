"""Votes on all pictures of a row at once: they are those of single pictures, and a row is finished or asked about."""

from __future__ import annotations

import csv
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genkit.pages.label import PictureDesk
from genkit.pages.sides import RowDesk
from genkit.selection.ballots import held
from genkit.selection.calibrate import read_pictures
from genkit.selection.votes import COLUMNS, VOTES, read_labels
from genkit.studies.filter import refilter
from tests.judged_run import judged_run
from tests.label_page import Page, serve

HOSTILE = "</script><script>alert(1)</script>\x1b[31m" + "x" * 3000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return judged_run(tmp_path / "run", lambda n, k: {"clip": 0.1 * k}, rows=3, images=4, prompt=HOSTILE)


@pytest.fixture
def served(folder: Path) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []

    def opened(*arguments: str) -> Page:
        pages.append(Page(*serve(folder, *arguments)))
        return pages[-1]

    yield opened
    for page in pages:
        stop(page)


def stop(page: Page) -> None:
    page.process.kill()
    page.process.communicate()


def store(page: Page, *good: int) -> Any:
    """Call these of the row's pictures good, by their place in it, and the others bad."""
    row = page.state()["row"]
    numbers = [row["images"][k]["number"] for k in good]
    return page.send({"row": row["number"], "vote": "store", "good": numbers})


def marks(state: Any) -> list[bool]:
    return [image["good"] for image in state["row"]["images"]]


def lines(folder: Path) -> list[list[str]]:
    return [[Path(image).stem, vote] for image, vote, _ in list(csv.reader((folder / VOTES).open()))[1:]]


def test_marked_pictures_are_good_and_the_others_of_the_row_bad(served: Callable[..., Page], folder: Path) -> None:
    page = served("--side-by-side", "--in-order")
    state = page.state()
    assert (state["done"], state["left"], state["undo"], marks(state)) == (0, 3, False, [False] * 4)
    assert state["row"]["name"] == "r0" and state["row"]["prompt"] == HOSTILE[:2000] + "…"
    assert [image["name"] for image in state["row"]["images"]] == [f"r0-0{k}" for k in range(4)]
    state = store(page, 1, 3)
    assert lines(folder) == [["r0-00", "no"], ["r0-01", "yes"], ["r0-02", "no"], ["r0-03", "yes"]]
    assert (state["good"], state["bad"], state["done"], state["left"]) == (2, 2, 1, 2)
    assert page.send({"row": 0, "vote": "store", "good": []}) == state, "a key held down stores a row once"
    state = page.send({"row": 1, "vote": "later", "good": [5]})
    assert state["row"]["name"] == "r2"
    assert store(page)["good"] == 2, "none is marked, all are bad"
    assert marks(page.state()) == [False, True, False, False], "what was marked before is still marked"
    state = page.send({"row": 1, "vote": "undo", "good": [5]})
    assert state["row"]["name"] == "r2" and lines(folder)[-4:] == [[f"r2-0{k}", "undo"] for k in range(4)]
    store(page, 0)
    state = store(page, 1)
    assert state["row"] is None and state["left"] == 0
    found = refilter(folder, votes=folder / VOTES)
    assert found["kept"] == 4


def test_single_pictures_and_rows_go_on_with_each_other(served: Callable[..., Page], folder: Path) -> None:
    single = served("--in-order")
    for number, word in enumerate(("yes", "no", "no")):
        single.vote(number, word)
    stop(single)
    page = served("--side-by-side", "--in-order")
    state = page.state()
    assert (state["done"], marks(state)) == (0, [True, False, False, False])
    store(page, 1, 3)  # another opinion of the first two
    changed = [["r0-00", "undo"], ["r0-01", "undo"], ["r0-00", "no"], ["r0-01", "yes"], ["r0-03", "yes"]]
    assert lines(folder)[3:] == changed, "an unchanged vote is not repeated, and nothing is a draw"
    pictures = read_pictures(folder)[0]
    labels = read_labels(folder / VOTES, None, False, pictures)
    assert labels.good == {"r0-00": False, "r0-01": True, "r0-02": False, "r0-03": True} and labels.tied == 0
    state = page.send({"row": 1, "vote": "undo", "good": []})
    assert marks(state) == [False, True, False, True], "the row comes back as it was marked"
    labels = read_labels(folder / VOTES, None, False, pictures)
    assert labels.good == {"r0-00": True, "r0-01": False, "r0-02": False}, "and its votes are those of before"
    store(page, 0)
    stop(page)
    state = served("--in-order").state()
    assert (state["good"], state["left"], state["image"]["name"]) == (1, 8, "r1-00")


def test_after_a_restart_undo_takes_back_the_row_that_was_stored_last(
    served: Callable[..., Page], folder: Path
) -> None:
    page = served("--side-by-side", "--in-order")
    store(page, 0)
    store(page, 1)
    page.send({"row": 2, "vote": "undo", "good": []})
    page.send({"row": 1, "vote": "undo", "good": []})
    page.send({"row": 0, "vote": "later", "good": []})
    store(page, 2)
    store(page)  # the third row; the first is unfinished
    store(page, 3)
    page.process.send_signal(signal.SIGINT)
    _, said = page.process.communicate(timeout=120)
    assert page.process.returncode == 130 and "12 votes in" in said and "0 rows left" in said
    page = served("--side-by-side")
    assert page.state()["row"] is None
    state = page.send({"row": -1, "vote": "undo", "good": []})
    assert state["row"]["name"] == "r0" and marks(state) == [False, False, False, True]
    assert page.send({"row": -1, "vote": "undo", "good": []})["row"]["name"] == "r2"


def test_a_torn_write_leaves_no_row_finished_that_was_not_stored_whole(folder: Path) -> None:
    """Whatever first part of a row's lines is on the disk, with and without the votes of single pictures before."""
    pictures, path = read_pictures(folder)[0], folder / VOTES
    before = b"image,vote,sha256\n"
    with held(path, COLUMNS) as ballots:
        desk = PictureDesk(folder, pictures, ballots)
        desk.take({"image": 0, "vote": "yes"})
        desk.take({"image": 3, "vote": "no"})
    voted = path.read_bytes()
    for start, good in ((before, [1]), (voted, [1]), (voted, [0]), (voted, [0, 3])):
        path.write_bytes(start)
        with held(path, COLUMNS) as ballots:
            RowDesk(folder, pictures, ballots).take({"row": 0, "vote": "store", "good": good})
        whole = path.read_bytes()
        for size in range(len(start), len(whole)):
            path.write_bytes(whole[:size])
            with held(path, COLUMNS) as ballots:
                state = RowDesk(folder, pictures, ballots).state()
            voted_all = len(whole) - size in (1, 65)  # the line break is lost, or the whole hash before it, too
            assert (state["done"], state["row"]["number"]) == ((1, 1) if voted_all else (0, 0)), size
        labels = read_labels(path, None, False, pictures)  # of all but the last line break
        assert {name for name, yes in labels.good.items() if yes} == {f"r0-0{k}" for k in good}


def test_rows_that_were_answered_are_on_the_disk_after_a_kill(tmp_path: Path) -> None:
    folder = judged_run(tmp_path / "many", lambda n, k: {}, rows=60, images=9)
    page = Page(*serve(folder, "--side-by-side"))
    answered: list[int] = []
    enough = threading.Event()

    def label() -> None:
        try:
            while (row := page.state()["row"]) is not None:
                page.send({"row": row["number"], "vote": "store", "good": [row["images"][2]["number"]]})
                answered.append(row["number"])
                if len(answered) == 10:
                    enough.set()
        except (OSError, ValueError):
            pass  # killed

    thread = threading.Thread(target=label)
    thread.start()
    assert enough.wait(120)
    stop(page)
    thread.join(120)
    again = Page(*serve(folder, "--side-by-side"))
    state = again.state()
    stop(again)
    assert len(answered) <= state["done"] <= len(answered) + 1 and state["good"] == state["done"]
    assert state["good"] + state["bad"] == 9 * state["done"], "no row is half there"


def test_where_shows_rows_with_a_picture_that_passes(served: Callable[..., Page], tmp_path: Path) -> None:
    page = served("--side-by-side", "--where", "clip > 0.15", "--shuffle", "3")
    state = page.state()
    assert state["left"] == 3 and len(state["row"]["images"]) == 2
    state = store(page, 0)
    assert (state["good"], state["bad"], state["done"]) == (1, 1, 1)
    names = [state["row"]["name"]]
    stop(page)
    page = served("--side-by-side", "--shuffle", "3")
    assert marks(page.state()) == [False, False, True, False], "the rest of the row is still to be judged"
    store(page)
    assert page.state()["row"]["name"] == names[0], "the same seed, the same order"


@pytest.mark.parametrize(
    "answer",
    [
        {"row": 0, "vote": "store"},
        {"row": 0, "vote": "store", "good": 1},
        {"row": 0, "vote": "store", "good": [4]},
        {"row": 0, "vote": "store", "good": [True]},
        {"row": 0, "vote": "store", "good": [[0]]},
        {"row": 0, "vote": "later", "good": ["0"]},
        {"row": "0", "vote": "store", "good": []},
        {"row": 0, "vote": "yes", "good": []},
        {"image": 0, "vote": "yes"},
    ],
)
def test_what_is_no_vote_on_a_row_is_refused(folder: Path, answer: Any) -> None:
    with held(folder / VOTES, COLUMNS) as ballots:
        desk = RowDesk(folder, read_pictures(folder)[0], ballots)
        with pytest.raises((ValueError, TypeError, KeyError)):
            desk.take(answer)
    assert lines(folder) == []


def test_the_page_has_the_policy_of_the_other_and_makes_no_html_of_text(served: Callable[..., Page]) -> None:
    page = served("--side-by-side")
    status, body, headers = page.ask("GET", f"/{page.token}/")
    assert status == 200 and b"innerHTML" not in body and b"/* from" not in body and b"// from label" not in body
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    assert page.ask("GET", f"/{page.token}/image/12")[0] == 404
    assert page.ask("GET", f"/{page.token}/image/11")[0] == 200
    assert page.send({"row": 0, "vote": "store", "good": [99]}) == 400
