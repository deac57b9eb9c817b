"""Check everything that can be checked without torch, and fill in every default: rows and options to a Job."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.components import Part, inspect_model
from genkit.components.geometry import Geometry
from genkit.components.needs import FIRST, describe
from genkit.device.devices import CPU_SLOTS, check_attention, check_device
from genkit.device.memory import CONTROL, TEXTS, Look, check_memory
from genkit.errors import InputError, shown
from genkit.files import place, user_path
from genkit.job.masks import find_segmenter, most_texts
from genkit.job.senses import Checks, find_senses, idle_notes
from genkit.job.words import Inversions, find_inversions
from genkit.options import Options
from genkit.pictures.encoders import encoding
from genkit.rows.controls import networks_of
from genkit.rows.plans import plan_for
from genkit.rows.prompting import check_prompting
from genkit.rows.refining import START, check_refiner, refined_plan
from genkit.rows.request import Request
from genkit.rows.settings import assumed, settings
from genkit.rows.syntax import composed
from genkit.rows.templates import expanded
from genkit.sampling.guidance import network_rows
from genkit.schedulers import Plan, Scheduler
from genkit.scoring.aesthetic import check_head
from genkit.scoring.gates import check_row
from genkit.scoring.names import known_scores
from genkit.scoring.plugins import Plugin, find_scorers
from genkit.vision.footprint import looks, mask_look
from genkit.vision.models import VisionInfo

if TYPE_CHECKING:
    from genkit.components import ModelInfo


@dataclasses.dataclass(frozen=True)
class Job:
    """Checked work: rows with every default filled in, the model and scorer, and what they will cost.

    notes: what of the rows' and models' files was left out, corrected or assumed, a line each. refiner: SDXL's, without
    a VAE, for the steps from the fraction refiner_start on.
    """

    rows: list[Request]
    options: Options
    info: ModelInfo
    clip: ModelInfo | None
    calls: int  # rows that the network computes for the images that will certainly be drawn
    scorers: list[Plugin] = dataclasses.field(default_factory=list)
    notes: tuple[str, ...] = ()
    inversions: Inversions = dataclasses.field(default_factory=Inversions)
    refiner: ModelInfo | None = None
    refiner_start: float = START
    senses: Mapping[str, VisionInfo] = dataclasses.field(default_factory=dict)  # detector, classifier, captioner
    segmenter: VisionInfo | None = None
    controls: Mapping[str, Part] = dataclasses.field(default_factory=dict)  # ControlNets of the rows by their names

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
            **({} if self.refiner is None else {"refiner": self.refiner.name, "refiner_start": self.refiner_start}),
            "clip": None if self.clip is None else self.clip.name,
            **{name: info.name for name, info in self.senses.items()},
            **({} if self.segmenter is None else {"segmenter": self.segmenter.name}),
            **({"controls": sorted(map(os.path.basename, self.controls))} if self.controls else {}),
            "format": str(encoding(self.options.format, self.options.quality)),
            **describe(
                self.weighed,
                self.clip,
                device=self.options.device,
                dtype=self.options.dtype,
                memory=self.options.memory,
                slots=self.options.batch_size,
                largest=self.largest,
                refiner=self.refiner,
                looks=self.looks,
            ),
            **({"embeddings": words} if (words := self.inversions.describe()) else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    @property
    def largest(self) -> tuple[int, int]:
        """Width and height of the largest picture."""
        return max(((r.width or 1, r.height or 1) for r in self.rows), key=lambda size: size[0] * size[1])

    @property
    def weighed(self) -> ModelInfo:
        """The model with the ControlNets among its networks, for what they take of memory."""
        beside = {f"{CONTROL} {n}": part for n, part in enumerate(self.controls.values())}
        return dataclasses.replace(self.info, parts={**self.info.parts, **beside})

    def looks(self, dtype: str, device: str) -> dict[str, Look]:
        """Return what the vision models take in `dtype` on a kind of device, the segmenter's always in float32."""
        found = looks(self.senses, dtype, device, self.largest)
        return found if self.segmenter is None else {**found, FIRST: mask_look(self.segmenter, most_texts(self.rows))}


@dataclasses.dataclass(frozen=True)
class Models:
    """What a job's options name, checked: models and scorers. computed: the names of all scores."""

    info: ModelInfo
    clip: ModelInfo | None
    senses: dict[str, VisionInfo]
    scorers: list[Plugin]
    computed: frozenset[str]
    refiner: ModelInfo | None
    refiner_start: float


