"""Early stopping: which images go on, that they are what they would have been, and that a resumed run decides alike."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genkit import InputError, Request, TextToImage, generate
from genkit.rows.result import Result
from genkit.runs.records import read_results
from genkit.sampling.draws import Draws
from genkit.sampling.engine import Engine, Trajectory
from genkit.sampling.pruning import EARLY, survivors

ROW: dict[str, Any] = {"prompt": "a red fox", "seed": 5, "num_inference_steps": 6, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def gen() -> TextToImage:
    return TextToImage.from_pretrained("emoji", device="cpu")


class Scorer:
    """Scores a picture by how bright it is; a stand-in that says what it was shown."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def scores(self, pictures: torch.Tensor, prompts: Sequence[str], labels: Sequence[Any]) -> list[dict[str, Any]]:
        found = [{"clip": round(float(p.float().mean()) / 255, 6)} for p in pictures]
        self.seen += [f["clip"] for f in found]
        return found


def drawn(gen: TextToImage, rows: list[Request] | Draws, slots: int = 3) -> dict[tuple[str, int], Result]:
    scorer: Any = Scorer()
    return {(r.id, r.index): r for r in gen.stream(rows, scorer=scorer, slots=slots, seed=0)}


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "heun", "euler_ancestral"])
def test_a_paused_image_goes_on_to_be_what_it_would_have_been(gen: TextToImage, scheduler: str) -> None:
    row = Request(**ROW, scheduler=scheduler)
    (whole,) = _run(gen, gen.begin(row, 0, 5))
    trajectory = gen.begin(row, 0, 5)
    trajectory.pause = 4
    (paused,) = _run(gen, trajectory)
    assert paused.step == 4
    assert paused.x0 is not None
    paused.pause = 0
    (ended,) = _run(gen, paused)
    assert ended.step == ended.plan.nfe
    torch.testing.assert_close(ended.latent, whole.latent, rtol=0, atol=0)


def test_a_paused_image_keeps_no_tensor_of_its_batch_mates(gen: TextToImage) -> None:
    pair = [gen.begin(Request(**ROW), k, k) for k in (0, 1)]
    for trajectory in pair:
        trajectory.pause = 2
    engine = Engine(gen.denoiser, gen.device, slots=2)
    (paused,) = [ended for ended in engine.run(lambda free, alone: [pair.pop() for _ in range(len(pair))]) if ended]
    assert len(paused) == 2
    for kept in (tensor for t in paused for tensor in (t.latent, t.x0, t.history)):
        assert kept is not None and kept.untyped_storage().nbytes() == kept.nbytes


def _run(gen: TextToImage, trajectory: Trajectory) -> list[Trajectory]:
    waiting = [trajectory]
    engine = Engine(gen.denoiser, gen.device, slots=1)
    return [t for ended in engine.run(lambda free, alone: [waiting.pop()] if waiting else []) for t in ended]


def test_the_predicted_picture_is_the_one_that_the_step_is_made_of(gen: TextToImage) -> None:
    """x' = cx x + (c0 + cr) x0 in a DDIM step, which bounds nothing on this model."""
    found = {}
    for calls in (5, 6):
        trajectory = gen.begin(Request(**ROW, scheduler="ddim"), 0, 5)
        trajectory.pause = calls
        (found[calls],) = _run(gen, trajectory)
    x0 = found[6].x0
    assert x0 is not None
    cx, c0, cr = (float(found[6].plan[name][5]) for name in ("cx", "c0", "cr"))
    torch.testing.assert_close(found[6].latent, cx * found[5].latent + (c0 + cr) * x0, rtol=0, atol=1e-5)


def test_only_the_best_at_the_mark_are_drawn_to_the_end(gen: TextToImage) -> None:
    rows = [Request(id="p", num_images=4, prune={"after": 0.5, "keep": 0.5}, **ROW), Request(id="q", **ROW)]
    plain = drawn(gen, [Request(id="p", num_images=4, **ROW), rows[1]])
    found = drawn(gen, rows)
    early = {k: found["p", k].scores[EARLY] for k in range(4)}
    best = sorted(early, key=lambda k: -early[k])[:2]
    assert {k for k in range(4) if found["p", k].status == "done"} == set(best)
    for k in range(4):
        r = found["p", k]
        if k in best:
            assert np.abs(r.pixels.astype(int) - plain["p", k].pixels).max() <= 1
            assert r.scores["clip"] == pytest.approx(plain["p", k].scores["clip"], abs=1e-3)
            assert (r.nfe, r.reason) == (12, None)
        else:
            assert (r.status, r.nfe, r.pixels) == ("pruned", 6, None)
            assert r.reason == "not among the best 2 of 4 after call 3 of 6"
            assert r.scores["clip"] == early[k]
    assert EARLY not in found["q", 0].scores
    composed = {**ROW, "prompt": "a fox AND a cat", "syntax": "a1111", "num_inference_steps": 2}
    both = drawn(gen, [Request(id="c", num_images=2, prune={"after": 0.5, "keep": 0.5}, **composed)])
    assert sorted((r.status, r.nfe) for r in both.values()) == [("done", 6), ("pruned", 3)]
    assert drawn(gen, rows, slots=1).keys() == found.keys()


