"""Denoise draws in slots, then decode, check and score the finished ones; on a GPU both at the same time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import torch

from genkit.device.graphs import RECORDING
from genkit.device.memory import PICTURES
from genkit.device.outofmemory import attempt
from genkit.errors import InputError
from genkit.phases import phase
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.sampling.codec import quantise
from genkit.sampling.draws import Draws
from genkit.sampling.engine import Engine, Trajectory
from genkit.sampling.guidance import rows_of
from genkit.sampling.pipeline import Pipeline
from genkit.sampling.pruning import EARLY, Pruning

if TYPE_CHECKING:
    from genkit.scoring.panel import Panel

AHEAD = 256  # rows whose prompts are embedded together on a GPU
PENDING = 2  # batches of finished latents that may wait for decoding before denoising waits for them
FLAT = 2  # of 255 levels: a picture whose channels each vary by no more is constant

Draw = tuple[Request, int, int]  # request, index, seed


class Stream:
    """The state of one `Generator.stream`. Only the thread that iterates `run` uses the draws."""

    def __init__(self, generator: Pipeline, draws: Draws, scorer: Panel | None, seed: int) -> None:
        self.generator, self.draws, self.scorer, self.seed = generator, draws, scorer, seed
        self.deferred: Draw | None = None  # taken from the draws, but too large for the free slots
        self.retries: deque[Draw] = deque()  # NaN in half precision: redone in float32
        self.pending: deque[Future[list[Result]]] = deque()
        self.results: deque[Result] = deque()  # not yet reported and yielded
        # Identical images (same settings and seed) are denoised once and share the latent.
        self.repeated = draws.repeated()  # how many of each are still to come
        self.duplicates: dict[tuple[str, int], list[Draw]] = {}  # draws that wait for an identical one in flight
        self.finished: dict[tuple[str, int], Trajectory] = {}  # finished ones, of which identical draws are to come
        self.shared: list[Trajectory] = []  # copies of finished ones, for their duplicates
        self.to_decode: list[Trajectory] = []
        self.starved = False  # slots are free and there is nothing left to draw
        self.early = True  # no picture was decoded yet
        self.decode_stream: Any = None  # the CUDA stream of decoding and scoring
        self.half = generator.unet.dtype != torch.float32
        # A caller's own scorer need not declare names
        scored = "clip" in getattr(scorer, "names", ("clip",))
        self.pruning = Pruning(draws.earlier, functools.partial(self._finish, look=False), scored=scored)

    def run(self, slots: float) -> Iterator[Result]:
        """Yield the results as they finish. Passes repeat as long as gated rows draw more after their results."""
        cuda = self.generator.device.type == "cuda"
        # On a GPU a second thread with its own CUDA stream decodes and scores while the next images are denoised. On a
        # CPU two torch threads would only compete for the same cores.
        pool = ThreadPoolExecutor(1, "genkit-decode") if cuda and self.generator.residency.steady else None
        refiner = self.generator.refiner
        self.engine = engine = Engine(
            self.generator.denoiser, self.generator.device, slots, self._relieve,
            refiner=None if refiner is None else refiner.denoiser, steady=self.generator.residency.steady,
            watch=self.draws.watch,
        )  # fmt: skip
        self.draws.engine = engine
        if pool is not None and self.generator.residency.resident:
            pool.submit(self._rehearse)
        try:
            progress = True
            while (progress or self.draws.more()) and not self.draws.stopped:
                progress = yield from self._pass(engine, self._draw, pool)
                if self.retries and not self.draws.stopped:
                    progress |= yield from self._retry_in_float32(engine, pool)
        finally:
            if engine.slots < slots:
                self.generator.most_slots = engine.slots
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _retry_in_float32(self, engine: Engine, pool: ThreadPoolExecutor | None) -> Generator[Result, None, bool]:
        """Redo in float32 the images that were NaN; if memory does not allow it, they fail as NaN."""
        with contextlib.ExitStack() as stack:
            widened = attempt(lambda: stack.enter_context(self._float32()) or True)
            if not widened:
                self.results += [_result(draw, "failed", "nan", {"nan": True}) for draw in self.retries]
                self.retries.clear()
            return (yield from self._pass(engine, lambda: self.retries.popleft() if self.retries else None, pool))

    def _relieve(self) -> bool:
        """Wait for running decodes, which frees memory; return whether there were any."""
        busy = [future for future in self.pending if not future.done()]
        wait(busy)
        return bool(busy)

    def _pass(
        self, engine: Engine, draw: Callable[[], Draw | None], pool: ThreadPoolExecutor | None
    ) -> Generator[Result, None, bool]:
        progress = False
        for ended in engine.run(lambda free, alone: self._take(draw, free, alone)):
            if ended:
                progress = True
                ended = self.pruning.park(ended)
                self.results += self.pruning.decide()
                self.to_decode += ended + self._shared_by(ended)
                self._submit(pool)
            yield from self._completed(PENDING)
            if self.draws.stopped:
                return False
        self.to_decode += self.shared
        self.shared = []
        self._submit(pool, everything=True)
        # Decide on images that are still paused because other images of their row failed or will not come
        self.results += self.pruning.decide(everything=not progress)
        for result in self._completed(0):
            progress = True
            yield result
        return progress or self.pruning.waiting

    def _draw(self) -> Draw | None:
        if self.retries and self.draws.watch is not None:  # with rows without end, this pass would not end for them
            return None
        while (drawn := self.draws.take()) is not None:
            draw = (*drawn, drawn[0].seed_of(drawn[1], self.seed))
            if not self._repeats(draw):
                return draw
        return None

    def _take(self, draw: Callable[[], Draw | None], free: float, alone: bool) -> list[Trajectory]:
        started = self.pruning.take(free, alone)
        free -= sum(t.cost for t in started)
        while (drawn := self.deferred or draw()) is not None:
            self.deferred = None
            try:
                cost = self.generator.cost(drawn[0])
                if cost > free and (started or not alone):
                    self.deferred = drawn
                    break
                self._embed_ahead(drawn[0])
                with phase("embed prompts, draw first noise"):
                    trajectory = attempt(lambda d=drawn: self.generator.begin(*d))  # type: ignore[misc]
            except InputError as error:  # e.g. an initial picture that was deleted meanwhile
                self._fail(drawn, str(error))
                continue
            if trajectory is not None:
                self.pruning.mark(trajectory)
                started.append(trajectory)
                free -= cost
            elif started or not alone:
                self.deferred = drawn
                self.engine.halve(self.engine.slots - free + cost)
                break
            else:
                self._fail(drawn, "out of memory")
        self.starved = free > 0 and not self.deferred
        return started

    def _fail(self, drawn: Draw, reason: str) -> None:
        self.pruning.lose(drawn[0])
        same = self.duplicates.pop((drawn[0].drawing(), drawn[2]), [])
        self.results += [_result(d, "failed", reason) for d in (drawn, *same)]

    def _repeats(self, drawn: Draw) -> bool:
        """Whether an identical image is in flight or finished, so that this one only copies its latent."""
        key = drawn[0].drawing(), drawn[2]
        if key not in self.repeated or drawn[0].prune is not None:  # images of a pruning row may not finish
            return False
        self.repeated[key] -= 1
        if key in self.finished:
            self.shared.append(dataclasses.replace(self.finished[key], tag=drawn))
            if not self.repeated[key]:
                del self.finished[key]
        elif key in self.duplicates:
            self.duplicates[key].append(drawn)
        else:
            self.duplicates[key] = []
            return False
        return True

    def _shared_by(self, ended: list[Trajectory]) -> list[Trajectory]:
        """Return trajectories for the draws that share the latent of a finished one."""
        for trajectory in ended if self.duplicates else ():
            request, _, seed = trajectory.tag
            key = request.drawing(), seed
            if key not in self.duplicates:
                continue
            self.shared += [dataclasses.replace(trajectory, tag=draw) for draw in self.duplicates.pop(key)]
            if self.repeated[key] > 0:
                self.finished[key] = dataclasses.replace(
                    trajectory,
                    cond=None,
                    uncond=None,
                    changes={},
                    keep_mask=None,
                    known=None,
                    beside=None,
                    refined=None,
                )
        shared, self.shared = self.shared, []
        return shared

    def _embed_ahead(self, request: Request) -> None:
        """Embed the prompts of many rows at once: 32 take a GPU as long as one, and the encoder is moved once."""
        text = self.generator.text
        if text is None or self.generator.device.type == "cpu":
            return
        if not request.loras and not text.knows(*self.generator.texts([request])):
            firsts, *seconds = self.generator.texts(
                [request, *(row for row in self.draws.upcoming(AHEAD) if not row.loras)]
            )
            attempt(lambda: text(firsts, (), *seconds))
            if (refiner := self.generator.refiner) is not None:
                attempt(lambda: refiner.text(firsts))

    def _submit(self, pool: ThreadPoolExecutor | None, everything: bool = False) -> None:
        """Start decoding the finished latents, one batch for each latent shape.

        Several are gathered for one batch where that is faster: on a GPU while its slots are full, but for the first
        pictures, and when the UNet has to leave the device for the VAE.
        """
        steady = self.generator.residency.steady
        shapes: dict[tuple[int, ...], list[Trajectory]] = {}
        for trajectory in self.to_decode:
            shapes.setdefault(tuple(trajectory.latent.shape), []).append(trajectory)
        self.to_decode = []
        for ended in shapes.values():
            patient = not (pool is None or self.starved or self.early) if steady else True
            patient = patient and self.draws.watch is None  # with rows without end, the last of a shape may never come
            if patient and not everything and len(ended) < PICTURES:
                self.to_decode += ended
                continue
            self.early = False
            if pool is not None:
                event = torch.cuda.Event()
                event.record()
                self.pending.append(pool.submit(self._finish_on_gpu, ended, event))
            else:
                done: Future[list[Result]] = Future()
                done.set_result(self._finish(ended))
                self.pending.append(done)

    def _completed(self, waiting: int) -> Iterator[Result]:
        """Yield the results of finished batches, in order, until at most `waiting` batches are running."""
        while self.pending and (len(self.pending) > waiting or self.pending[0].done()):
            with phase("wait for decoding"):
                self.results += self.pending.popleft().result()
        while self.results:
            result = self.results.popleft()
            self.draws.report(result)
            yield result

    def _finish_on_gpu(self, ended: list[Trajectory], event: Any) -> list[Result]:
        # One stream for all batches: memory freed on a stream can only be reused on that stream.
        with torch.cuda.stream(self.decode_stream), torch.inference_mode(), RECORDING:
            torch.cuda.current_stream().wait_event(event)
            for trajectory in ended:
                trajectory.latent.record_stream(torch.cuda.current_stream())
            with phase("copy to the host"):
                return self._finish(ended)

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Decode and score a blank picture, so that libraries load their kernels before the first one is waited for."""
        generator = self.generator
        self.decode_stream = torch.cuda.Stream(generator.device, priority=-1)
        with torch.cuda.stream(self.decode_stream), RECORDING, phase("rehearse"):
            shape = generator.geometry.latent_shape(generator.geometry.width, generator.geometry.height)
            blank = torch.zeros(1, *shape, device=generator.device)
            pictures = attempt(lambda: quantise(generator.codec.decode(blank))[0])
            clip = getattr(self.scorer, "clip", None)
            if pictures is not None and clip is not None:
                attempt(lambda: clip.embed_images(pictures))

    @torch.inference_mode()
    def _finish(self, ended: list[Trajectory], look: bool = True) -> list[Result]:
        """Decode, check and score trajectories of one shape; those to be redone in float32 are not in the results.

        look: whether vision models other than CLIP score them too; not for predicted pictures, which are only ranked.
        """
        results = [_result(t.tag, "failed", t.error, since=t.began) for t in ended if t.error]
        whole = []
        for trajectory in (t for t in ended if not t.error):
            if bool(torch.isfinite(trajectory.latent).all()):
                whole.append(trajectory)
            elif self.half:
                self.retries.append(trajectory.tag)
            else:
                results.append(_result(trajectory.tag, "failed", "nan", {"nan": True}, trajectory.began))
        if not whole:
            return results
        with phase("decode", self.generator.device):
            decoded = attempt(lambda: quantise(self.generator.codec.decode(torch.stack([t.latent for t in whole]))))
        with phase("score", self.generator.device):
            scores = None if decoded is None else attempt(lambda: self._score(whole, decoded[0], look))
        if decoded is None or scores is None:
            return results + [_result(t.tag, "failed", "out of memory", since=t.began) for t in whole]
        pictures, bad = decoded
        spread = pictures.amax(dim=(2, 3)).int() - pictures.amin(dim=(2, 3)).int()
        flat = (spread <= FLAT).all(dim=1).tolist()
        for k, pixels in enumerate(pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
            t = whole[k]
            found = {"nan": bad[k], "flat": flat[k]}
            if bad[k] or flat[k]:  # a NaN becomes a constant picture when it is clamped
                results.append(_result(t.tag, "failed", "nan", found, t.began))
                continue
            embedding = scores[k].pop("embedding", None)
            early = self.pruning.early.get((str(t.tag[0].id), t.tag[1]))
            found |= {} if early is None else {EARLY: early}
            result = _result(t.tag, "done", None, {**scores[k], **found}, t.began)
            result.embedding = embedding
            result.pixels, (result.height, result.width) = pixels, pixels.shape[:2]
            result.steps = self.generator.settings(t.tag[0]).steps
            result.nfe = rows_of(t.plan.nfe, t.scales, t.weights)
            results.append(result)
        return results

    def _score(self, ended: list[Trajectory], pictures: torch.Tensor, look: bool) -> list[dict[str, Any]]:
        if self.scorer is None:
            return [{} for _ in ended]
        requests = [t.tag[0] for t in ended]
        prompts, labels = [r.plain_prompt for r in requests], [r.labels for r in requests]
        if not all(map(self.draws.scored, requests)):
            some = [t for t in ended if self.draws.scored(t.tag[0])]
            rows = torch.tensor([self.draws.scored(r) for r in requests], device=pictures.device)
            found = iter(self._score(some, pictures[rows], look) if some else ())
            return [next(found) if self.draws.scored(r) else {} for r in requests]
        senses = getattr(self.scorer, "senses", None)  # a caller's own scorer need not have any
        if senses is None or not senses.names or not look:
            return self.scorer.scores(pictures, prompts, labels)
        return self.scorer.scores(pictures, prompts, labels, [r.asked for r in requests])

    @contextlib.contextmanager
    def _float32(self) -> Iterator[None]:
        self.half = False
        try:
            with contextlib.ExitStack() as stack:
                for part in (self.generator, self.generator.refiner):
                    if part is not None:
                        stack.enter_context(part.denoiser.in_float32())
                yield
        finally:
            self.half = True


def _result(
    draw: Draw, status: str, reason: str | None, scores: dict[str, Any] | None = None, since: float | None = None
) -> Result:
    request, index, seed = draw
    return Result(
        id=str(request.id),
        index=index,
        seed=seed,
        status=status,
        reason=reason,
        scores=scores or {},
        seconds=None if since is None else round(time.monotonic() - since, 3),
        prompt=request.plain_prompt,
        meta=request.meta,
    )
