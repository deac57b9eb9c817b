"""`genkit generate`: rows in; a durable folder of scored and selected images out."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from genkit import __version__
from genkit.components import inspect_model, load_components, weight_hashes
from genkit.components.weights import sha256
from genkit.device import CPU_SLOTS, DTYPES, check_attention, check_device, pick_device
from genkit.draws import Draws
from genkit.encoders import encoding
from genkit.errors import EXIT_OK, EXIT_SIGINT, EXIT_SIGTERM, EXIT_SOME_FAILED, InputError
from genkit.gallery import write_gallery
from genkit.guidance import network_rows
from genkit.metadata import texts
from genkit.plans import is_tuned, plan_for, tuned_file
from genkit.progress import Progress
from genkit.prompts import read_prompts
from genkit.request import Request, Result
from genkit.run import Run, read_config
from genkit.schedulers import Plan, Scheduler
from genkit.scoring.gates import Expression
from genkit.selection import decide, passes, write_selection
from genkit.settings import Geometry, settings

if TYPE_CHECKING:
    from genkit.components import ModelInfo

# Images that may wait for a writer before denoising waits for the disk, and the bytes of their pixels: 64 of 1024x1024
QUEUE, QUEUE_BYTES = 64, 2**28
# Most of a small image's time is waiting for the disk. Of 128x128, on two cores: 1 thread 152 images/s, 2 334, 4 447,
# 8 725, 16 887; of 512x512, which keep the cores busy, two threads and more alike.
WRITERS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What holds for a whole run. model, clip: name, folder or hub id; clip "auto" is emoji-clip for emoji."""

    model: str = "emoji"
    clip: str = "auto"
    variant: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None  # slots; None: by device and memory
    seed: int = 0  # rows without a seed derive theirs from it
    quiet: bool = False
    compile: bool = False
    attention: str = "auto"
    format: str = "png"  # webp, jpeg, jxl
    quality: int | None = None  # 1 to 100, of formats other than png; None: encoders.QUALITY


@dataclasses.dataclass(frozen=True)
class Job:
    """Checked work: rows with every default filled in, the model and scorer they are for, and what they will cost."""

    rows: list[Request]
    options: Options
    info: ModelInfo
    clip: ModelInfo | None
    calls: int  # network rows for all images that will certainly be drawn

    def describe(self) -> dict[str, Any]:
        """Return what `--dry-run` prints."""
        most = sum(r.max_images or r.num_images for r in self.rows)
        return {
            "rows": len(self.rows),
            "images": sum(r.num_images for r in self.rows),
            "images_at_most": most,
            "slots": self.options.batch_size or (CPU_SLOTS if self.options.device == "cpu" else "by device"),
            "network_calls": self.calls,
            "model": self.info.name,
            "clip": None if self.clip is None else self.clip.name,
            "format": str(encoding(self.options.format, self.options.quality)),
        }


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended. exit_code is that of the command."""

    folder: str
    rows: int
    images: int
    new: int
    kept: int
    failed: int
    seconds: float
    exit_code: int
    stopped: bool = False

    @property
    def images_per_second(self) -> float:
        """New images over the whole wall time, loading included."""
        return self.new / self.seconds if self.seconds else 0.0


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived: finish what is being written and leave."""


def generate(
    prompts: str | Path | Sequence[Request],
    out: str | Path,
    *,
    model: str = "emoji",
    clip: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    defaults: dict[str, Any] | None = None,
    quiet: bool = False,
    compile: bool = False,
    attention: str = "auto",
    format: str = "png",
    quality: int | None = None,
) -> Summary:
    """Make every image of a prompt file, or of a list of Requests, in folder `out`; what is there is not redone.

    defaults: fields (num_inference_steps, guidance_scale, …) for rows that do not state them. format: png, webp, jpeg
    or jxl; quality, of the last three: 1 to 100, at which webp and jxl keep every bit. Raises InputError, before
    anything is loaded or written, for bad input, and HostError where disk, lock or device do not allow the work.
    """
    rows = read_prompts(prompts, defaults) if isinstance(prompts, str | Path) else list(prompts)
    options = Options(model, clip, None, device, dtype, batch_size, seed, quiet, compile, attention, format, quality)
    summary = run_job(plan_job(rows, options, defaults or {}), Path(out))
    if summary.exit_code == EXIT_SIGINT:
        raise KeyboardInterrupt  # what is finished is saved: the same call goes on
    if summary.exit_code == EXIT_SIGTERM:
        raise SystemExit(EXIT_SIGTERM)
    return summary


