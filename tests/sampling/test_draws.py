"""Rows that draw until some pass: what is drawn, how full the slots are, budgets, and the same choice after a kill."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.sampling.draws import Draws
from genkit.sampling.engine import Engine, Trajectory
from genkit.schedulers import Scheduler
from genkit.selection.decide import decide

STEPS = 5


def rows_of(count: int, **fields: Any) -> list[Request]:
    asked = {"keep": 2, "gate": "clip > 0.5", "num_images": 2, "max_images": 32, **fields}
    return [Request(id=f"r{n}", prompt="x", seed=n, **asked) for n in range(count)]


def outcome(row: Request, index: int) -> Result:
    """A score that depends on the image alone: rows pass at rates from 1 in 10 to 4 in 5."""
    rate = (0.1, 0.25, 0.5, 0.8)[int(str(row.id)[1:]) % 4]
    clip = 0.9 if random.Random(f"{row.id}/{index}").random() < rate else 0.1
    scores = {"clip": clip + index / 1000}
    return Result(str(row.id), index, row.seed_of(index), scores=scores, file=f"images/{row.id}-{index:02d}.png")


class Null(torch.nn.Module):
    """A denoiser that does nothing, for the engine's own bookkeeping."""

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(x)


def run(draws: Draws, slots: int, stop_after: int | None = None, jitter: int = 0) -> tuple[list[Result], Engine]:
    """Draw all there is with the real engine; `jitter` lets images differ in steps, `stop_after` results it ends."""
    plan = Scheduler(noise="linear", solver="ddim").plan(STEPS)
    plans = [plan, *(Scheduler(noise="linear", solver="ddim").plan(STEPS + k + 1) for k in range(jitter))]
    engine = Engine(Null(), torch.device("cpu"), slots)  # type: ignore[arg-type]
    results: list[Result] = []

    def take(free: float, _alone: bool) -> list[Trajectory]:
        new: list[Trajectory] = []
        while len(new) < free and (drawn := draws.take()) is not None:
            which = plans[(drawn[1] + int(drawn[0].seed_of(0))) % len(plans)]
            new.append(Trajectory(drawn, torch.zeros(1, 2, 2), which))
        return new

    for ended in engine.run(take):
        for trajectory in ended:
            result = outcome(*trajectory.tag)
            draws.report(result)
            results.append(result)
            if len(results) == stop_after:
                return results, engine
    return results, engine


def kept(rows: list[Request], results: list[Result]) -> dict[str, str]:
    images = decide(rows, results)["images"]
    return {name: image["reason"] for name, image in images.items() if image["kept"]}


def test_slots_stay_full_while_rows_end_at_different_draws() -> None:
    rows = rows_of(60)
    results, engine = run(Draws(rows), slots=16)
    assert engine.slots_full is not None and engine.slots_full >= 0.95
    needed = sum(_needed(row) for row in rows)
    assert needed <= len(results) <= 1.1 * needed, "and few are drawn that turn out not to be needed"


def _needed(row: Request) -> int:
    passed = 0
    for k in range(row.max_images or 0):
        passed += outcome(row, k).scores["clip"] > 0.5
        if passed == row.keep:
            return max(k + 1, row.num_images)
    return row.max_images or 0


@pytest.mark.parametrize("slots", [1, 3, 16, 64])
def test_the_same_is_kept_in_any_number_of_slots_and_in_any_order(slots: int) -> None:
    rows = rows_of(12)
    found = kept(rows, [outcome(row, k) for row in rows for k in range(_needed(row))])
    assert len(found) > 12
    assert kept(rows, run(Draws(rows), slots, jitter=3)[0]) == found


@pytest.mark.parametrize("stop_after", [1, 7, 20, 40, 70])
def test_an_interrupted_run_keeps_what_an_uninterrupted_one_keeps(stop_after: int) -> None:
    """Also what was drawn ahead and is not needed, and what is missing in the middle, makes no difference."""
    rows = rows_of(10)
    whole = kept(rows, run(Draws(rows), 16, jitter=3)[0])
    done = run(Draws(rows), 16, stop_after, jitter=3)[0]
    done = [r for r in done if r.index != 3]  # say, a file that was damaged
    results = done + run(Draws(rows, {(r.id, r.index): r for r in done}), 16, jitter=1)[0]
    assert len({(r.id, r.index) for r in results}) == len(results), "nothing is drawn twice"
    assert kept(rows, results) == whole


