"""The slot engine: twelve different settings in one batch, each as if it ran alone; memory, NaN and gates."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from genkit import ImageToImage, InputError, Request, TextToImage
from genkit.rows.result import Result
from genkit.sampling.denoiser import Denoiser
from genkit.sampling.draws import Draws
from genkit.sampling.engine import Engine, Trajectory
from genkit.sampling.stream import Stream
from tests.grids import thinned

SOLVERS = ["ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "sde-dpmpp_2m"]


@pytest.fixture(scope="module")
def gen() -> TextToImage:
    return TextToImage.from_pretrained("emoji", device="cpu")


def twelve(gen: TextToImage) -> list[Request]:
    """Twelve requests that share no value of steps, guidance, solver-and-spacing, seed or strength."""
    image = gen("a red fox", seed=7, num_inference_steps=4).images[0]
    rows = []
    for k in range(12):
        start: dict[str, Any] = {"image": image, "strength": 0.3 + 0.1 * (k // 2)} if k % 2 else {}
        spacing = "trailing" if k < 6 else "leading"
        rows.append(Request(
            id=f"r{k}", prompt=f"a fox number {k}", negative_prompt="dull" * (k % 3), seed=100 + k, width=64, height=64,
            num_inference_steps=4 + k, guidance_scale=1.0 + 0.5 * k,
            scheduler={"solver": SOLVERS[k % 6], "spacing": spacing}, **start,
        ))  # fmt: skip
    return rows


class Elementwise(torch.nn.Module):
    """A network whose arithmetic treats every value of every row by itself: batches cannot change a bit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        bias = cond.flatten(1)[:, :1, None, None] + t[:, None, None, None] / 1000
        return (torch.tanh(self.weight * x + bias),)


def finals(engine: Engine, trajectories: list[Trajectory]) -> dict[str, torch.Tensor]:
    waiting = list(trajectories)

    def take(free: float, alone: bool) -> list[Trajectory]:
        taken, waiting[:] = waiting[: int(free)], waiting[int(free) :]
        return taken

    return {t.tag[0].id: t.latent.clone() for ended in engine.run(take) for t in ended}


def test_a_batch_lies_on_the_device_of_its_engine(gen: TextToImage) -> None:
    """Meta tensors refuse to meet the CPU's as those of a GPU do."""
    there = torch.device("meta")
    waiting = [gen.begin(row, 0, int(row.seed)) for row in twelve(gen)]  # type: ignore[arg-type]
    for trajectory in waiting[:5]:
        trajectory.pause = 2

    def take(free: float, alone: bool) -> list[Trajectory]:
        taken, waiting[:] = waiting[: int(free)], waiting[int(free) :]
        return taken

    ended, paused = [], 0
    for over in Engine(Denoiser(Elementwise().to(there)), there, slots=4).run(take):
        for trajectory in over:
            if trajectory.step < trajectory.plan.nfe:  # it goes on beside others that only begin
                paused, trajectory.pause = paused + 1, 0
                waiting.insert(0, trajectory)
            else:
                ended.append(trajectory)
    assert (len(ended), paused) == (12, 4) and all(t.latent.device == there for t in ended)


@pytest.mark.parametrize(
    "exact", thinned([True, False], 2), ids=["row-independent network, bitwise", "embedded model, 1e-4"]
)
def test_twelve_different_requests_in_one_engine_equal_their_solo_runs(gen: TextToImage, exact: bool) -> None:
    denoiser = Denoiser(Elementwise() if exact else gen.unet)
    rows = twelve(gen)

    def start(row: Request) -> Trajectory:
        return gen.begin(row, 0, int(row.seed))  # type: ignore[arg-type]

    mixed = finals(Engine(denoiser, torch.device("cpu"), slots=7), [start(r) for r in rows])
    assert len(mixed) == 12
    for row in rows:
        alone = finals(Engine(denoiser, torch.device("cpu"), slots=1), [start(row)])[str(row.id)]
        if exact:
            assert torch.equal(mixed[str(row.id)], alone), row.id
        else:
            assert (mixed[str(row.id)] - alone).abs().max() <= 1e-4 * alone.abs().max().clamp(min=1), row.id