def plan_job(rows: Sequence[Request], options: Options, defaults: dict[str, Any]) -> Job:
    """Check everything that can be checked without torch; raises InputError naming the row and field at fault."""
    check_device(options.device, options.dtype)
    check_attention(options.attention)
    encoding(options.format, options.quality)
    info = inspect_model(options.model, variant=options.variant)
    if info.kind == "clip":
        raise InputError(f"--model: {options.model} is a CLIP model: it scores pictures and draws none")
    clip_name = options.clip if options.clip != "auto" else "emoji-clip" if info.name == "emoji" else "none"
    clip = None if clip_name == "none" else inspect_model(clip_name)
    if clip is not None and clip.kind != "clip":
        raise InputError(f"--clip: {clip_name} is a model of kind {clip.kind}, not a CLIP model")
    geometry = Geometry.of(info.configs["unet"], info.configs.get("vae"))
    scheduler = Scheduler.from_config(info.scheduler_config)
    plans: dict[str, Plan] = {}
    filled: list[Request] = []
    calls = 0
    for number, given in enumerate(rows):
        where = given.source or f"request {number}"
        try:
            row = given.filled({"id": f"{number:06d}", **defaults})
            row = _complete(row, geometry, info.defaults)
            calls += row.num_images * _calls_for(row, scheduler, plans, info.folder)
            _check_scores(row, clip)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        filled.append(row)
    return Job(filled, options, info, clip, calls)


def _complete(row: Request, geometry: Geometry, defaults: dict[str, Any]) -> Request:
    """Return the row with the model's defaults written out: requests.jsonl says all that the picture depends on."""
    s = settings(row, geometry, defaults)
    found: dict[str, Any] = {"num_inference_steps": s.steps, "width": s.width, "height": s.height}
    if geometry.text:
        found["guidance_scale"] = s.guidance
    if row.image is not None:
        found["strength"] = s.strength
    return row.filled(found)


def _calls_for(row: Request, scheduler: Scheduler, plans: dict[str, Plan], folder: Path) -> int:
    """Return the network rows that one image takes, and find out whether its scheduler settings work at all."""
    steps, strength, guidance = row.num_inference_steps or 1, row.strength or 1.0, row.guidance_scale or 1.0
    key = repr((row.scheduler, steps, strength, guidance))
    if key not in plans:
        plans[key] = plan_for(scheduler, row.scheduler, steps, strength, guidance, folder)
    return network_rows(plans[key], guidance, row.guidance_interval)


def _check_scores(row: Request, clip: ModelInfo | None) -> None:
    """Refuse a row that decides on, or asks for, scores which nothing will compute."""
    if clip is not None:
        return
    for field in ("gate", "rank_by"):
        text = getattr(row, field)
        if text is not None and Expression(text, labels=row.labels).needs_scorer:
            raise InputError(f"{field}: {text!r} needs a CLIP model, and there is none: give --clip")
    if row.labels is not None:
        raise InputError("labels: need a CLIP model, and there is none: give --clip")


def run_job(job: Job, out: Path) -> Summary:
    """Draw what is missing of the job in folder `out`, then decide, and write the gallery."""
    began = time.monotonic()
    recorded = read_config(out)
    # The first run loads before it writes, so that weights that do not fit leave nothing behind; a later one scans
    # the folder first: another process may hold it, or nothing may be left to do.
    loaded = _load(job, recorded) if recorded is None else None
    with Run.open(out, _config(job, loaded, recorded), job.rows) as run:
        draws = Draws(job.rows, run.done)
        stopped = EXIT_OK
        with Progress(draws.total, len(run.done), quiet=job.options.quiet) as progress:
            for line in run.notes:
                progress.say(line)
            if draws.has_next():
                stopped = _draw(job, run, draws, progress, loaded or _load(job, recorded))
        results = list(run.results.values())
        selection = decide(job.rows, results)
        write_selection(out, selection)
        write_gallery(out, job.rows, results, selection, run.config)
    failed = sum(r.status == "failed" for r in results)
    return Summary(
        folder=str(out),
        rows=len(job.rows),
        images=len(results) - failed,
        new=progress.done - progress.earlier - progress.failed,
        kept=sum(image["kept"] for image in selection["images"].values()),
        failed=failed,
        seconds=round(time.monotonic() - began, 2),
        exit_code=stopped or (EXIT_SOME_FAILED if failed else EXIT_OK),
        stopped=bool(stopped),
    )


def _load(job: Job, recorded: dict[str, Any] | None) -> tuple[Any, Any]:
    """Return (generator, scorer or None), on the device and in the dtype of the run's first start when it has one."""
    from genkit.generators import Generator
    from genkit.scoring.clip import ClipScorer

    before = (recorded or {}).get("binding", {})
    asked = {"device": job.options.device, "dtype": job.options.dtype}
    device, dtype = pick_device(*(before.get(key, "auto") if name == "auto" else name for key, name in asked.items()))
    parts = load_components(job.info, device=device, dtype=dtype)
    generator = Generator.from_components(parts, compile=job.options.compile, attention=job.options.attention)
    scorer = None
    if job.clip is not None:
        scorer = ClipScorer.from_components(load_components(job.clip, device=device, dtype=dtype))
    return generator, scorer


