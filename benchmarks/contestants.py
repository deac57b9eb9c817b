"""What benchmarks/gpu.py times, each in a process of its own: diffusers in the ways its users call it, and genkit.

Every function draws a job and returns when its pictures were finished, as seconds since the first network call.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

STEPS, GUIDANCE = 20, 7.5


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where the models lie and what to draw: `count` pictures, in batches of `batch` where the contestant has any."""

    model: Path
    clip: Path
    out: Path
    device: str
    tiny: bool
    count: int
    batch: int

    @property
    def dtype(self) -> torch.dtype:
        """Half precision on a GPU; a CPU, on which this is only tried out, computes in float32."""
        return torch.float16 if self.device == "cuda" else torch.float32

    def side(self, large: bool = False) -> int:
        """Return the side of a square picture in pixels, the model's own or half as much again."""
        own = {"sd15": 64 if self.tiny else 512, "sdxl": 128 if self.tiny else 1024, "emoji": 128}[self.model.name]
        return own * 3 // 2 if large else own


@dataclasses.dataclass
class Outcome:
    """times: of finished pictures, seconds since the first network call. first: of the first, since process start."""

    times: list[float]
    first: float
    note: str = ""


class Clock:
    """Knows when the process started, when the network was first called, and when pictures were finished."""

    def __init__(self, network: Any, started: float) -> None:
        self.started, self.began, self.times = started, 0.0, list[float]()
        network.register_forward_pre_hook(self._call)

    def _call(self, *_: Any) -> None:
        self.began = self.began or time.time()

    def finish(self, count: int = 1) -> None:
        """Note that so many pictures are finished now."""
        self.times += [time.time()] * count

    def outcome(self, note: str = "") -> Outcome:
        """Return what was measured."""
        return Outcome([t - self.began for t in self.times], self.times[0] - self.started, note)


def texts(count: int) -> list[str]:
    return [f"a photograph of subject number {k}, in the style of painter {k % 7}" for k in range(count)]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------------------------------- diffusers


def pipeline(setup: Setup) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(setup.model, torch_dtype=setup.dtype).to(setup.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tuned(pipe: Any, setup: Setup) -> None:
    """Do to a pipeline what its documentation recommends for speed."""
    pipe.fuse_qkv_projections()
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    if setup.device == "cuda":  # on a CPU it takes minutes, and nothing of it is tried out
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, dynamic=False)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, dynamic=False)


def call(pipe: Any, prompts: list[str], steps: int = STEPS, guidance: float = GUIDANCE, side: int = 0) -> list[Any]:
    options: dict[str, Any] = {"width": side, "height": side} if side else {}
    return pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, **options).images