def test_slots_are_refilled_as_trajectories_end(gen: TextToImage) -> None:
    rows = [
        Request(id=f"{k}", prompt="a fox", seed=k, num_inference_steps=1 + k, width=64, height=64) for k in range(6)
    ]
    batches: list[int] = []

    class Counting(Denoiser):
        def __call__(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            batches.append(len(x))
            return super().__call__(x, *rest)

    finals(Engine(Counting(Elementwise()), torch.device("cpu"), slots=2), [gen.begin(r, 0, 1) for r in rows])
    assert sum(batches) == 1 + 2 + 3 + 4 + 5 + 6
    assert batches.count(1) <= 2 + 1, "a slot stood empty while work was waiting"


def test_an_eighth_of_the_slots_opens_so_that_the_first_pictures_come_early(gen: TextToImage) -> None:
    rows = [Request(id=f"{k}", prompt="a fox", num_inference_steps=3, width=128, height=128) for k in range(40)]
    engine = Engine(Denoiser(Elementwise()), torch.device("cpu"), slots=16)
    at: dict[str, int] = {}
    waiting = [gen.begin(row, 0, 1) for row in rows]

    def take(free: float, alone: bool) -> list[Trajectory]:
        taken, waiting[:] = waiting[: int(free)], waiting[int(free) :]
        return taken

    for ended in engine.run(take):
        at |= {t.tag[0].id: engine.calls for t in ended}
    assert [at["0"], at["1"], at["2"], at["39"]] == [6, 6, 6 + 16 * 3, 40 * 3]
    assert engine.slots_full == 1, "the opening is not counted"


def test_on_a_gpu_the_first_pictures_are_not_held_back_for_a_batch(
    gen: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    stream, decoded = Stream(gen, Draws([]), None, 0), list[int]()

    def finish(ended: list[Trajectory], event: Any) -> list[Result]:
        decoded.append(len(ended))
        return []

    monkeypatch.setattr(stream, "_finish_on_gpu", finish)
    with ThreadPoolExecutor(1) as pool:
        for count in (2, 3, 5):
            row = Request(prompt="a fox", num_inference_steps=2, width=64, height=64)
            stream.to_decode += [gen.begin(row, 0, 1) for _ in range(count)]
            stream._submit(pool)
    assert decoded == [2, 8], "two at once, then three that wait for five more"


def test_out_of_memory_halves_the_rows_and_goes_on(gen: TextToImage) -> None:
    calls: list[int] = []

    class Tight(Elementwise):
        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, return_dict: bool = False) -> Any:
            calls.append(len(x))
            if len(x) > 3:
                raise torch.OutOfMemoryError("no room")
            return super().forward(x, t, cond)

    rows = [Request(id=f"{k}", prompt="a fox", seed=k, num_inference_steps=3, width=64, height=64) for k in range(4)]
    tight = finals(Engine(Denoiser(Tight()), torch.device("cpu"), slots=4), [gen.begin(r, 0, 1) for r in rows])
    roomy = finals(Engine(Denoiser(Elementwise()), torch.device("cpu"), slots=4), [gen.begin(r, 0, 1) for r in rows])
    assert all(torch.equal(tight[k], roomy[k]) for k in roomy)
    assert calls[:3] == [8, 4, 2] and max(calls[3:]) <= 2, "the size that failed is not tried again"


def test_out_of_memory_at_one_row_fails_the_image_and_not_the_run(
    gen: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gen.denoiser, "unet", type("Full", (Elementwise,), {"forward": no_room})())
    results = list(gen.stream([Request(id="a", prompt="a fox", num_inference_steps=2)]))
    assert [(r.status, r.reason) for r in results] == [("failed", "out of memory")]
    monkeypatch.setattr(gen.denoiser, "limit", None)


class Poisoned(torch.nn.Module):
    """The real UNet, but rows whose prompt embedding is `victim` come out as NaN from the third call on."""

    def __init__(self, unet: Any, victim: torch.Tensor, heals_in: torch.dtype | None = None) -> None:
        super().__init__()
        self.unet, self.victim, self.heals_in, self.config = unet, victim, heals_in, unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        out = self.unet(x, t, cond, return_dict=False)[0]
        sick = (cond.float() - self.victim.float()).flatten(1).abs().amax(dim=1) < 1e-3
        if self.heals_in == self.dtype:
            return (out,)
        return (torch.where(sick[:, None, None, None], torch.full_like(out, float("nan")), out),)


def test_a_nan_fails_its_image_and_leaves_its_batch_mates_alone(
    gen: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Request(id=p, prompt=p, seed=1, num_inference_steps=3) for p in ("fox", "cat", "dog")]
    clean = {r.id: r.pixels for r in gen.stream(rows)}
    assert gen.text is not None
    monkeypatch.setattr(gen.denoiser, "unet", Poisoned(gen.unet, gen.text(["cat"])[0]))
    poisoned = {r.id: r for r in gen.stream(rows)}
    assert (poisoned["cat"].status, poisoned["cat"].reason, poisoned["cat"].scores["nan"]) == ("failed", "nan", True)
    for name in ("fox", "dog"):
        assert np.array_equal(poisoned[name].pixels, clean[name])


def test_a_nan_in_half_precision_is_redone_in_float32() -> None:
    gen = TextToImage.from_pretrained("emoji", device="cpu", dtype="bfloat16")
    assert gen.text is not None
    gen.unet = gen.denoiser.unet = Poisoned(gen.unet, gen.text(["cat"])[0], heals_in=torch.float32)
    results = {
        r.id: r for r in gen.stream(Request(id=p, prompt=p, seed=1, num_inference_steps=2) for p in ("fox", "cat"))
    }
    assert {r.status for r in results.values()} == {"done"}
    assert gen.unet.dtype == torch.bfloat16, "the network goes back to its own precision"


def test_a_picture_of_one_colour_fails(gen: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gen.codec, "decode", lambda latents: torch.full((len(latents), 3, 128, 128), 0.25))
    result = next(iter(gen.stream([Request(id="a", prompt="a fox", num_inference_steps=1)])))
    assert (result.status, result.reason, result.scores["flat"]) == ("failed", "nan", True)


class Judge:
    """A stand-in scorer: image k of a row scores `values[k]`."""

    def __init__(self, values: list[float]) -> None:
        self.values, self.seen = values, 0

    def scores(self, pictures: torch.Tensor, prompts: list[str], labels: Any) -> list[dict[str, float]]:
        found = [{"clip": self.values[(self.seen + k) % len(self.values)]} for k in range(len(pictures))]
        self.seen += len(pictures)
        return found


def test_a_gated_row_draws_until_enough_pass(gen: TextToImage) -> None:
    row = Request(id="a", prompt="a fox", num_inference_steps=1, num_images=2, keep=2, gate="clip > 0.5", max_images=16)
    judge = Judge([0.1, 0.9, 0.2, 0.3, 0.8, 0.9])
    results: list[Result] = list(gen.stream([row], scorer=judge, slots=4))  # type: ignore[arg-type]
    drawn = sorted(r.index for r in results)
    assert drawn == list(range(len(drawn))) and 5 <= len(drawn) <= 9, "stops at the second image that passes, or soon"
    never = list(gen.stream([row], scorer=Judge([0.1]), slots=4))  # type: ignore[arg-type]
    assert len(never) == 16, "stops at max_images"


def test_settings_that_the_model_cannot_draw_are_named_before_any_work(gen: TextToImage) -> None:
    for bad, words in [
        ({"width": 100}, "width: 100 is not a multiple of 8"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0"),
        ({"guidance_scale": -1.0}, "guidance_scale: -1.0"),
        ({"seed": 2**32}, "seed: 4294967296"),
    ]:
        with pytest.raises(InputError, match=re.escape(words)):
            gen("a fox", **bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prompt: missing"):
        gen("")
    with pytest.raises(InputError, match=r"strength: 1\.5"):
        ImageToImage.from_generator(gen)("a fox", image="nowhere.png", strength=1.5)


class Counting(torch.nn.Module):
    """The real UNet, and how many rows it computed."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet, self.config, self.rows = unet, unet.config, 0

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        self.rows += len(x)
        return self.unet(x, *rest, **options)


@pytest.fixture
def counted(gen: TextToImage, monkeypatch: pytest.MonkeyPatch) -> Counting:
    network = Counting(gen.unet)
    monkeypatch.setattr(gen.denoiser, "unet", network)
    return network


SMALL: dict[str, Any] = {"num_inference_steps": 4, "width": 64, "height": 64, "guidance_scale": 5.0}


@pytest.mark.parametrize(
    ("interval", "second"),
    [(None, 4), ([0, 1], 4), ([0.5, 1], 2), ([0.0, 0.25], 1), ({"sigma": [1e-3, 2]}, None), ({"sigma": [0, 1e6]}, 4)],
)  # fmt: skip
def test_rows_outside_the_guidance_interval_are_not_computed(
    gen: TextToImage, counted: Counting, interval: Any, second: int | None
) -> None:
    row = Request(id="a", prompt="a fox", seed=1, guidance_interval=interval, scheduler="euler", **SMALL)
    plan = gen.plan(row)
    levels = plan.sigmas[:4] / np.maximum(plan.alphas[:4], 1e-9)
    expected = sum(1e-3 < k <= 2 for k in levels) if second is None else second
    assert second is not None or 0 < expected < 4
    (result,) = gen.stream([row])
    assert counted.rows == result.nfe == 4 + expected


def test_the_interval_leaves_calls_inside_and_outside_as_they_are(gen: TextToImage) -> None:
    def latent(**options: Any) -> torch.Tensor:
        row = Request(prompt="a fox", seed=1, **{**SMALL, **options})
        engine = Engine(Denoiser(gen.unet), torch.device("cpu"), 1)
        return finals(engine, [gen.begin(row, 0, 1)])[None]  # type: ignore[index]

    assert torch.equal(latent(guidance_interval=[0, 1]), latent())
    nowhere = latent(guidance_interval={"sigma": [1e-9, 1e-8]})
    assert torch.equal(nowhere, latent(guidance_scale=1.0))
    assert not torch.equal(latent(guidance_interval=[0, 0.5]), latent())


@pytest.mark.parametrize("slots", thinned([3, 1, 16], 3))
def test_identical_images_are_drawn_once(gen: TextToImage, counted: Counting, slots: int) -> None:
    same = {"prompt": "a fox", **SMALL}
    rows = [
        Request(id="first", seed=7, num_images=2, **same),
        Request(id="other", seed=7, **{**same, "prompt": "a cat"}),
        Request(id="list", seed=[8, 8, 7], **same),
        Request(id="unseeded", num_images=2, **same),
        Request(id="labelled", seed=8, meta={"note": 1}, **same),
        Request(id="last", seed=7, **same),
    ]
    results = {(r.id, r.index): r for r in gen.stream(rows, slots=slots)}
    assert len(results) == 10 and {r.status for r in results.values()} == {"done"}
    assert counted.rows == 5 * 8, "seven and eight of the fox, seven of the cat, and two without a seed"
    alone = {(r.id, r.index): r for row in rows for r in gen.stream([row], seed=3)}
    for key in alone:
        if key[0] != "unseeded":
            assert np.abs(results[key].pixels.astype(int) - alone[key].pixels.astype(int)).max() <= 1
            assert results[key].seed == alone[key].seed and results[key].nfe == 8
    assert np.array_equal(results["first", 0].pixels, results["last", 0].pixels)
    assert np.array_equal(results["first", 1].pixels, results["labelled", 0].pixels)


def test_identical_images_fail_together_when_their_picture_is_gone(gen: TextToImage, tmp_path: Any) -> None:
    gen("a fox", num_inference_steps=1).images[0].save(tmp_path / "a.png")
    rows = [Request(id=k, prompt="a fox", seed=1, image=tmp_path / "a.png", num_inference_steps=2) for k in "ab"]
    stream = gen.stream(rows)
    (tmp_path / "a.png").unlink()
    assert [(r.id, r.status) for r in stream] == [("a", "failed"), ("b", "failed")]


class Watching:
    """Whoever follows an engine: asks for x0 of some trajectories, and waits no more for others."""

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self.seen: list[tuple[str, int, torch.Tensor | None]] = []

    def gone(self, tag: Any) -> bool:
        return tag[0].id in self.lost

    def wants(self, trajectory: Trajectory) -> bool:
        return trajectory.tag[0].id == "large" and trajectory.step == 1

    def stepped(self, trajectory: Trajectory) -> None:
        self.seen.append((trajectory.tag[0].id, trajectory.step, trajectory.x0))
        trajectory.x0 = None


def test_a_watched_engine_lets_sizes_take_turns_and_drops_what_nobody_waits_for(gen: TextToImage) -> None:
    watch = Watching()
    engine = Engine(Denoiser(Elementwise()), torch.device("cpu"), 2.0, watch=watch)

    def start(row_id: str, side: int, steps: int) -> Trajectory:
        row = Request(id=row_id, prompt="a", width=side, height=side, num_inference_steps=steps, seed=1)
        return gen.begin(row, 0, 1)

    waiting, ended = [start("large", 96, 3), start("lost", 64, 50)], dict[str, Trajectory]()

    def take(free: float, alone: bool) -> list[Trajectory]:  # small ones keep coming
        taken, waiting[:] = list(waiting), []
        free -= sum(t.cost for t in taken)
        while free >= 0.25 and len(ended) < 20:
            taken.append(start(f"small-{len(ended)}-{len(taken)}", 64, 2))
            free -= taken[-1].cost
        return taken

    for calls, finished in enumerate(engine.run(take)):
        ended |= {t.tag[0].id: t for t in finished}
        if calls == 4:
            watch.lost.add("lost")
        if "large" in ended and "at" not in vars(watch):
            watch.__dict__["at"] = calls
    assert vars(watch)["at"] == 4  # every other call is its own
    assert ended["lost"].error == "cancelled" and ended["lost"].step == 2
    shown = [(name, step) for name, step, x0 in watch.seen if x0 is not None]
    assert shown == [("large", 2)] and all(not t.error for name, t in ended.items() if name != "lost")
    alone = Engine(Denoiser(Elementwise()), torch.device("cpu"), 2.0)
    assert torch.equal(finals(alone, [start("large", 96, 3)])["large"], ended["large"].latent)