def inspect_models(options: Options) -> Models:
    """Check the options of a job, and the models that they name. Raises InputError."""
    check_device(options.device, options.dtype)
    check_attention(options.attention)
    encoding(options.format, options.quality)
    check_memory(options.memory)
    _check_budget(options)
    info = inspect_model(
        options.model, variant=options.variant, vae=options.vae, text_encoder=options.text_encoder,
        prediction=options.prediction,
    )  # fmt: skip
    if info.kind == "clip":
        raise InputError(f"--model: {options.model} is a CLIP model: it scores pictures and draws none")
    clip = _clip(options, info)
    senses = find_senses(options)
    scorers, computed = _scorers(options, clip)
    options.picking.check()
    if clip is None and options.picking.needs_embeddings:
        raise InputError(f"{options.picking.needs_embeddings}: needs a CLIP model, and there is none: give --clip")
    return Models(info, clip, senses, scorers, computed, *_refiner(options, info))


def plan_job(
    rows: Sequence[Request], options: Options, defaults: dict[str, Any], models: Models | None = None
) -> Job:  # fmt: skip
    """Check everything that can be checked without torch; raises InputError naming the row and field at fault.

    models: what `inspect_models` found for the same options, if that is known.
    """
    m = models or inspect_models(options)
    info, clip, senses, computed = m.info, m.clip, m.senses, m.computed
    refiner, start, looked = m.refiner, m.refiner_start, Checks(senses)
    geometry = info.geometry
    assert geometry is not None
    geometry = dataclasses.replace(geometry, scored=geometry.scored or refiner is not None)
    scheduler = Scheduler.from_config(info.scheduler_config)
    refined = None if refiner is None else (start, Scheduler.from_config(refiner.scheduler_config).prediction)
    plans: dict[str, Plan] = {}
    filled: list[Request] = []
    notes = list(getattr(rows, "notes", ()))
    calls = unsaid = 0
    layers = min((info.configs[name]["num_hidden_layers"] for name in TEXTS if name in info.configs), default=None)
    for where, stated in _written(rows, options, defaults):
        try:
            row = _complete(stated, geometry, info.defaults)
            check_prompting(row, layers)
            notes += [f"{where}: {line}" for line in assumed(stated, row)]
            given_up = 0.0 if row.prune is None else row.prune["after"] * (row.num_images - row.whole)
            guided = 1.0 if geometry.guidance_width else row.guidance_scale or 1.0
            unsaid += guided <= 1 and bool(row.negative_prompt or row.negative_prompt_2)
            calls += round((row.whole + given_up) * _calls_for(row, scheduler, plans, info.folder, guided, refined))
            check_row(row.gate, row.rank_by, row.labels, computed, senses, looked.labels)
            looked.check(row)
            _check_clip(row, clip, computed)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        filled.append(row)
    options.picking.check_rows(any(row.keep is not None for row in filled))
    notes += [f"negative_prompt: has no effect without guidance, in {unsaid} rows"] if unsaid else []
    inversions, said = find_inversions(filled, options, info)
    segmenter, seen = find_segmenter(filled, options, defaults)
    notes += [*_check_loras(filled, info), *said, *info.notes, *seen]
    notes += [note for other in (clip, refiner, *senses.values()) if other is not None for note in other.notes]
    notes += idle_notes(senses, filled)
    said_once = tuple(dict.fromkeys(notes))
    return Job(filled, options, info, clip, calls, m.scorers, said_once, inversions, refiner, start, senses, segmenter,
               _controls(filled, info, options.variant))  # fmt: skip


def _clip(options: Options, info: ModelInfo) -> ModelInfo | None:
    """Return the CLIP model that scores, if there is one. Raises InputError."""
    name = options.clip if options.clip != "auto" else "emoji-clip" if info.name == "emoji" else "none"
    clip = None if name == "none" else inspect_model(name)
    if clip is not None and clip.kind != "clip":
        raise InputError(f"--clip: {name} is a model of kind {clip.kind}, not a CLIP model")
    return clip


def _check_clip(row: Request, clip: ModelInfo | None, computed: frozenset[str]) -> None:
    """Raise InputError for a row that needs a CLIP model where there is none."""
    if row.prune is not None and row.rank_by is None and "clip" not in computed:
        raise InputError("prune: ranks by clip, which needs a CLIP model, and there is none: give --clip")
    if row.labels is not None and clip is None:
        raise InputError("labels: need a CLIP model, and there is none: give --clip")


def _written(rows: Sequence[Request], options: Options, defaults: dict[str, Any]) -> Iterator[tuple[str, Request]]:
    """Yield (where it was read, row) of every row, defaults filled in and templates expanded. Raises InputError."""
    folders = [None if name is None else user_path(name) for name in (options.wildcards, options.lora_dir)]
    for option, folder in zip(("--wildcards", "--lora-dir"), folders, strict=True):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{option}: {place(folder)} is not a folder")
    taken: dict[str, str] = {}  # ids in lower case: some file systems ignore case
    for number, given in enumerate(rows):
        where = given.source or f"request {number}"
        try:
            new = expanded(given.filled({"id": f"{number:06d}", **defaults}), options.seed, *folders)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        for row in new:
            if taken.setdefault(str(row.id).lower(), where) != where:
                raise InputError(f"{where}: id: {shown(row.id)} is also that of {taken[str(row.id).lower()]}")
            yield where, row


