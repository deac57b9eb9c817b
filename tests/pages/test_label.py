"""The page for votes: over real sockets, as a browser and as somebody who is not welcome."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from genkit.errors import InputError
from genkit.selection.ballots import Ballots
from genkit.selection.votes import COLUMNS, read_votes
from genkit.studies.filter import refilter
from tests.judged_run import judged_run
from tests.label_page import Page, serve

HOSTILE = "</script><script>alert(1)</script>\x1b[31m =cmd|'x'!A0 \u2028 " + "x" * 3000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return judged_run(tmp_path / "run", lambda n, k: {"clip": 0.1 * k}, rows=2, prompt=HOSTILE)


@pytest.fixture
def page(folder: Path) -> Iterator[Page]:
    url, process = serve(folder)
    yield Page(url, process)
    process.kill()
    process.communicate()


def test_votes_are_on_the_disk_at_once_and_can_be_taken_back(page: Page, folder: Path) -> None:
    first = page.state()["image"]["number"]
    state = page.vote(first, "yes")
    second = state["image"]["number"]
    assert (state["good"], state["bad"], state["left"]) == (1, 0, 9)
    page.vote(second, "no")
    assert page.vote(second, "no")["bad"] == 1, "a key held down is one vote"
    assert page.vote(-1, "undo")["image"]["number"] == second
    page.vote(second, "later")
    rows = list(csv.reader((folder / "votes.csv").open()))
    assert rows[0] == ["image", "vote", "sha256"]
    assert [row[1] for row in rows[1:]] == ["yes", "no", "undo"]
    assert all(re.fullmatch(r"images/r\d-\d\d\.png", row[0]) for row in rows[1:])


def test_going_on_after_a_kill_and_ctrl_c(page: Page, folder: Path) -> None:
    number = page.state()["image"]["number"]
    page.vote(number, "yes")
    page.process.kill()
    page.process.wait()
    with open(folder / "votes.csv", "a") as file:
        file.write("images/r0-0")  # a line that a power cut tore
    url, process = serve(folder)
    again = Page(url, process)
    assert again.token != page.token
    assert (again.state()["good"], again.state()["left"]) == (1, 9)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "1 votes in" in said and "run the same command again" in said


def test_in_order_shows_row_by_row_and_filter_keeps_what_was_voted_good(folder: Path, tmp_path: Path) -> None:
    url, process = serve(folder, "--in-order")
    page = Page(url, process)
    seen = []
    for n in range(9):  # the last one gets no vote
        image = page.state()["image"]
        seen.append(image["name"])
        page.vote(image["number"], "yes" if n in (0, 1, 2, 7) else "no")
    process.kill()
    process.communicate()
    assert seen == [f"r{n}-{k:02d}" for n in range(2) for k in range(5)][:9]
    found = refilter(folder, votes=folder / "votes.csv", out=tmp_path / "best")
    assert found["copied"] == 4 and sorted(path.stem for path in (tmp_path / "best").glob("*.png")) == [
        *seen[:3],
        seen[7],
    ]
    told = json.loads((folder / "selection.json").read_text())
    assert told["votes"] == str(folder / "votes.csv")
    why = {name: image["reason"] for name, image in told["images"].items()}
    assert why["r0-00"] == "kept" and why["r0-03"] == "voted bad" and why["r1-04"] == "no vote"
    assert refilter(folder, votes=folder / "votes.csv", keep=1, where="clip > 0.1")["kept"] == 2
    (tmp_path / "good.txt").write_text("r1-01.png\n")
    assert refilter(folder, votes=tmp_path / "good.txt")["kept"] == 1
    (tmp_path / "good.txt").write_text("r9-01.png\n")
    with pytest.raises(InputError, match=r"good\.txt:1: 'r9-01.png' is no picture of this run"):
        refilter(folder, votes=tmp_path / "good.txt")


def test_votes_that_an_editor_wrote_again_are_gone_on_with(folder: Path) -> None:
    """With a byte order mark, quoted names, CRLF, columns of somebody's own, and a field of 300 kB."""
    path = folder / "votes.csv"
    note = "=1+1 " * 60_000
    path.write_text(f'\ufeff"Note","Image","Vote"\r\n"{note}","images/r0-00.png","yes"\r\n', newline="")
    url, process = serve(folder)
    page = Page(url, process)
    state = page.state()
    assert (state["good"], state["left"]) == (1, 9)
    page.vote(state["image"]["number"], "no")
    process.kill()
    process.communicate()
    assert path.read_text("utf-8").split(note)[1].splitlines()[1] == f",images/{state['image']['name']}.png,no"
    assert [vote.good for vote in read_votes(path)] == [True, False]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("image,vote,sha256\nr0-00,yes,\nr0-01,no,0123", "image,vote,sha256\nr0-00,yes,\n"),  # torn
        ("image,vote,sha256\nr0-00,yes," + "0" * 64, "image,vote,sha256\nr0-00,yes," + "0" * 64 + "\n"),
        ('image,vote,note\nr0-00,yes,"nice, I say"', 'image,vote,note\nr0-00,yes,"nice, I say"\n'),
        ("image,vote\nr0-00,yes", "image,vote\nr0-00,yes\n"),
    ],
)
def test_of_a_last_line_without_an_end_only_a_torn_one_goes(tmp_path: Path, text: str, left: str) -> None:
    (tmp_path / "votes.csv").write_text(text)
    Ballots(tmp_path / "votes.csv", COLUMNS).close()
    assert (tmp_path / "votes.csv").read_text() == left


