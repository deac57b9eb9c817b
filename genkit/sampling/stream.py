"""One pass over the draws: denoise in slots, then decode, check and score what ends, side by side on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
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
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.sampling.codec import quantise
from genkit.sampling.draws import Draws
from genkit.sampling.engine import Engine, Trajectory
from genkit.sampling.pipeline import Pipeline
from genkit.sampling.pruning import EARLY, Pruning

if TYPE_CHECKING:
    from genkit.scoring.panel import Panel

AHEAD = 256  # rows whose prompts are embedded together where the text encoder does not stay on the device
PENDING = 2  # batches of finished latents that may wait for decoding before denoising waits for them
FLAT = 2  # a picture whose channels each stay within so many of 255 levels shows nothing

Draw = tuple[Request, int, int]  # request, index, seed


class Stream:
    """The state of one `Generator.stream`. The draws are asked and told by the thread that iterates `run`."""

    def __init__(self, generator: Pipeline, draws: Draws, scorer: Panel | None, seed: int) -> None:
        self.generator, self.draws, self.scorer, self.seed = generator, draws, scorer, seed
        self.held: Draw | None = None  # drawn, but it did not fit the free slots yet
        self.again: deque[Draw] = deque()  # came out as NaN in half precision: to be redone in float32
        self.pending: deque[Future[list[Result]]] = deque()
        self.results: deque[Result] = deque()  # to be reported and yielded
        self.repeated = draws.repeated()  # identical images still to come: all but the first share its latent
        self.waiting: dict[tuple[str, int], list[Draw]] = {}  # … for one that is under way
        self.kept: dict[tuple[str, int], Trajectory] = {}  # … one that ended
        self.shared: list[Trajectory] = []  # … for those that came after it
        self.ready: list[Trajectory] = []  # ended, and to be decoded
        self.starved = False  # slots are free and nothing is there to draw
        self.side: Any = None  # the CUDA stream of decoding and scoring
        self.half = generator.unet.dtype != torch.float32
        # Somebody's own scorer need not say what it gives
        scored = "clip" in getattr(scorer, "names", ("clip",))
        self.pruning = Pruning(draws.earlier, self._finish, scored=scored)

    def run(self, slots: float) -> Iterator[Result]:
        """Yield the results as they finish. Gated rows may draw again after theirs: it goes round until none does."""
        cuda = self.generator.device.type == "cuda"
        # On a GPU a second thread, with a stream of its own, hides decoding and scoring behind denoising. A CPU has no
        # idle part to hide them in: two torch threads only fight over the same cores.
        pool = ThreadPoolExecutor(1, "genkit-decode") if cuda and self.generator.residency.steady else None
        self.engine = engine = Engine(self.generator.denoiser, self.generator.device, slots, self._relieve)
        try:
            progress = True
            while progress:
                progress = yield from self._pass(engine, self._draw, pool)
                if self.again:
                    progress |= yield from self._again(engine, pool)
        finally:
            self.draws.slots_full = engine.slots_full
            if engine.slots < slots:
                self.generator.most_slots = engine.slots
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _again(self, engine: Engine, pool: ThreadPoolExecutor | None) -> Generator[Result, None, bool]:
        """Redo in float32 what came out as NaN; where that takes too much memory, it stays a NaN."""
        with contextlib.ExitStack() as stack:
            widened = attempt(lambda: stack.enter_context(self._float32()) or True)
            if not widened:
                self.results += [_result(draw, "failed", "nan", {"nan": True}) for draw in self.again]
                self.again.clear()
            return (yield from self._pass(engine, lambda: self.again.popleft() if self.again else None, pool))

    def _relieve(self) -> bool:
        """Wait for the decoding under way; return whether there was any."""
        busy = [future for future in self.pending if not future.done()]
        wait(busy)
        return bool(busy)

    def _pass(
        self, engine: Engine, draw: Callable[[], Draw | None], pool: ThreadPoolExecutor | None
    ) -> Generator[Result, None, bool]:
        progress = False
        for ended in engine.run(lambda free, alone: self._take(draw, free, alone)):
            progress = True
            ended = self.pruning.park(ended)
            self.results += self.pruning.decide()
            self.ready += ended + self._shared_by(ended)
            self._submit(pool)
            yield from self._completed(PENDING)
        self.ready += self.shared
        self.shared = []
        self._submit(pool, everything=True)
        # What is parked still, where the last image of its row failed before it began, or will never come
        self.results += self.pruning.decide(everything=not progress)
        for result in self._completed(0):
            progress = True
            yield result
        return progress or self.pruning.waiting

    def _draw(self) -> Draw | None:
        while (drawn := self.draws.take()) is not None:
            draw = (*drawn, drawn[0].seed_of(drawn[1], self.seed))
            if not self._repeats(draw):
                return draw
        return None

    def _take(self, draw: Callable[[], Draw | None], free: float, alone: bool) -> list[Trajectory]:
        started = self.pruning.take(free, alone)
        free -= sum(t.cost for t in started)
        while (drawn := self.held or draw()) is not None:
            self.held = None
            try:
                cost = self.generator.cost(drawn[0])
                if cost > free and (started or not alone):
                    self.held = drawn
                    break
                self._embed_ahead(drawn[0])
                trajectory = attempt(lambda d=drawn: self.generator.begin(*d))  # type: ignore[misc]
            except InputError as error:  # say, an init picture that is gone by now
                self._fail(drawn, str(error))
                continue
            if trajectory is not None:
                self.pruning.mark(trajectory)
                started.append(trajectory)
                free -= cost
            elif started or not alone:
                self.held = drawn
                self.engine.halve(self.engine.slots - free + cost)
                break
            else:
                self._fail(drawn, "out of memory")
        self.starved = free > 0 and not self.held
        return started

    def _fail(self, drawn: Draw, reason: str) -> None:
        self.pruning.lose(drawn[0])
        same = self.waiting.pop((drawn[0].drawing(), drawn[2]), [])
        self.results += [_result(d, "failed", reason) for d in (drawn, *same)]

    def _repeats(self, drawn: Draw) -> bool:
        """Whether an identical image is under way or has ended; this one then needs no drawing of its own."""
        key = drawn[0].drawing(), drawn[2]
        if key not in self.repeated or drawn[0].prune is not None:  # images of a row that prunes may not end
            return False
        self.repeated[key] -= 1
        if key in self.kept:
            self.shared.append(dataclasses.replace(self.kept[key], tag=drawn))
            if not self.repeated[key]:
                del self.kept[key]
        elif key in self.waiting:
            self.waiting[key].append(drawn)
        else:
            self.waiting[key] = []
            return False
        return True

    def _shared_by(self, ended: list[Trajectory]) -> list[Trajectory]:
        """Return trajectories for the draws that share the latent of one that ended, now or before."""
        for trajectory in ended if self.waiting else ():
            request, _, seed = trajectory.tag
            key = request.drawing(), seed
            if key not in self.waiting:
                continue
            self.shared += [dataclasses.replace(trajectory, tag=draw) for draw in self.waiting.pop(key)]
            if self.repeated[key] > 0:
                self.kept[key] = dataclasses.replace(trajectory, cond=None, uncond=None, keep_mask=None, known=None)
        shared, self.shared = self.shared, []
        return shared

    def _embed_ahead(self, request: Request) -> None:
        """Embed the prompts of many rows at once where the text encoder has to be fetched for it."""
        text = self.generator.text
        if text is None or self.generator.residency.resident:
            return
        if not text.knows((request.prompt, request.negative_prompt)):
            rows = [request, *self.draws.upcoming(AHEAD)]
            attempt(lambda: text([prompt for row in rows for prompt in (row.prompt, row.negative_prompt)]))

    def _submit(self, pool: ThreadPoolExecutor | None, everything: bool = False) -> None:
        """Have what has ended decoded, each latent shape by itself.

        `ready` gathers some first where several pictures are decoded for less than as many times one, on a GPU while
        its slots are taken, and where the UNet has to make room for the VAE.
        """
        steady = self.generator.residency.steady
        shapes: dict[tuple[int, ...], list[Trajectory]] = {}
        for trajectory in self.ready:
            shapes.setdefault(tuple(trajectory.latent.shape), []).append(trajectory)
        self.ready = []
        for ended in shapes.values():
            patient = not (pool is None or self.starved) if steady else True
            if patient and not everything and len(ended) < PICTURES:
                self.ready += ended
            elif pool is not None:
                event = torch.cuda.Event()
                event.record()
                self.pending.append(pool.submit(self._finish_on_gpu, ended, event))
            else:
                done: Future[list[Result]] = Future()
                done.set_result(self._finish(ended))
                self.pending.append(done)

    def _completed(self, waiting: int) -> Iterator[Result]:
        """Yield the results of finished batches, in order, until no more than `waiting` are under way."""
        while self.pending and (len(self.pending) > waiting or self.pending[0].done()):
            self.results += self.pending.popleft().result()
        while self.results:
            result = self.results.popleft()
            self.draws.report(result)
            yield result

    def _finish_on_gpu(self, ended: list[Trajectory], event: Any) -> list[Result]:
        # One for all: what is freed on a stream serves that stream only.
        self.side = self.side or torch.cuda.Stream(self.generator.device)
        with torch.cuda.stream(self.side), torch.inference_mode(), RECORDING:
            torch.cuda.current_stream().wait_event(event)
            for trajectory in ended:
                trajectory.latent.record_stream(torch.cuda.current_stream())
            return self._finish(ended)

    @torch.inference_mode()
    def _finish(self, ended: list[Trajectory]) -> list[Result]:
        """Decode, check and score trajectories of one shape. Those to be redone in float32 are left out."""
        results = [_result(t.tag, "failed", t.error, since=t.began) for t in ended if t.error]
        whole = []
        for trajectory in (t for t in ended if not t.error):
            if bool(torch.isfinite(trajectory.latent).all()):
                whole.append(trajectory)
            elif self.half:
                self.again.append(trajectory.tag)
            else:
                results.append(_result(trajectory.tag, "failed", "nan", {"nan": True}, trajectory.began))
        if not whole:
            return results
        decoded = attempt(lambda: quantise(self.generator.codec.decode(torch.stack([t.latent for t in whole]))))
        scores = None if decoded is None else attempt(lambda: self._score(whole, decoded[0]))
        if decoded is None or scores is None:
            return results + [_result(t.tag, "failed", "out of memory", since=t.began) for t in whole]
        pictures, bad = decoded
        spread = pictures.amax(dim=(2, 3)).int() - pictures.amin(dim=(2, 3)).int()
        flat = (spread <= FLAT).all(dim=1).tolist()
        for k, pixels in enumerate(pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
            t = whole[k]
            found = {"nan": bad[k], "flat": flat[k]}
            if bad[k] or flat[k]:  # a constant picture is what a NaN looks like once it is clamped
                results.append(_result(t.tag, "failed", "nan", found, t.began))
                continue
            embedding = scores[k].pop("embedding", None)
            early = self.pruning.early.get((str(t.tag[0].id), t.tag[1]))
            found |= {} if early is None else {EARLY: early}
            result = _result(t.tag, "done", None, {**scores[k], **found}, t.began)
            result.embedding = embedding
            result.pixels, (result.height, result.width) = pixels, pixels.shape[:2]
            result.steps = self.generator.settings(t.tag[0]).steps
            result.nfe = t.plan.nfe + (0 if t.scales is None else int((t.scales > 1).sum()))
            results.append(result)
        return results

    def _score(self, ended: list[Trajectory], pictures: torch.Tensor) -> list[dict[str, Any]]:
        if self.scorer is None:
            return [{} for _ in ended]
        requests = [t.tag[0] for t in ended]
        return self.scorer.scores(pictures, [r.prompt for r in requests], [r.labels for r in requests])

    @contextlib.contextmanager
    def _float32(self) -> Iterator[None]:
        self.half = False
        try:
            with self.generator.denoiser.in_float32():
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
        prompt=request.prompt,
        meta=request.meta,
    )