class ClipScores:
    """CLIP scores as users of transformers compute them, from PIL images."""

    def __init__(self, setup: Setup) -> None:
        from transformers import AutoProcessor, CLIPModel

        self.setup = setup
        self.model = CLIPModel.from_pretrained(setup.clip, torch_dtype=setup.dtype).to(setup.device)
        self.processor = AutoProcessor.from_pretrained(setup.clip)

    @torch.inference_mode()
    def __call__(self, images: list[Any], prompts: list[str]) -> list[float]:
        length = self.model.config.text_config.max_position_embeddings
        given = self.processor(
            text=prompts, images=images, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        found = self.model(**{k: v.to(self.setup.device) for k, v in given.items()})
        return (found.image_embeds * found.text_embeds).sum(dim=1).tolist()


def diffusers_job(setup: Setup, started: float, tune: bool = False, channels_last: bool = False) -> Outcome:
    """Draw, score and save in batches; tuned: compiled after a first batch that is not counted, PNGs by 14 threads."""
    pipe, score = pipeline(setup), ClipScores(setup)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    prompts, note = texts(setup.count), ""
    if tune:
        tuned(pipe, setup)
        began = time.time()
        call(pipe, texts(setup.batch), steps=2)
        note = f"after {time.time() - began:.0f} s of compiling"
    clock = Clock(pipe.unet, started)
    with ThreadPoolExecutor(14) as pool:
        for i in range(0, setup.count, setup.batch):
            part = prompts[i : i + setup.batch]
            images = call(pipe, part)
            score(images, part)
            saves = [(image, setup.out / f"{i + k:06d}.png") for k, image in enumerate(images)]
            if tune:
                for image, path in saves:
                    pool.submit(image.save, path).add_done_callback(lambda _: clock.finish())
            else:
                for image, path in saves:
                    image.save(path)
                    clock.finish()
    return clock.outcome(note)


def diffusers_one(setup: Setup, started: float) -> Outcome:
    """Draw pictures one at a time, after a first one, neither scored nor saved."""
    pipe = pipeline(setup)
    return one_by_one(lambda: call(pipe, texts(1)), Clock(pipe.unet, started), setup)


def diffusers_mixed(setup: Setup, started: float) -> Outcome:
    """Draw the mixed job in batches of equal settings, as large as they come."""
    pipe = pipeline(setup)
    clock = Clock(pipe.unet, started)
    for (steps, guidance, large), rows in grouped(mixed(setup.count)):
        for i in range(0, rows, setup.batch):
            some = texts(min(setup.batch, rows - i))
            clock.finish(len(call(pipe, some, steps, guidance, setup.side(large))))
    return clock.outcome()


# ----------------------------------------------------------------------------------------------------------- genkit


def generator(setup: Setup, **options: Any) -> Any:
    from genkit import TextToImage

    return TextToImage.from_pretrained(setup.model, device=setup.device, **options)


def genkit_job(setup: Setup, started: float, graphs: bool = True) -> Outcome:
    """`genkit generate` of a prompt file: scores, files, gallery."""
    from genkit import generate
    from genkit.device import graphs as recorded
    from genkit.sampling.denoiser import Denoiser

    if not graphs:
        recorded.MOST_POSITIONS = 0
    began: list[float] = []
    draw = Denoiser.__call__

    def first(*given: Any) -> Any:
        began.append(time.time()) if not began else None
        return draw(*given)

    Denoiser.__call__ = first  # type: ignore[method-assign, assignment]
    file = setup.out / "prompts.txt"
    file.write_text("\n".join(texts(setup.count)) + "\n")
    fields = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    generate(file, setup.out / "run", model=str(setup.model), clip=str(setup.clip), device=setup.device,
             defaults=fields)  # fmt: skip
    times = sorted(path.stat().st_mtime for path in (setup.out / "run" / "images").rglob("*.png"))
    return Outcome([t - began[0] for t in times], times[0] - started)


def genkit_pictures(setup: Setup, started: float, interval: list[float] | None = None) -> Outcome:
    """Pictures only: neither scored nor saved."""
    from genkit import Request

    gen = generator(setup)
    clock = Clock(gen.unet, started)
    rows = [
        Request(prompt=p, num_inference_steps=STEPS, guidance_scale=GUIDANCE, guidance_interval=interval)
        for p in texts(setup.count)
    ]
    return drained(gen.stream(rows), clock)


def genkit_one(setup: Setup, started: float) -> Outcome:
    """Draw pictures one at a time, after a first one, neither scored nor saved."""
    gen = generator(setup)
    draw = lambda: gen(texts(1)[0], num_inference_steps=STEPS, guidance_scale=GUIDANCE)  # noqa: E731
    return one_by_one(draw, Clock(gen.unet, started), setup)


def genkit_low(setup: Setup, started: float) -> Outcome:
    """Draw one picture in as little memory as may be."""
    gen = generator(setup, memory="low")
    clock = Clock(gen.unet, started)
    gen(texts(1)[0], num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    clock.finish()
    return clock.outcome()


def genkit_mixed(setup: Setup, started: float, static: bool = False) -> Outcome:
    """Draw the mixed job in one go; static: in batches of equal settings, each finished before the next begins."""
    from genkit import Request

    gen = generator(setup)
    clock = Clock(gen.unet, started)

    def rows(settings: tuple[int, float, bool], count: int) -> list[Any]:
        steps, guidance, large = settings
        return [
            Request(prompt=p, num_inference_steps=steps, guidance_scale=guidance,
                    width=setup.side(large), height=setup.side(large))
            for p in texts(count)
        ]  # fmt: skip

    if not static:
        every = [rows(settings, 1)[0].filled({"id": f"{k}"}) for k, settings in enumerate(mixed(setup.count))]
        return drained(gen.stream(every), clock)
    for settings, count in grouped(mixed(setup.count)):
        for i in range(0, count, setup.batch):
            drained(gen.stream(rows(settings, min(setup.batch, count - i)), slots=setup.batch * 3), clock)
    return clock.outcome()


# ------------------------------------------------------------------------------------------------------------ common


def one_by_one(draw: Callable[[], Any], clock: Clock, setup: Setup) -> Outcome:
    draw()
    clock.finish()
    seconds = []
    for _ in range(setup.count):
        wait(setup.device)
        began = time.time()
        draw()
        wait(setup.device)
        seconds.append(time.time() - began)
    middle = statistics.median(seconds)
    return Outcome([middle * (k + 1) for k in range(setup.count)], clock.times[0] - clock.started)


def drained(results: Iterable[Any], clock: Clock) -> Outcome:
    for result in results:
        if result.status != "done":
            raise SystemExit(f"image {result.id}: {result.reason}")
        clock.finish()
    return clock.outcome()


def late_rate(times: list[float]) -> float:
    """Return the pictures a second of the last third, from sorted times; waves of pictures are taken whole."""
    gaps = [i for i in range(1, len(times)) if times[i] - times[i - 1] > 0.02 * times[-1]]
    two_thirds = 2 * len(times) // 3
    # The wave that begins nearest to two thirds; where pictures come one by one, that picture
    first = min(gaps, key=lambda i: abs(i - two_thirds), default=0) if len(gaps) < len(times) // 2 else two_thirds
    return (len(times) - first) / (times[-1] - (times[first - 1] if first else 0.0))


def mixed(count: int) -> Iterator[tuple[int, float, bool]]:
    """Yield the (steps, guidance, large) of every request of the mixed job: 10 to 50 steps, half of them unguided."""
    for k in range(count):
        yield 10 + 10 * (k * 7 % 5), GUIDANCE if k % 2 else 1.0, k % 5 == 0


def grouped(settings: Iterable[tuple[int, float, bool]]) -> list[tuple[tuple[int, float, bool], int]]:
    found: dict[tuple[int, float, bool], int] = {}
    for s in settings:
        found[s] = found.get(s, 0) + 1
    return list(found.items())