def _config(job: Job, loaded: tuple[Any, Any] | None, recorded: dict[str, Any] | None) -> dict[str, Any]:
    """Return run.json: under "binding" what a later start must agree with, under "info" what it may like to know."""
    o = job.options
    models = {"model": job.info, "clip": job.clip}
    binding: dict[str, Any] = {"seed": o.seed, "variant": o.variant, "format": str(encoding(o.format, o.quality))}
    for name, info in models.items():
        binding[name] = None if info is None else {"name": info.name, "weights": weight_hashes(info)}
    binding["scheduler"] = job.info.scheduler_config
    used = {tuned_file(str(row.scheduler), job.info.folder) for row in job.rows if is_tuned(row.scheduler)}
    binding |= {"tuned": {file.name: sha256(file) for file in sorted(used)}} if used else {}
    if recorded is not None:
        same = {"device": o.device.split(":")[0], "dtype": DTYPES.get(o.dtype, o.dtype)}
        for key, asked in same.items():
            binding[key] = recorded["binding"].get(key) if asked == "auto" else asked
        return {"binding": binding, "info": recorded["info"]}
    assert loaded is not None
    generator = loaded[0]
    binding["device"] = generator.device.type
    binding["dtype"] = str(generator.unet.dtype).removeprefix("torch.")
    return {"binding": binding, "info": {**_versions(), "attention": generator.attention.text}}


def _versions() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "safetensors", "pillow", "numpy")
    return {
        "genkit": __version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **{name: version(name) for name in packages},
    }


def _draw(job: Job, run: Run, draws: Draws, progress: Progress, parts: tuple[Any, Any]) -> int:
    """Draw what is missing; return 0, or the exit code of the signal that stopped it."""
    generator, scorer = parts
    writers = _Writers(run, job)
    gates = {r.id: Expression(r.gate, labels=r.labels) for r in job.rows if r.gate is not None}
    stream = generator.stream(draws, scorer=scorer, slots=job.options.batch_size, seed=job.options.seed)
    said = list(generator.attention.notes)
    for note in said:
        progress.say(note)
    with _Signals() as signals:
        try:
            signals.armed = True
            for result in stream:
                writers.put(result)
                passed = result.status == "done" and passes(gates.get(result.id), result.scores)
                progress.advance(result, passed, draws.total)
                if result.status == "failed":
                    progress.say(f"row {result.id}, image {result.index}: failed: {result.reason}")
            signals.armed = False
        except Interrupted:
            progress.say("stopping: writing what is finished")
        finally:
            stream.close()
            writers.close()
    stopped = signals.exit_code
    if stopped:
        progress.say(
            f"stopped with {len(run.done)} of {progress.total} images saved; the same command goes on from here"
        )
    for note in [*generator.attention.notes[len(said) :], *generator.denoiser.notes]:
        progress.say(note)
    text = getattr(generator, "text", None)
    for prompt in sorted(text.truncated if text is not None else ()):
        progress.say(f"prompt longer than the model reads, its end had no say: {prompt[:80]}")
    return stopped


class _Writers:
    """Threads that encode and save pictures while the next are drawn; `put` waits when they fall behind."""

    def __init__(self, run: Run, job: Job) -> None:
        self.run, self.job = run, job
        self.encoding = encoding(job.options.format, job.options.quality)
        self.rows = {r.id: r for r in job.rows}
        self.pool = ThreadPoolExecutor(WRITERS, "genkit-write")
        self.waiting: deque[tuple[Future[None], int]] = deque()  # with the bytes of its pixels
        self.bytes = 0

    def put(self, result: Result) -> None:
        """Hand over one result. Raises what an earlier write raised, say HostError for a full disk."""
        size = 0 if result.pixels is None else result.pixels.nbytes
        self.bytes += size
        self.waiting.append((self.pool.submit(self._write, result), size))
        while self.waiting and (self._full() or self.waiting[0][0].done()):
            future, size = self.waiting.popleft()
            self.bytes -= size
            future.result()

    def _full(self) -> bool:
        return len(self.waiting) > QUEUE or (self.bytes > QUEUE_BYTES and len(self.waiting) > 1)

    def close(self) -> None:
        """Wait for the writes under way."""
        self.pool.shutdown(wait=True)
        for future, _ in self.waiting:
            future.result()

    def _write(self, result: Result) -> None:
        if result.status != "done":
            self.run.fail(result)
            return
        text = texts(self.rows[result.id].to_json(), result, self.job.info.name, __version__)
        self.run.save(result, self.encoding.encode(result.pixels, text), self.encoding.suffix)
        result.pixels = None  # it is on disk now; thousands of them would not fit in memory


class _Signals:
    """While open, the first SIGINT or SIGTERM raises Interrupted where `armed`; a second one leaves at once.

    Only the main thread may catch signals: elsewhere this does nothing.
    """

    CODES: ClassVar = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}

    def __init__(self) -> None:
        self.armed, self.exit_code = False, EXIT_OK
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)

    def _handle(self, number: int, _frame: object) -> None:
        if self.exit_code:
            os._exit(self.exit_code)
        if self.armed:
            self.armed, self.exit_code = False, self.CODES[signal.Signals(number)]
            raise Interrupted