def test_one_row_alone_draws_as_far_ahead_as_it_probably_needs() -> None:
    (row,) = rows_of(1, num_images=1, keep=1, max_images=64)
    draws = Draws([row])
    taken = _all(draws.take)
    assert len(taken) == 2, "one in two may pass: nothing is known yet"
    for request, index in taken:
        draws.report(Result(str(request.id), index, 0, scores={"clip": 0.1}))
    assert 3 <= len(_all(draws.take)) <= 8, "none of two did: more are needed"


def _all(take: Callable[[], Any]) -> list[Any]:
    return list(iter(take, None))


def test_a_budget_of_images_counts_earlier_ones_and_spends_none_ahead() -> None:
    rows = rows_of(8)
    draws = Draws(rows, most=20)
    first, _ = run(draws, 16)
    assert len(first) == 20 and draws.short == "max_total_images" and draws.lacking > 0
    done = {(r.id, r.index): r for r in first}
    again = Draws(rows, done, most=20)
    assert not again.has_next() and again.lacking > 0
    more = Draws(rows, done, most=10_000)
    results = first + run(more, 16)[0]
    assert more.lacking == 0 and len(results) == sum(map(_needed, rows))
    assert kept(rows, results) == kept(rows, run(Draws(rows), 16)[0])


def test_past_its_time_a_run_begins_nothing_new() -> None:
    draws = Draws(rows_of(2), until=0.0)
    assert not draws.has_next() and draws.short == "max_seconds" and draws.lacking == 2
    satisfied = Draws([Request(id="a", prompt="x")], until=np.inf)
    assert satisfied.has_next() and satisfied.short is None


def test_hard_rows_are_reported_with_their_best_failures() -> None:
    row = Request(id="a", prompt="x", num_images=2, keep=2, gate="clip > 0.5", max_images=5)
    clips = [0.1, 0.4, 0.7, 0.45, 0.2]
    results = [Result("a", k, k, scores={"clip": c}, file=f"images/a-{k:02d}.png") for k, c in enumerate(clips)]
    selection = decide([row], results)
    assert selection["hard"] == [
        {"id": "a", "keep": 2, "passed": 1, "drawn": 5, "pass_rate": 0.2, "best": ["a-03"]},
    ]
    assert selection["images"]["a-03"]["reason"] == "gate: clip > 0.5; among the best that failed"
    assert not selection["images"]["a-03"]["kept"] and selection["images"]["a-02"]["kept"]
    assert decide([row], results[:4])["hard"] == [], "it may draw one more"
    assert decide([row], results, where="clip > 0.3")["hard"] == []


def test_what_was_drawn_ahead_counts_only_when_asked_for_anew() -> None:
    row = Request(id="a", prompt="x", num_images=1, keep=1, gate="clip > 0.5", max_images=5)
    results = [Result("a", k, k, scores={"clip": c}, file="images/a-00.png") for k, c in enumerate([0.1, 0.6, 0.9])]
    images = decide([row], results)["images"]
    assert [image["kept"] for image in images.values()] == [False, True, False]
    assert images["a-02"]["reason"] == "drawn ahead: the first 2 were enough"
    assert [i["kept"] for i in decide([row], results, where="clip > 0.5")["images"].values()] == [False, False, True]


def test_drawing_ahead_ends_at_max_images() -> None:
    """With slots to spare, a row of which nothing passes draws all that it may, and not one more."""
    row = Request(id="a", prompt="x", num_images=2, keep=2, gate="clip > 0.5", max_images=16)
    draws = Draws([row])
    drawn: list[int] = []
    while True:
        taken = [pair for pair in (draws.take() for _ in range(5)) if pair is not None]
        if not taken:
            break
        for request, index in taken:
            drawn.append(index)
            draws.report(Result(id=str(request.id), index=index, seed=0, scores={"clip": 0.1}))
    assert drawn == list(range(16))


def test_how_many_images_there_will_be_is_foreseen() -> None:
    foreseen: list[int] = []

    class Watched(Draws):
        def report(self, result: Result) -> None:
            super().report(result)
            foreseen.append(self.total)

    results, _ = run(Watched(rows_of(40)), slots=8)
    assert foreseen[-1] == len(results), "what it says at the end is what there is"
    half = foreseen[len(foreseen) // 2]
    assert half > 1.2 * len(foreseen) / 2 and abs(half - len(results)) < 0.3 * len(results), "not only what is certain"