def test_one_labels_at_a_time(page: Page, folder: Path) -> None:
    other = subprocess.run([sys.executable, "-m", "genkit", "label", str(folder)], capture_output=True, text=True)
    assert other.returncode == 3
    assert "one at a time" in other.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 404),
        ("GET", "/state", {}, 404),
        ("GET", "/wrong/state", {}, 404),
        ("GET", "/TOKEN", {}, 404),
        ("GET", "/TOKEN/state", {"Host": "evil.example"}, 403),
        ("GET", "/TOKEN/image/../run.json", {}, 404),
        ("GET", "/TOKEN/image/99", {}, 404),
        ("GET", "/TOKEN/image/-1", {}, 404),
        ("POST", "/TOKEN/vote", {"Content-Type": "application/json"}, 403),
        ("POST", "/TOKEN/vote", {"Content-Type": "application/json", "Origin": "http://evil.example"}, 403),
        ("POST", "/TOKEN/vote", {"Content-Type": "application/json", "Origin": "null"}, 403),
        ("POST", "/TOKEN/vote", {"Content-Type": "application/json", "Origin": "http://["}, 403),
        ("POST", "/TOKEN/vote", {"Content-Type": "text/plain", "Origin": "OWN"}, 415),
        ("POST", "/TOKEN/vote", {"Content-Type": "application/json", "Origin": "OWN", "Content-Length": "500000"}, 413),
        ("POST", "/TOKEN/vote", {"Origin": "OWN", "Sec-Fetch-Site": "cross-site"}, 403),
        ("PUT", "/TOKEN/vote", {}, 501),
    ],
)  # fmt: skip
def test_strangers_get_nothing(
    page: Page, folder: Path, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    given = {name: f"http://{page.host}" if value == "OWN" else value for name, value in headers.items()}
    answer, body, _ = page.ask(method, path.replace("TOKEN", page.token), '{"image": 0, "vote": "yes"}', **given)
    assert answer == status
    assert page.token.encode() not in body
    assert (folder / "votes.csv").read_text().count("\n") == 1


@pytest.mark.parametrize(
    "body", ["", "[]", '{"image": "0", "vote": "yes"}', '{"image": 0, "vote": "maybe"}', "{" * 3000]
)
def test_what_is_no_vote_is_refused(page: Page, folder: Path, body: str) -> None:
    headers = {"Origin": f"http://{page.host}", "Content-Type": "application/json"}
    assert page.ask("POST", f"/{page.token}/vote", body, **headers)[0] == 400
    assert (folder / "votes.csv").read_text().count("\n") == 1


def test_pictures_and_page_come_with_a_policy_and_hostile_text_as_json(page: Page, folder: Path) -> None:
    status, body, headers = page.ask("GET", f"/{page.token}/")
    assert status == 200 and b"alert(1)" not in body and b"innerHTML" not in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    state = page.state()
    assert state["image"]["prompt"] == HOSTILE[:2000] + "…"
    status, body, headers = page.ask("GET", f"/{page.token}/image/{state['image']['number']}")
    assert status == 200 and headers["Content-Type"] == "image/png"
    assert body in [path.read_bytes() for path in (folder / "images").iterdir()]


def test_a_link_in_place_of_a_picture_is_not_followed(page: Page, folder: Path, tmp_path: Path) -> None:
    state = page.state()["image"]
    picture = folder / "images" / f"{state['name']}.png"
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture.read_bytes())
    picture.unlink()
    os.symlink(secret, picture)
    assert page.ask("GET", f"/{page.token}/image/{state['number']}")[0] == 404


def test_where_and_bad_arguments(folder: Path) -> None:
    def said(*arguments: str) -> tuple[int, str]:
        found = subprocess.run([sys.executable, "-m", "genkit", "label", *arguments], capture_output=True, text=True)
        return found.returncode, found.stderr

    assert said(str(folder), "--where", "clip > 5")[0] == 2
    code, text = said(str(folder), "--where", "clop > 5")
    assert code == 2 and "did you mean 'clip'" in text
    assert said(str(folder / "images"))[0] == 2
    assert said(str(folder), "--port", "99999")[0] == 2
    url, process = serve(folder, "--where", "clip > 0.25")
    assert Page(url, process).state()["left"] == 4
    process.kill()
    process.communicate()