def test_what_is_ranked_by_decides_at_the_mark(gen: TextToImage) -> None:
    fields = {**ROW, "num_images": 3, "prune": {"after": 0.5, "keep": 0.3}}
    brightest = drawn(gen, [Request(id="p", **fields)])
    darkest = drawn(gen, [Request(id="p", rank_by="-clip", **fields)])
    ends = [{k for (_, k), r in found.items() if r.status == "done"} for found in (brightest, darkest)]
    assert [len(end) for end in ends] == [1, 1]
    assert ends[0] != ends[1]


@pytest.mark.parametrize("recorded", [[0], [1, 2], [0, 1, 2]], ids=str)
def test_a_resumed_run_decides_alike(gen: TextToImage, recorded: list[int]) -> None:
    row = Request(id="p", num_images=4, prune={"after": 0.5, "keep": 0.5}, **ROW)
    once = drawn(gen, [row])
    again = drawn(gen, Draws([row], {("p", k): once["p", k] for k in recorded}))
    assert again.keys() == {("p", k) for k in range(4) if k not in recorded}
    assert {k: r.status for k, r in again.items()} == {k: once[k].status for k in again}


def test_the_others_go_on_where_an_image_fails_before_the_mark(gen: TextToImage, monkeypatch: Any) -> None:
    row = Request(id="p", num_images=4, prune={"after": 0.5, "keep": 0.5}, **ROW)
    begin = gen.begin

    def broken(request: Request, index: int, seed: int) -> Trajectory:
        if index == 3:  # the last to begin: nothing ends after it
            raise InputError("image: gone")
        return begin(request, index, seed)

    monkeypatch.setattr(gen, "begin", broken)
    found = drawn(gen, [row], slots=1)
    assert sorted(r.status for r in found.values()) == ["done", "done", "failed", "pruned"]


def test_the_slots_are_refilled_while_a_row_waits(gen: TextToImage) -> None:
    rows = [Request(id=f"p{n}", num_images=4, prune={"after": 0.5, "keep": 0.25}, **ROW) for n in range(3)]
    calls = []
    network = gen.denoiser.__class__.__call__

    def counted(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(x))
        return network(self, x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gen.denoiser.__class__, "__call__", counted)
        found = drawn(gen, rows, slots=1)  # of the model's own size: four of these
    assert sum(r.status == "done" for r in found.values()) == 3
    assert sum(calls) == 3 * (4 * 3 + 1 * 3)  # half of the calls for all, the rest for one of four
    assert calls[:9] == [4] * 9, "rows p1 and p2 take the slots of the images of p0 that wait or were given up"


def test_pruned_images_are_recorded_and_not_drawn_again(tmp_path: Path) -> None:
    fields = {**ROW, "id": "p", "num_images": 4}
    prune = Request(prune={"after": 0.5, "keep": 0.5}, **fields)
    assert generate([prune], tmp_path / "run", quiet=True).images == 4
    before = (tmp_path / "run" / "results.jsonl").read_text()
    assert sorted(r.status for r in read_results(tmp_path / "run")) == ["done", "done", "pruned", "pruned"]
    assert len(list((tmp_path / "run" / "images").iterdir())) == 2
    reasons = [i["reason"] for i in json.loads((tmp_path / "run" / "selection.json").read_text())["images"].values()]
    assert sum(reason.startswith("pruned: not among the best 2 of 4") for reason in reasons) == 2
    assert generate([prune], tmp_path / "run", quiet=True).new == 0
    assert (tmp_path / "run" / "results.jsonl").read_text() == before
    assert generate([Request(**fields)], tmp_path / "run", quiet=True).new == 2, (
        "without prune they are drawn after all"
    )


def test_ties_go_to_the_first_and_nan_goes_last() -> None:
    assert survivors({2: 0.5, 0: 0.5, 1: 0.5}, 2) == {0, 1}
    assert survivors({0: math.nan, 1: -3.0, 2: math.inf}, 2) == {1, 2}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "aftr": ({"aftr": 0.5}, "prune: {'aftr': 0.5} has no 'aftr' (did you mean 'after'?)"),
    "all": ({"keep": 1.0}, "keep must be a fraction, more than 0 and less than 1"),
    "text": ({"after": "half"}, "after must be a fraction"),
    "none": ({"keep": 0.9}, "prune: keeps 4 of num_images 4"),
    "keep": ({"keep": 0.5}, "keep: 3 of the 2 images that prune leaves"),
    "max": ({"keep": 0.5}, "prune: does not go with max_images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_values_are_refused(case: str) -> None:
    extra: dict[str, dict[str, Any]] = {"keep": {"keep": 3}, "max": {"keep": 1, "gate": "not nan", "max_images": 9}}
    prune, message = REFUSED[case]
    with pytest.raises(InputError) as error:
        Request(prompt="x", num_images=4, prune=prune, **extra.get(case, {}))
    assert message in str(error.value)


def test_without_a_scorer_it_is_refused_before_anything_is_drawn(gen: TextToImage, tmp_path: Path) -> None:
    row = Request(num_images=2, prune={}, **ROW)
    with pytest.raises(InputError, match=r"prune: .*needs a CLIP model"):
        generate([row], tmp_path / "run", clip="none")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="prune: needs a scorer"):
        list(gen.stream([row], slots=1))
