"""Make pictures: generate, and tune."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit import phases
from genkit.cli.app import MAKE, Command, app, print_found
from genkit.cli.options import AsJson, Device, DryRun, NewRun, Out, Variant, Workers, given_model, spread
from genkit.errors import EXIT_OK, InputError, shown
from genkit.options import Options
from genkit.rows.inputs import is_picture

if TYPE_CHECKING:
    from genkit.job.plan import Job
    from genkit.rows.pictures import Pictured

QUIET = ("stopped", "hard_rows", "slots_full", "exit_code")  # of the summary, shown only if there is something to say


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """Defaults for fields that a row does not set: see genkit.rows.request.Request."""

    negative_prompt: Annotated[str | None, "What the picture should not show."] = None
    prompt_2: Annotated[str | None, "SDXL: the prompt of its second text encoder."] = None
    negative_prompt_2: Annotated[str | None, "SDXL: the negative prompt of its second text encoder."] = None
    syntax: Annotated[
        str | None, "How prompts are read: none (plain text) or a1111: (weights:1.2), BREAK, AND, [edits], {choices}."
    ] = None
    expansions: Annotated[
        int | None, "With --syntax a1111: how many texts to make from each template; each becomes a row."
    ] = None
    clip_skip: Annotated[
        int | None, "Text encoder layer to use, counted from the last, which is 1 (as in AUTOMATIC1111)."
    ] = None
    scheduler: Annotated[str | None, "A solver such as unipc or dpmpp_2m_karras, or tuned; default: the model's."] = (
        None
    )
    num_inference_steps: Annotated[
        int | None,
        typer.Option("--steps", "--num-inference-steps", help="Steps per image; default: the model's."),
    ] = None
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--cfg-scale", help="Classifier-free guidance; 1 turns it off.")
    ] = None
    guidance_interval: Annotated[
        str | None, "Guide only in this part: 0.1,0.8 of the steps, or '{\"sigma\": [0.3, 5]}'."
    ] = None
    width: Annotated[int | None, "In pixels; default: the model's."] = None
    height: Annotated[int | None, "In pixels; default: the model's."] = None
    original_size: Annotated[str | None, "SDXL: the size before scaling that the model is told, WIDTHxHEIGHT."] = None
    crop: Annotated[
        str | None, "SDXL: the crop that the model is told, LEFT,TOP; 0,0 (the default) centres things."
    ] = None
    target_size: Annotated[
        str | None, "SDXL: the target size that the model is told, WIDTHxHEIGHT; default: the picture's."
    ] = None
    image: Annotated[str | None, "The picture to start from."] = None
    strength: Annotated[float | None, "How much --image may change, more than 0, up to 1; default 0.8."] = None
    mask_image: Annotated[str | None, "Inpaint: repaint only where this picture is white."] = None
    mask: Annotated[str | None, "Inpaint: repaint only what this text names in --image; needs --segmenter."] = None
    mask_threshold: Annotated[float | None, "Lowest probability at which a pixel belongs to --mask; default 0.5."] = (
        None
    )
    mask_grow: Annotated[int | None, "Grow --mask by this many pixels."] = None
    mask_invert: Annotated[
        bool | None, typer.Option("--mask-invert", help="Repaint everything except what --mask names.")
    ] = None
    loras: Annotated[list[str] | None, typer.Option("--lora", help="A LoRA, as FILE or FILE:WEIGHT; repeatable.")] = (
        None
    )
    controls: Annotated[
        str | None,
        typer.Option("--control", help="A ControlNet, as NETWORK or NETWORK:WEIGHT; rows' `controls` may name more."),
    ] = None
    control_image: Annotated[str | None, "The picture that --control follows; rows have it as `control_image`."] = None
    control_preprocess: Annotated[
        str | None, "What --control gets of the picture: none, canny (its edges) or invert; default none."
    ] = None
    num_images: Annotated[int | None, typer.Option("-n", "--num-images", help="Images per row; default 1.")] = None
    keep: Annotated[int | None, "How many images to keep per row, best first; default: all."] = None
    gate: Annotated[str | None, "Condition that an image must meet to be kept, such as 'clip > 0.5'."] = None
    rank_by: Annotated[str | None, "Score that decides which images are best; default clip."] = None
    max_images: Annotated[
        int | None, "With --keep and --gate: draw until --keep images pass, at most this many per row."
    ] = None
    labels: Annotated[str | None, "a,b,c: texts that CLIP chooses among; gates read p['a']."] = None
    detect: Annotated[str | None, "a,b,c: things --detector looks for besides those that gates name."] = None
    ask: Annotated[str | None, "Questions for --captioner besides those in gates: is it red?,is it big?"] = None

    def fields(self) -> dict[str, Any]:
        """Return what is given, as fields of a Request. Raises InputError, naming the option, for a bad value."""
        from genkit.rows.loras import beside
        from genkit.rows.typed import lora, typed

        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        try:
            given |= {
                name: typed(name, given[name])
                for name in ("guidance_interval", "labels", "detect", "ask", "scheduler")
                if name in given
            }
            given |= _control(given)
            if "loras" in given:
                given["loras"] = [beside(Path(), lora("loras", text)) for text in given["loras"]]
        except InputError as error:
            raise _of_option(error) from None
        given |= {name: str(Path(given[name]).absolute()) for name in ("image", "mask_image") if name in given}
        if is_picture(given.get("mask")):
            raise InputError(f"--mask: {shown(given['mask'])} is a picture, and no text; --mask-image takes it")
        _check(given)
        return given


@app.command(cls=Command, rich_help_panel=MAKE)
@spread
def generate(
    ctx: typer.Context,
    out: Out,
    row: RowOptions,
    options: Options,
    prompts: Annotated[
        Path | None, typer.Argument(metavar="PROMPTS", help="A .txt, .jsonl, .csv or .yaml file, one prompt per row.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A single prompt instead of a file.")] = None,
    from_images: Annotated[
        Path | None, typer.Option(help="Use the settings inside this picture, or folder of pictures, as rows.")
    ] = None,
    format_in: Annotated[
        str, typer.Option(help="Format of PROMPTS: auto, genkit, a1111-lines, infotext, kohya or comfyui.")
    ] = "auto",
    workers: Workers = None,
    ray: Annotated[str | None, typer.Option(help="Draw on a Ray cluster: auto, or HOST:PORT.")] = None,
    new_run: NewRun = False,
    dry_run: DryRun = False,
    profile: Annotated[bool, typer.Option("--profile", help="Print where the time went at the end.")] = False,
    as_json: AsJson = False,
) -> int:
    """Draw the images of a prompt file; run the same command again to continue an interrupted run."""
    from genkit.cluster.generate import check_workers
    from genkit.job.plan import plan_job
    from genkit.rows.prompts import read_prompts
    from genkit.rows.request import Request
    from genkit.runs.destination import check_folder, free_name, run_seed
    from genkit.studies.modelfound import model_of, other_models

    if profile:
        phases.record()
    _check_source(prompts, prompt, from_images, options)
    bounds = check_workers(workers, ray, options.device)
    defaults = row.fields()
    folder = free_name(out) if new_run else out
    options = dataclasses.replace(options, seed=run_seed(options.seed, folder))
    with phases.phase("read and check rows and model"):
        rows: list[Request]
        shots: list[Pictured] = []
        if from_images is not None:
            shots, rows = _rows_of(from_images, defaults, folder, options)
            options = dataclasses.replace(options, model=given_model(ctx, options) or model_of(shots))
        elif prompts is not None:
            rows = read_prompts(prompts, defaults, format_in)
        else:
            rows = [Request(seed=options.seed, **({} if prompt is None else {"prompt": prompt}))]
            rows[0]._source = "command line"
        job = plan_job(rows, dataclasses.replace(options, quiet=as_json), defaults)
        if shots:
            job = dataclasses.replace(job, notes=(*job.notes, *other_models(shots, job.info, options.vae)))
    check_folder(folder, prompts)
    if dry_run:
        from genkit.runs.outdated import kept_of

        drawn_by = {"workers": workers, "ray": ray} if bounds or ray else {}
        drawn_by = {name: value for name, value in drawn_by.items() if value}
        print_found({**job.describe(), **kept_of(folder, job.rows), **drawn_by}, as_json)
        return EXIT_OK
    return _run_job(job, folder, as_json, workers, ray)


@app.command(cls=Command, rich_help_panel=MAKE)
def tune(
    model: Annotated[str, typer.Argument(help="emoji (embedded), a diffusers-layout folder, or a hub id.")],
    steps: Annotated[
        int, typer.Option("--steps", "--num-inference-steps", help="Number of network calls of the plan.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt file to fit on; default: built-in plain prompts.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The folder to write to; default: the model's scheduler folder.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", "--cfg-scale", help="Default: the model's own."),
    ] = None,
    noises: Annotated[int, typer.Option(help="Noises to fit on; a quarter of them is held out for comparison.")] = 48,
    variant: Variant = None,
    seed: Annotated[int, typer.Option(help="Seed of the noises.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Fit step schedule and solver coefficients to a model, for `generate --scheduler tuned`; can be resumed."""
    from genkit.sampling.tuning import tune_model

    print_found(tune_model(model, steps, prompts, out, guidance_scale, noises, variant, seed, device, as_json), as_json)
    return EXIT_OK