def _refiner(options: Options, info: ModelInfo) -> tuple[ModelInfo | None, float]:
    """Return SDXL's refiner, if there is one, and where it takes over."""
    start = START if options.refiner_start is None else options.refiner_start
    if options.refiner is None:
        if options.refiner_start is not None:
            raise InputError(f"--refiner-start: {start:g} needs --refiner, a model that takes over there")
        return None, start
    return check_refiner(info, inspect_model(options.refiner, variant=options.variant), start), start


def _check_loras(rows: Sequence[Request], info: ModelInfo) -> list[str]:
    """Return what each LoRA of the rows adapts, a line each. Raises InputError naming the row and the file at fault."""
    from genkit.components.lorafile import ADAPTED, module_shapes, read_lora

    lines: dict[str, str] = {}
    shapes: dict[str, Any] = {}
    for row in rows:
        for lora in row.loras or ():
            shapes = shapes or {
                name: module_shapes({key: tensor.shape for key, tensor in info.parts[name].tensors.items()})
                for name in ADAPTED
                if name in info.parts
            }
            try:
                if lora["file"] not in lines:
                    lines[lora["file"]] = read_lora(Path(lora["file"]), shapes, info.configs["unet"]).line()
            except InputError as error:
                raise InputError(f"{row.source or f'row {row.id}'}: loras: {error}") from None
    return list(lines.values())


def _controls(rows: Sequence[Request], info: ModelInfo, variant: str | None) -> dict[str, Part]:
    """Return the ControlNets of the rows by the names that rows have for them. Raises InputError naming the row."""
    found: dict[str, Part] = {}
    for row in rows:
        try:
            found |= networks_of(row.controls, info.configs["unet"], info.configs.get("vae"), found, variant)
        except InputError as error:
            about = "" if str(error).startswith(("controls: ", "preprocess: ")) else "controls: "
            raise InputError(f"{row.source or f'row {row.id}'}: {about}{error}") from None
    return found


def _scorers(options: Options, clip: ModelInfo | None) -> tuple[list[Plugin], frozenset[str]]:
    """Return the plugins, and the names of all scores that the run will have."""
    if options.aesthetic is not None:
        if clip is None:
            raise InputError("--aesthetic: is a head over CLIP embeddings, and there is no CLIP model: give --clip")
        check_head(Path(options.aesthetic), clip.embedding_width)
    scorers = find_scorers(options.scorers)
    names = [name for plugin in scorers for name in plugin.names]
    return scorers, known_scores(clip is not None, options.aesthetic is not None, names)


def _check_budget(options: Options) -> None:
    if options.max_total_images is not None and options.max_total_images < 1:
        raise InputError(f"--max-total-images: {options.max_total_images} is not 1 or more")
    if options.max_seconds is not None and not 0 < options.max_seconds < 1e9:
        raise InputError(f"--max-seconds: {options.max_seconds:g} is not a number of seconds above 0")


def _complete(row: Request, geometry: Geometry, defaults: dict[str, Any]) -> Request:
    """Return the row with the model's defaults filled in, so that requests.jsonl has all that a picture depends on."""
    s = settings(row, geometry, defaults)
    found: dict[str, Any] = {"num_inference_steps": s.steps, "width": s.width, "height": s.height}
    if s.scheduler is not None:
        found["scheduler"] = s.scheduler
    if geometry.text:
        found["guidance_scale"] = s.guidance
    if row.image is not None:
        found["strength"] = s.strength
    return row.filled(found)


def _calls_for(row: Request, scheduler: Scheduler, plans: dict[str, Plan], folder: Path, guided: float,
               refined: tuple[float, str] | None) -> int:  # fmt: skip
    """Return the network rows of one image. guided: `Settings.guided`. Raises InputError for a bad plan."""
    steps, strength, guidance = row.num_inference_steps or 1, row.strength or 1.0, row.guidance_scale or 1.0
    key = repr((row.scheduler, steps, strength, guidance))
    if key not in plans:
        plan = plan_for(scheduler, row.scheduler, steps, strength, guidance, folder)
        if refined is not None:
            plan = refined_plan(plan, scheduler, row.scheduler, steps, *refined)
        plans[key] = plan
    weights = [weight for _, weight in composed(row.prompt)] if row.syntax == "a1111" else [1.0]
    return network_rows(plans[key], guided, row.guidance_interval, weights)
