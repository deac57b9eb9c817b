"""Memory that runs out, injected wherever it can: less is tried, what was learned is remembered, one line says so."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from genkit import ClipScorer, HostError, ImageToImage, Request, TextToImage, generate
from genkit.device import outofmemory
from genkit.device.outofmemory import attempt, in_parts
from genkit.rows.result import Result
from genkit.sampling.draws import Draws
from genkit.sampling.engine import Engine
from genkit.sampling.stream import Stream

FEW: Any = {"num_inference_steps": 2}


@pytest.fixture
def gen() -> TextToImage:
    return TextToImage.from_pretrained("emoji", device="cpu")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    gen = TextToImage.from_pretrained("emoji", device="cpu")
    return {r.id: r.pixels for r in gen.stream(rows())}


def rows(count: int = 4) -> list[Request]:
    return [Request(id=str(k), prompt=f"fox {k}", seed=k, **FEW) for k in range(count)]


def no_room(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("no room")


class Tight:
    """Calls through; raises when `size` of the arguments is above `room`, or on the calls numbered in `at`."""

    def __init__(self, call: Callable[..., Any], room: float = 2**40, at: tuple[int, ...] = ()) -> None:
        self.call, self.room, self.at, self.calls = call, room, at, list[int]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = next((a for a in (*args, *kwargs.values()) if hasattr(a, "__len__")), ())
        self.calls.append(len(x))
        if len(x) > self.room or len(self.calls) in self.at:
            no_room()
        return self.call(*args, **kwargs)


def same(results: Iterator[Result], expected: dict[str, Any]) -> None:
    found = {r.id: r for r in results}
    assert {r.status for r in found.values()} == {"done"} and found.keys() == expected.keys()
    for key, result in found.items():
        assert np.abs(result.pixels.astype(int) - expected[key]).max() <= 1, key


def test_what_a_failed_call_made_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    released: list[bool] = []

    def greedy(part: slice) -> int:
        assert not made or made[-1]() is None, "the traceback still holds it"
        tensor = torch.zeros(8)
        made.append(weakref.ref(tensor))
        if part.stop - part.start > 1:
            no_room()
        return part.start

    monkeypatch.setattr(outofmemory, "release", lambda: released.append(made[-1]() is None))
    assert in_parts(4, 4, greedy, "things") == ([0, 1, 2, 3], 1)
    assert released == [True, True], "and before the device's memory is given back"


def test_other_names_of_the_same_thing_and_other_errors() -> None:
    def fails(text: str) -> Any:
        raise RuntimeError(text)

    assert attempt(lambda: fails("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")) is None
    assert attempt(lambda: fails("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")) is None
    assert attempt(lambda: [0] * 2**62) is None
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(lambda: fails("shapes do not match"))
    with pytest.raises(torch.OutOfMemoryError, match="one of the things"):
        in_parts(3, 2, no_room, "things")


def test_unet_rows(gen: TextToImage, expected: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    tight = Tight(gen.unet.forward, room=3)
    gen.unet.forward = tight
    same(gen.stream(rows(), slots=4), expected)
    assert tight.calls[:3] == [8, 4, 2] and max(tight.calls[3:]) == 2 and gen.denoiser.limit == 2
    same(gen.stream(rows(), slots=4), expected)
    assert max(tight.calls[3:]) == 2, "remembered from one stream to the next"
    assert "out of memory at 8 rows: from now on at most 4 at once" in caplog.text


@pytest.mark.slow
def test_vae_batch_then_strips_then_failure(
    gen: TextToImage, expected: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain, decoder = gen.vae.decode, gen.vae.decoder.mid_block.forward
    gen.vae.decode = tight = Tight(plain, room=1)
    same(gen.stream(rows(), slots=4), expected)
    assert tight.calls == [4, 2, 1, 1, 1, 1]
    gen.vae.decode = tight = Tight(plain, room=0)
    same(gen.stream(rows(), slots=4), expected)
    same(gen.stream(rows(), slots=4), expected)
    assert tight.calls == [1], "in strips from then on, without another try"
    assert "out of memory at 1 pictures in the VAE: from now on in strips" in caplog.text
    gen.vae.decoder.mid_block.forward = no_room
    assert {(r.status, r.reason) for r in gen.stream(rows())} == {("failed", "out of memory")}
    gen.vae.decoder.mid_block.forward = decoder
    same(gen.stream(rows()), expected)


def test_a_vae_that_cannot_be_cut_fails_its_pictures(gen: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genkit.sampling.codec.can_strip", lambda vae: False)
    gen.vae.decode = Tight(gen.vae.decode, room=0)
    assert [(r.status, r.reason) for r in gen.stream(rows(1))] == [("failed", "out of memory")]


def test_encoding_a_picture(gen: TextToImage) -> None:
    picture = gen("a cat", seed=1, num_inference_steps=1).images[0]
    request = Request(id="0", prompt="a dog", image=picture, seed=2, strength=0.6, **FEW)
    expected = {r.id: r.pixels for r in gen.stream([request])}
    gen.vae.encode = no_room
    same(ImageToImage.from_generator(gen).stream([request]), expected)
    gen.vae.encoder.mid_block.forward = no_room
    assert [(r.status, r.reason) for r in gen.stream([request])] == [("failed", "out of memory")]


def test_prompts_and_scores(gen: TextToImage, expected: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert gen.text is not None
    text = TextToImage.from_pretrained("emoji", device="cpu").text
    assert text is not None
    plain = text([f"fox {k}" for k in range(5)])
    gen.text._encode = tight = Tight(gen.text._encode, room=2)
    found = gen.text([f"fox {k}" for k in range(5)])
    assert tight.calls == [5, 2, 2, 1] and gen.text.batch == 2
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(found, plain, strict=True))
    scorer = ClipScorer.from_pretrained("emoji-clip", device="cpu")
    pictures = torch.rand(5, 3, 64, 64)
    scores = scorer.score(pictures, "a fox")
    scorer._embed = tight = Tight(scorer._embed, room=2)  # type: ignore[method-assign]
    assert scorer.score(pictures, "a fox") == pytest.approx(scores, abs=1e-4)
    assert tight.calls == [5, 2, 2, 1] and scorer.batch == 2
    scorer._embed = no_room  # type: ignore[method-assign]
    assert {(r.status, r.reason) for r in gen.stream(rows(), scorer=scorer)} == {("failed", "out of memory")}
    assert "out of memory at 5 prompts" in caplog.text and "out of memory at 5 pictures" in caplog.text


def test_admission_halves_the_slots(
    gen: TextToImage, expected: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = Tight(gen.begin, at=(3,))
    monkeypatch.setattr(gen, "begin", tight)
    same(gen.stream(rows(), slots=4), expected)
    assert len(tight.calls) == 5, "the image that had no room is begun later"
    assert gen.most_slots == 1.5 and "out of memory at 3 slots of images in flight: from now on 1.5" in caplog.text
    batches: list[int] = []
    gen.unet.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
    same(gen.stream(rows(), slots=4), expected)
    assert set(batches) == {2}, "one guided image at a time, remembered"


def test_one_image_that_has_no_room_fails_and_the_next_is_drawn(
    gen: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gen, "begin", Tight(gen.begin, at=(1,)))
    found = {r.id: (r.status, r.reason) for r in gen.stream(rows(3), slots=2)}
    assert found == {"0": ("failed", "out of memory"), "1": ("done", None), "2": ("done", None)}


@pytest.mark.parametrize(("room", "side"), [(1, 128), (2, 128), (1, 64)])
def test_stacking_the_slots(gen: TextToImage, monkeypatch: pytest.MonkeyPatch, room: int, side: int) -> None:
    stack, tries = torch.stack, list[int]()

    def tight(parts: Any, *args: Any, **kwargs: Any) -> Any:
        if len(parts) and parts[0].shape == (8, side // 8, side // 8):
            tries.append(len(parts))
            if len(parts) > room:
                no_room()
        return stack(parts, *args, **kwargs)

    engine = Engine(gen.denoiser, gen.device, slots=4)
    waiting = [gen.begin(r.filled({"width": side, "height": side}), 0, 1) for r in rows()]

    def take(free: float, alone: bool) -> list[Any]:
        count = int(free * (128 / side) ** 2)
        taken, waiting[:] = waiting[:count], waiting[count:]
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(torch, "stack", tight)
        ended = [t for some in engine.run(take) for t in some]
    assert len(ended) == 4 and not any(t.error for t in ended)
    assert tries[0] == 4 and max(tries[2:]) == room, "what failed is not tried again"


def test_a_step_waits_for_what_runs_beside_it(gen: TextToImage) -> None:
    pool, done = Stream(gen, Draws([]), None, 0), Future[list[Result]]()
    assert not pool._relieve()
    pool.pending.append(done)

    def relieve() -> bool:
        relieved.append(True)
        gen.unet.forward = forward
        return True

    def draw() -> Any:
        start = [gen.begin(Request(prompt="a fox", scheduler="euler_ancestral", **FEW), 0, 1)]
        engine = Engine(gen.denoiser, gen.device, 1, relieve)
        return next(t for ended in engine.run(lambda free, alone: [start.pop()] if start else []) for t in ended)

    relieved: list[bool] = []
    expected, forward, gen.unet.forward = draw(), gen.unet.forward, no_room
    found = draw()
    assert relieved == [True] and not found.error, "tried once more when the other work was done"
    assert torch.equal(found.latent, expected.latent), "with the noise that was drawn for this step"


def test_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genkit.components.loading._read", no_room)
    with pytest.raises(HostError, match=r"safetensors: out of memory on cpu as its weights were read"):
        TextToImage.from_pretrained("emoji", device="cpu")


def test_float32_that_does_not_fit_leaves_a_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    gen = TextToImage.from_pretrained("emoji", device="cpu", dtype="bfloat16")
    monkeypatch.setattr(gen.unet, "forward", lambda x, *a, **k: (torch.full_like(x, float("nan")),))
    monkeypatch.setattr(gen.residency, "float32", no_room)
    assert [(r.status, r.reason) for r in gen.stream(rows(1))] == [("failed", "nan")]


def test_the_command_says_so_in_one_line(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from genkit.sampling.generators import Generator

    tight = None

    def begin(self: Any, *args: Any) -> Any:
        nonlocal tight
        tight = tight or Tight(lambda *a: original(self, *a), at=(3,))
        return tight(*args)

    original = Generator.begin
    monkeypatch.setattr(Generator, "begin", begin)
    summary = generate(rows(), tmp_path / "run", device="cpu", clip="none", batch_size=4)
    assert (summary.images, summary.failed) == (4, 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert lines == ["out of memory at 3 slots of images in flight: from now on 1.5"]
    assert not logging.getLogger("genkit").handlers
