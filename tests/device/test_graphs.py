"""Recorded network calls, driven on the CPU: padding, buckets, bounds and failures."""

from __future__ import annotations

import pytest
import torch

from genkit import Request, TextToImage
from genkit.device.graphs import MOST_POSITIONS, Call, Graphs, Recorded, bucket
from genkit.sampling.denoiser import Denoiser


class Recorder:
    """Stands in for CUDA graphs: what it records runs again, on the same inputs and into the same output."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []
        self.fail = fail

    def __call__(self, call: Call, inputs: list[torch.Tensor]) -> Recorded:
        if self.fail is not None:
            raise self.fail
        output = call(*inputs)
        self.recorded.append(len(output))

        def replay() -> None:
            self.replayed.append(len(output))
            output.copy_(call(*inputs))

        return replay, output


def network(x: torch.Tensor, t: torch.Tensor, *cond: torch.Tensor) -> torch.Tensor:
    return (
        torch.tanh(x)
        + t[:, None, None, None]
        + sum(c.mean(dim=(1, 2))[:, None, None, None] for c in cond if c.ndim == 3)
    )


def inputs(rows: int, seed: int = 0, side: int = 4) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 2, side, side, generator=g),
        torch.rand(rows, generator=g),
        torch.randn(rows, 3, 5, generator=g),
    )


@torch.inference_mode()
def test_buckets_waste_little() -> None:
    assert [bucket(n) for n in (1, 2, 3, 15, 16, 17, 31, 33, 64, 65)] == [1, 2, 3, 15, 16, 18, 32, 36, 64, 72]
    assert all(n <= bucket(n) <= 1.13 * n for n in range(1, 500))
    assert all(bucket(bucket(n)) == bucket(n) for n in range(1, 500))


@torch.inference_mode()
def test_replayed_calls_equal_plain_ones_for_any_number_of_rows() -> None:
    recorder = Recorder()
    graphs = Graphs(network, recorder)
    kept = []
    for n, rows in enumerate([17, 18, 17, 3, 3, 18, 3, 17, 1, 1, 1]):
        given = inputs(rows, seed=n)
        kept.append((graphs(*given), network(*given)))
    assert all(torch.equal(ours, plain) for ours, plain in kept), "also after later replays wrote to the same place"
    assert recorder.recorded == [18, 3, 1] and recorder.replayed == [18, 18, 3, 18, 3, 18, 1, 1]


@torch.inference_mode()
def test_shapes_and_prompts_have_recordings_of_their_own() -> None:
    recorder = Recorder()
    graphs = Graphs(network, recorder)
    for _ in range(3):
        for given in (inputs(2), inputs(2, side=6), inputs(2)[:2]):
            assert torch.equal(graphs(*given), network(*given))
    assert recorder.recorded == [2, 2, 2] and len(recorder.replayed) == 6


@torch.inference_mode()
def test_the_number_of_recordings_is_bounded_and_the_oldest_goes() -> None:
    recorder = Recorder()
    graphs = Graphs(network, recorder, most=2)
    for rows in (1, 1, 2, 2, 1, 3, 3, 1, 2, 2):  # 2 goes when 3 comes, 1 was used since
        graphs(*inputs(rows))
    assert recorder.recorded == [1, 2, 3, 2]


@torch.inference_mode()
def test_large_calls_are_not_recorded() -> None:
    recorder = Recorder()
    side = 256
    graphs = Graphs(network, recorder)
    rows = MOST_POSITIONS // side**2
    for _ in range(3):
        graphs(*inputs(rows, side=side)), graphs(*inputs(rows + 1, side=side))
    assert recorder.recorded == [rows]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("error", "words"),
    [(RuntimeError("operation not permitted when stream is capturing\nmore"), "operation not permitted when stream"),
     (torch.OutOfMemoryError("no room"), "no room"), (NotImplementedError(), "NotImplementedError")],
)  # fmt: skip
def test_what_cannot_be_recorded_runs_as_it_is(error: Exception, words: str) -> None:
    graphs = Graphs(network, Recorder(error))
    for n in range(4):
        assert torch.equal(graphs(*inputs(3, n)), network(*inputs(3, n)))
    assert graphs.reason is not None and words in graphs.reason and "\n" not in graphs.reason


@torch.inference_mode()
def test_out_of_memory_in_a_recorded_network_still_halves_the_rows() -> None:
    calls: list[int] = []

    def tight(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("no room")
        return network(x, *rest)

    denoiser = Denoiser(torch.nn.Linear(1, 1), graphs=True)
    denoiser.graphs = Graphs(tight, Recorder())
    x, t, cond = inputs(4)
    for _ in range(3):
        out = denoiser(x, t, cond, None, torch.ones(4))
        assert torch.equal(out, network(x, t, cond))
    assert calls[0] == 4 and max(calls[1:]) == 2 and denoiser.limit == 2


def test_a_whole_job_by_recorded_calls_gives_the_same_pictures() -> None:
    gen = TextToImage.from_pretrained("emoji", device="cpu")
    rows = [
        Request(
            id=f"{k}", prompt="a fox", seed=k, num_inference_steps=2 + k, width=64, height=64, guidance_scale=1.0 + k
        )
        for k in range(5)
    ]
    plain = {r.id: r.pixels for r in gen.stream(rows, slots=3)}
    recorder = Recorder()
    gen.denoiser.graphs = Graphs(gen.denoiser._plain, recorder)
    replayed = {r.id: r.pixels for r in gen.stream(rows, slots=3)}
    assert recorder.replayed
    for name in plain:
        assert abs(plain[name].astype(int) - replayed[name].astype(int)).max() <= 1
    with gen.denoiser.in_float32():  # moves the weights: nothing recorded may be used after it
        pass
    before = len(recorder.recorded)
    list(gen.stream(rows[:1]))
    assert len(recorder.recorded) > before


def test_gradients_go_around_recordings() -> None:
    recorder = Recorder()
    denoiser = Denoiser(torch.nn.Linear(1, 1), graphs=True)
    denoiser.graphs = Graphs(network, recorder)
    denoiser._plain = network  # type: ignore[method-assign, assignment]
    x, t, cond = inputs(2)
    x.requires_grad_()
    for _ in range(3):
        assert denoiser(x, t, cond, None, torch.ones(2)).requires_grad
    assert not recorder.recorded
