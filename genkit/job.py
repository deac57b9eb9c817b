"""`genkit generate`: rows in; a durable folder of scored and selected images out."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.components import inspect_model, load_components, weight_hashes
from genkit.components.geometry import Geometry
from genkit.components.needs import budget_for, describe
from genkit.components.weights import sha256
from genkit.device.devices import CPU_SLOTS, DTYPES, check_attention, check_device, pick_device
from genkit.device.memory import away, check_memory
from genkit.errors import EXIT_OK, EXIT_SIGINT, EXIT_SIGTERM, EXIT_SOME_FAILED, InputError
from genkit.pages.gallery import write_gallery
from genkit.pictures.encoders import encoding
from genkit.progress import Progress
from genkit.rows.plans import is_tuned, plan_for, tuned_file
from genkit.rows.prompts import read_prompts
from genkit.rows.request import Request
from genkit.rows.settings import settings
from genkit.runs.destination import check_binding
from genkit.runs.embeddings import Store
from genkit.runs.records import read_rows
from genkit.runs.rescore import rescore
from genkit.runs.run import Run, read_config
from genkit.runs.writers import Writers
from genkit.sampling.draws import Draws
from genkit.sampling.guidance import network_rows
from genkit.schedulers import Plan, Scheduler
from genkit.scoring.aesthetic import Head, check_head
from genkit.scoring.gates import Expression, check_row, passes
from genkit.scoring.names import known_scores
from genkit.scoring.plugins import Plugin, find_scorers
from genkit.selection.decide import decide, hard_lines, write_selection
from genkit.selection.picking import NONE, Picking, read_known
from genkit.signals import Interrupted, Signals
from genkit.version import __version__

if TYPE_CHECKING:
    from genkit.components import ModelInfo


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
    memory: str = "auto"  # high: everything on the device; low: as little as works; auto: what fits
    aesthetic: str | None = None  # a safetensors file with a head over CLIP embeddings
    scorers: tuple[Any, ...] = ()  # names of installed ones, or functions
    picking: Picking = NONE
    max_total_images: int | None = None  # of the run, earlier ones included: past them no more are begun
    max_seconds: float | None = None  # from the start of this process's part of it


@dataclasses.dataclass(frozen=True)
class Job:
    """Checked work: rows with every default filled in, the model and scorer they are for, and what they will cost."""

    rows: list[Request]
    options: Options
    info: ModelInfo
    clip: ModelInfo | None
    calls: int  # network rows for all images that will certainly be drawn
    scorers: list[Plugin] = dataclasses.field(default_factory=list)

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
            **describe(
                self.info,
                self.clip,
                device=self.options.device,
                dtype=self.options.dtype,
                memory=self.options.memory,
                slots=self.options.batch_size,
                largest=self.largest,
            ),
        }

    @property
    def largest(self) -> tuple[int, int]:
        """Width and height of the largest picture."""
        return max(((r.width or 1, r.height or 1) for r in self.rows), key=lambda size: size[0] * size[1])


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
    hard_rows: int = 0  # drew max_images, and fewer than keep pass
    slots_full: float | None = None  # share of the slots in use while there was more to draw

    @property
    def images_per_second(self) -> float:
        """New images over the whole wall time, loading included."""
        return self.new / self.seconds if self.seconds else 0.0


def generate(
    prompts: str | Path | Sequence[Request],
    out: str | Path,
    *,
    model: str = "emoji",
    clip: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    memory: str = "auto",
    seed: int = 0,
    defaults: dict[str, Any] | None = None,
    quiet: bool = False,
    compile: bool = False,
    attention: str = "auto",
    format: str = "png",
    quality: int | None = None,
    aesthetic: str | None = None,
    scorers: Sequence[Any] = (),
    picking: Picking = NONE,
    max_total_images: int | None = None,
    max_seconds: float | None = None,
) -> Summary:
    """Make every image of a prompt file, or of a list of Requests, in folder `out`; what is there is not redone.

    defaults: fields (num_inference_steps, guidance_scale, …) for rows that do not state them. format: png, webp, jpeg
    or jxl; quality, of the last three: 1 to 100, at which webp and jxl keep every bit. aesthetic: a file with a head
    over CLIP embeddings. scorers: names of installed ones, or functions (scoring/plugins.py). Raises InputError, before
    anything is loaded or written, for bad input, and HostError where disk, lock or device do not allow the work.
    """
    rows = read_prompts(prompts, defaults) if isinstance(prompts, str | Path) else list(prompts)
    options = Options(
        model, clip, None, device, dtype, batch_size, seed, quiet, compile, attention, format, quality, memory,
        aesthetic, tuple(scorers), picking, max_total_images, max_seconds,
    )  # fmt: skip
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
    check_memory(options.memory)
    _check_budget(options)
    info = inspect_model(options.model, variant=options.variant)
    if info.kind == "clip":
        raise InputError(f"--model: {options.model} is a CLIP model: it scores pictures and draws none")
    clip_name = options.clip if options.clip != "auto" else "emoji-clip" if info.name == "emoji" else "none"
    clip = None if clip_name == "none" else inspect_model(clip_name)
    if clip is not None and clip.kind != "clip":
        raise InputError(f"--clip: {clip_name} is a model of kind {clip.kind}, not a CLIP model")
    scorers, computed = _scorers(options, clip)
    options.picking.check()
    if clip is None and options.picking.needs_embeddings:
        raise InputError(f"{options.picking.needs_embeddings}: needs a CLIP model, and there is none: give --clip")
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
            given_up = 0.0 if row.prune is None else row.prune["after"] * (row.num_images - row.whole)
            calls += round((row.whole + given_up) * _calls_for(row, scheduler, plans, info.folder))
            check_row(row.gate, row.rank_by, row.labels, computed)
            if row.prune is not None and row.rank_by is None and "clip" not in computed:
                raise InputError("prune: ranks by clip, which needs a CLIP model, and there is none: give --clip")
            if row.labels is not None and clip is None:
                raise InputError("labels: need a CLIP model, and there is none: give --clip")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        filled.append(row)
    options.picking.check_rows(any(row.keep is not None for row in filled))
    return Job(filled, options, info, clip, calls, scorers)


def _scorers(options: Options, clip: ModelInfo | None) -> tuple[list[Plugin], frozenset[str]]:
    """Return the plugged-in scorers, and the names of all scores that the run will have."""
    if options.aesthetic is not None:
        if clip is None:
            raise InputError("--aesthetic: is a head over CLIP embeddings, and there is no CLIP model: give --clip")
        check_head(Path(options.aesthetic), clip.configs["clip"]["projection_dim"])
    scorers = find_scorers(options.scorers)
    names = [name for plugin in scorers for name in plugin.names]
    return scorers, known_scores(clip is not None, options.aesthetic is not None, names)


def _check_budget(options: Options) -> None:
    if options.max_total_images is not None and options.max_total_images < 1:
        raise InputError(f"--max-total-images: {options.max_total_images} is not 1 or more")
    if options.max_seconds is not None and not 0 < options.max_seconds < 1e9:
        raise InputError(f"--max-seconds: {options.max_seconds:g} is not a number of seconds above 0")


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


def run_job(job: Job, out: Path) -> Summary:
    """Draw what is missing of the job in folder `out`, then decide, and write the gallery."""
    began = time.monotonic()
    recorded = read_config(out)
    # The first run loads before it writes, so that weights that do not fit leave nothing behind; a later one scans
    # the folder first: another process may hold it, or nothing may be left to do.
    loaded = _load(job, recorded) if recorded is None else None
    with Run.open(out, _config(job, loaded, recorded), job.rows) as run:
        until = None if job.options.max_seconds is None else began + job.options.max_seconds
        draws = Draws(job.rows, run.done, job.options.max_total_images, until)
        stopped = EXIT_OK
        with Progress(draws.total, len(run.done), quiet=job.options.quiet) as progress:
            for line in run.notes:
                progress.say(line)
            if draws.has_next() or (run.stale and job.clip is not None):
                loaded = loaded or _load(job, recorded)
                again = rescore(run, loaded[1])
                if again:
                    progress.say(f"{again} images scored again, from their embeddings: labels or other prompts changed")
                    draws = Draws(job.rows, run.done, job.options.max_total_images, until)
                stopped = _draw(job, run, draws, progress, loaded) if draws.has_next() else EXIT_OK
        results = list(run.results.values())
        known = read_known(out, run.config, results, job.options.picking, [row.rank_by for row in job.rows])
        selection = decide(job.rows, results, picking=job.options.picking, known=known)
        write_selection(out, selection)
        write_gallery(out, job.rows, results, selection, run.config)
    for line in hard_lines(selection):
        progress.say(line)
    lacking = 0 if stopped else draws.lacking
    if lacking and draws.short:
        limit = f"--{draws.short.replace('_', '-')}"
        progress.say(f"{limit} is reached and {lacking} rows lack images; the same command, with more, goes on")
    failed = sum(r.status == "failed" for r in results)
    return Summary(
        folder=str(out),
        rows=len(job.rows),
        images=len(results) - failed,
        new=progress.done - progress.earlier - progress.failed,
        kept=sum(image["kept"] for image in selection["images"].values()),
        failed=failed,
        seconds=round(time.monotonic() - began, 2),
        exit_code=stopped or (EXIT_SOME_FAILED if failed or lacking else EXIT_OK),
        stopped=bool(stopped or lacking),
        hard_rows=len(selection["hard"]),
        slots_full=None if draws.slots_full is None else round(draws.slots_full, 4),
    )


def reopen(folder: Path, device: str = "auto") -> tuple[Any, Any, int, int]:
    """Return (generator, scorer or None, slots, seed) as the run in `folder` was drawn with.

    Raises InputError where its model is not there any more, or is another one by now.
    """
    recorded = read_config(folder)
    assert recorded is not None
    binding = recorded["binding"]
    model, clip = ((binding.get(part) or {}).get("name", "none") for part in ("model", "clip"))
    options = Options(
        model, clip, binding.get("variant"), device, seed=binding["seed"],
        aesthetic=recorded["info"].get("aesthetic"), scorers=tuple(binding.get("scorers", ())),
    )  # fmt: skip
    job = plan_job(read_rows(folder), options, {})
    same = {name: binding[name] for name in ("device", "format") if name in binding}
    check_binding(folder, binding, {**_config(job, None, recorded)["binding"], **same})
    generator, scorer = _load(job, recorded)
    return generator, scorer, generator.budget.slots, options.seed


def _load(job: Job, recorded: dict[str, Any] | None) -> tuple[Any, Any]:
    """Return (generator, panel of scorers), on the device and in the dtype of the run's first start when it has one."""
    from genkit.sampling.generators import Generator
    from genkit.scoring.clip import ClipScorer
    from genkit.scoring.panel import Panel

    before = (recorded or {}).get("binding", {})
    asked = {"device": job.options.device, "dtype": job.options.dtype}
    device, dtype = pick_device(*(before.get(key, "auto") if name == "auto" else name for key, name in asked.items()))
    o = job.options
    budget = budget_for(job.info, job.clip, device, dtype, o.memory, o.batch_size, job.largest)
    in_ram = away(budget.level, ("unet", "vae", "text_encoder", "text_encoder_2", "clip"))
    parts = load_components(job.info, device=device, dtype=dtype, in_ram=in_ram)
    generator = Generator.from_components(parts, budget, compile=o.compile, attention=o.attention)
    scorer = head = None
    if job.clip is not None:
        scorer = ClipScorer.from_components(load_components(job.clip, device=device, dtype=dtype, in_ram=in_ram))
        scorer.texts.hold = generator.residency.add("clip", scorer.model)
    if o.aesthetic is not None and job.clip is not None:
        head = Head.load(Path(o.aesthetic), job.clip.configs["clip"]["projection_dim"])
    return generator, Panel(scorer, [row.prompt for row in job.rows], head, job.scorers)


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
    binding |= {"aesthetic": sha256(Path(o.aesthetic))} if o.aesthetic is not None else {}
    binding |= {"scorers": [plugin.name for plugin in job.scorers]} if job.scorers else {}
    if recorded is not None:
        same = {"device": o.device.split(":")[0], "dtype": DTYPES.get(o.dtype, o.dtype)}
        for key, asked in same.items():
            binding[key] = recorded["binding"].get(key) if asked == "auto" else asked
        return {"binding": binding, "info": recorded["info"]}
    assert loaded is not None
    from genkit.components.int8 import is_8_bit

    generator = loaded[0]
    binding["device"] = generator.device.type
    binding["dtype"] = "int8" if is_8_bit(generator.unet) else str(generator.unet.dtype).removeprefix("torch.")
    head = {} if o.aesthetic is None else {"aesthetic": str(Path(o.aesthetic).absolute())}  # where it was; see `reopen`
    return {"binding": binding, "info": {**_versions(), "attention": generator.attention.text, **head}}


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
    note = generator.budget.line(generator.device, job.options.memory)
    if note:
        progress.say(note)
    store = None if job.clip is None else Store(run.folder, job.clip.configs["clip"]["projection_dim"])
    form = encoding(job.options.format, job.options.quality)
    writers = Writers(run, job.rows, form, job.info.name, store)
    gates = {r.id: Expression(r.gate, r.labels, names=None) for r in job.rows if r.gate is not None}
    stream = generator.stream(draws, scorer=scorer, slots=job.options.batch_size, seed=job.options.seed)
    said = list(generator.attention.notes)
    for note in said:
        progress.say(note)
    with Signals(interrupt=True) as signals, _notes(progress):
        try:
            signals.armed = True
            for result in stream:
                writers.put(result)
                passed = result.status == "done" and passes(gates.get(result.id), result.scores)
                progress.advance(result.status == "failed", passed, draws.total)
                if result.status == "failed":
                    progress.say(f"row {result.id}, image {result.index}: failed: {result.reason}")
                for note in scorer.news():
                    progress.say(note)
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
    for note in [*generator.attention.notes[len(said) :], *generator.denoiser.notes, *scorer.news()]:
        progress.say(note)
    text = getattr(generator, "text", None)
    for prompt in sorted(text.truncated if text is not None else ()):
        progress.say(f"prompt longer than the model reads, its end had no say: {prompt[:80]}")
    return stopped


@contextlib.contextmanager
def _notes(progress: Progress) -> Iterator[None]:
    """Say beside the progress what parts of genkit log, say that memory ran out and what is done about it."""
    handler, log = logging.Handler(), logging.getLogger("genkit")
    handler.emit = lambda record: progress.say(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