def _control(given: dict[str, Any]) -> dict[str, Any]:
    """Return the field `controls` of what options say of a ControlNet, and take those out. Raises InputError."""
    from genkit.rows.controls import located
    from genkit.rows.typed import lora

    network, image, kind = (given.pop(name, None) for name in ("controls", "control_image", "control_preprocess"))
    if network is None:
        if image is not None or kind is not None:
            option = "image" if image is not None else "preprocess"
            raise InputError(f"control-{option}: needs --control, the network that reads the picture")
        return {}
    told = {**lora("control", network), "image": image, "preprocess": kind}
    return {"controls": located(Path(), [{name: value for name, value in told.items() if value is not None}])}


def _check_source(prompts: Path | None, prompt: str | None, from_images: Path | None, options: Options) -> None:
    """Raise InputError unless the rows come from one place."""
    given = {"PROMPTS": prompts, "--prompt": prompt, "--from-images": from_images}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"{', '.join(names)}: give one of them, not {'both' if len(names) == 2 else 'all'}")


def _rows_of(source: Path, given: dict[str, Any], folder: Path, options: Options) -> tuple[list[Pictured], Any]:
    """Return pictures and their rows, over which the command's options win."""
    from genkit.rows.pictures import check_apart, find_pictures, read_pictures

    pictures = find_pictures([source])
    check_apart(pictures, folder)
    return read_pictures(pictures, given, options.lora_dir, source.is_dir(), options.control_dir)


def _check(fields: dict[str, Any]) -> None:
    """Check the command line's defaults before any row is read, so that errors name the option, not a row."""
    from genkit.rows.pictures import check_alone

    for name, value in fields.items():
        try:
            check_alone(name, value)
        except InputError as error:
            raise _of_option(error) from None


def _of_option(error: InputError) -> InputError:
    """Return an error that names a field of a row with the name of its option."""
    field, colon, rest = str(error).partition(":")
    names = {"loras": "lora", "controls": "control"}
    return InputError(f"--{names.get(field, field.replace('_', '-'))}{colon}{rest}")


def _run_job(job: Job, folder: Path, as_json: bool, workers: str | None, ray: str | None) -> int:
    from genkit.cluster.generate import run_on
    from genkit.device.devices import reuse_memory

    reuse_memory()
    summary = run_on(job, folder, workers, ray)
    found = {**summary.__dict__, "images_per_second": round(summary.images_per_second, 3)}
    if not as_json:
        found = {name: value for name, value in found.items() if value or name not in QUIET}
    print_found(found, as_json)
    if not as_json:
        print(f"gallery: {folder / 'index.html'}", file=sys.stderr)
    for line in phases.report():
        print(line, file=sys.stderr)
    return summary.exit_code
