"""The line in which rows wait: turns between clients and rows, gates, giving up, the cost of what waits."""

from __future__ import annotations

from typing import Any

from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.serve.line import Line, Ticket


def line() -> Line:
    return Line(lambda row: 2.0, lambda latent: latent)


def take(line: Line, count: int) -> list[tuple[str, int]]:
    """Return the prompts and indexes of the next images."""
    drawn = [line.take() for _ in range(count)]
    return [(d[0].prompt, d[1]) for d in drawn if d is not None]


def report(line: Line, request: Request, index: int, status: str = "done", **scores: Any) -> None:
    line.report(Result(str(request.id), index, 0, status, scores=scores))


def types(ticket: Ticket) -> list[str]:
    return [event["type"] for event in ticket.wait()]


def test_clients_take_turns_and_then_the_rows_of_each() -> None:
    queue = line()
    queue.submit([Request(prompt="a1", num_images=3), Request(prompt="a2", num_images=3)], "a")
    queue.submit([Request(prompt="b1", num_images=2)], "b")
    queue.submit([Request(prompt="a3")], "a")
    drawn = take(queue, 20)
    assert "".join(name[0] for name, _ in drawn) == "ababaaaaa"
    assert [name for name, _ in drawn if name[0] == "a"][:3] == ["a1", "a2", "a3"]


def test_a_client_who_comes_late_waits_for_one_image_of_another_with_many() -> None:
    queue = line()
    queue.submit([Request(prompt="many", num_images=1000)], "a")
    take(queue, 10)
    queue.submit([Request(prompt="one")], "b")
    assert ("one", 0) in take(queue, 2)


def test_seeds_are_those_of_a_run_with_the_same_ids() -> None:
    queue, row = line(), Request(id="000007", prompt="x", num_images=2)
    queue.submit([row], "a", seed=5)
    drawn = [queue.take() for _ in range(2)]
    assert [d[0].seed_of(d[1]) for d in drawn if d] == [row.seed_of(k, 5) for k in range(2)]


def test_a_gated_row_draws_until_enough_pass() -> None:
    queue = line()
    row = Request(prompt="g", num_images=1, keep=1, max_images=3, gate="clip > 0.5")
    ticket = queue.submit([row], "a")
    for clip in (0.1, 0.2, 0.9):
        drawn = queue.take()
        assert drawn is not None
        report(queue, *drawn, clip=clip)
    assert queue.take() is None and ticket.done
    assert types(ticket) == ["queued", "image", "image", "image", "done"]


def test_what_is_given_up_ends_when_its_images_are_out_of_their_slots() -> None:
    queue = line()
    ticket = queue.submit([Request(prompt="x", num_images=5)], "a")
    first, second = queue.take(), queue.take()
    assert first and second
    report(queue, *first)
    assert queue.cost() == 8.0 and queue.waiting() == (1, 1)
    ticket.cancel()
    assert queue.take() is None and queue.gone((second[0], 1, 0)) and not ticket.done
    report(queue, *second, status="failed")
    assert ticket.done and queue.cost() == 0.0 and queue.gone((second[0], 1, 0))
    assert types(ticket) == ["queued", "image", "done"]


def test_an_error_of_the_engine_ends_every_ticket() -> None:
    queue = line()
    tickets = [queue.submit([Request(prompt="x", num_images=2)], name) for name in "ab"]
    drawn = queue.take()
    queue.fail("out of luck")
    assert [types(ticket) for ticket in tickets] == [["queued", "failed", "done"]] * 2
    assert drawn is not None
    report(queue, *drawn)  # which comes too late
    assert not queue.tickets


def test_a_closed_line_hands_out_nothing_and_lets_the_stream_end() -> None:
    queue = line()
    ticket = queue.submit([Request(prompt="x")], "a")
    queue.close()
    assert queue.take() is None and not queue.more()
    assert types(ticket) == ["queued", "done"]
