"""The `genkit` command: arguments in, one call, an exit code out. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.errors import EXIT_HOST, EXIT_INPUT, EXIT_OK, EXIT_SIGINT, HostError, InputError

if TYPE_CHECKING:
    from genkit.job import Job

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Diffusion generation toolbox: a prompt file in; scored, filtered, reproducible images out.",
)  # fmt: skip

UsageError: Any = typer.BadParameter.__mro__[1]  # click's, which newer releases of typer carry under another name

Out = Annotated[Path, typer.Option("-o", "--out", help="The run folder: made, or gone on with.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")]
Device = Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")]
Attention = Annotated[
    str, typer.Option(help="auto (the fastest that works), sdpa, flash, cudnn, efficient, xformers, sliced or math.")
]
Dtype = Annotated[
    str, typer.Option(help="auto (float16 on a GPU, float32 on a CPU), float32, float16, bfloat16, int8 (weights).")
]

Aesthetic = Annotated[
    str | None, typer.Option(help="A .safetensors with weight [1, width] and bias [1] over CLIP embeddings.")
]
Scorers = Annotated[list[str] | None, typer.Option("--scorer", help="An installed scorer; repeatable.")]
Diverse = Annotated[
    float | None, typer.Option(help="With keep: 0 takes the best, up to 1 rather those unlike what is taken.")
]
Dedupe = Annotated[float | None, typer.Option(help="Of pictures this alike (cosine, say 0.95) keep one; 1: identical.")]
Reference = Annotated[Path | None, typer.Option(help="Name the nearest in this folder; with --dedupe refuse copies.")]


@app.command()
def generate(
    out: Out,
    prompts: Annotated[Path | None, typer.Argument(help="A .txt, .jsonl, .csv or .yaml file of rows.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt, in place of a file.")] = None,
    model: Annotated[str, typer.Option(help="emoji (embedded), a diffusers-layout folder, or a hub id.")] = "emoji",
    variant: Annotated[str | None, typer.Option(help="Weight files to take, say fp16.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A solver, say unipc or dpmpp_2m_karras, or tuned.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "--num-inference-steps", help="Steps an image.")] = None,
    guidance_scale: Annotated[float | None, typer.Option("--guidance-scale", "--cfg-scale", help="1 is off.")] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help="Guide only here: 0.1,0.8 of the steps, or '{\"sigma\": [0.3, 5]}'.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    image: Annotated[str | None, typer.Option(help="The picture to start from.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of --image to give up, 0 to 1.")] = None,
    mask_image: Annotated[str | None, typer.Option(help="Draw anew only where this is white.")] = None,
    num_images: Annotated[int | None, typer.Option("-n", "--num-images", help="Images a row.")] = None,
    keep: Annotated[int | None, typer.Option(help="Keep the best so many of a row.")] = None,
    gate: Annotated[str | None, typer.Option(help="What an image must pass, say 'clip > 0.5'.")] = None,
    rank_by: Annotated[str | None, typer.Option(help="What 'best' means; default clip.")] = None,
    max_images: Annotated[int | None, typer.Option(help="Draw until --keep pass, or so many are drawn.")] = None,
    labels: Annotated[str | None, typer.Option(help="a,b,c: texts for zero-shot classification.")] = None,
    seed: Annotated[
        int, typer.Option(help="With --prompt the image's seed; with a file, what rows derive theirs from.")
    ] = 0,
    batch_size: Annotated[str, typer.Option(help="Images in flight: auto, or a number.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile in the background, once cached.")] = False,
    memory: Annotated[str, typer.Option(help="auto (what fits), high (all on the device) or low (least).")] = "auto",
    clip: Annotated[str, typer.Option(help="auto, none, emoji-clip, a folder with a CLIPModel, or a hub id.")] = "auto",
    format: Annotated[str, typer.Option(help="Of the pictures: png, webp, jpeg or jxl.")] = "png",
    quality: Annotated[
        int | None,
        typer.Option(help="Of webp, jpeg and jxl, 1 to 100; default 90; at 100 webp and jxl keep every bit."),
    ] = None,
    aesthetic: Aesthetic = None,
    scorer: Scorers = None,
    diverse: Diverse = None,
    dedupe: Dedupe = None,
    reference: Reference = None,
    max_total_images: Annotated[int | None, typer.Option(help="Begin no more when the run has so many.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Begin no more images after so long.")] = None,
    new_run: Annotated[bool, typer.Option("--new-run", help="Leave RUN alone and write to RUN-2, RUN-3, …")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, make nothing.")] = False,
    as_json: AsJson = False,
) -> int:
    """Make the images of a prompt file; the same command again goes on where it stopped."""
    from genkit.job import Options, plan_job
    from genkit.rows.prompts import read_prompts, typed
    from genkit.rows.request import Request
    from genkit.runs.run import check_folder, free_name
    from genkit.selection.picking import Picking

    if prompts is not None and prompt is not None:
        raise InputError("PROMPTS, --prompt: give one of them, not both")
    given: dict[str, Any] = {
        "negative_prompt": negative_prompt, "scheduler": scheduler, "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_interval": None if guidance_interval is None else typed("guidance_interval", guidance_interval),
        "width": width, "height": height, "image": image, "strength": strength,
        "mask_image": mask_image, "num_images": num_images, "keep": keep, "gate": gate, "rank_by": rank_by,
        "max_images": max_images, "labels": None if labels is None else typed("labels", labels),
    }  # fmt: skip
    defaults = {name: value for name, value in given.items() if value is not None}
    defaults |= {name: str(Path(defaults[name]).absolute()) for name in ("image", "mask_image") if name in defaults}
    _check(defaults)
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed: {seed} is not within 0 to {2**32 - 1}")
    slots = _slots(batch_size)
    if prompts is not None:
        rows = read_prompts(prompts, defaults)
    else:
        rows = [Request(seed=seed, **({} if prompt is None else {"prompt": prompt}))]
        rows[0]._source = "command line"
    options = Options(
        model, clip, variant, device, dtype, slots, seed, as_json, compile, attention, format, quality, memory,
        aesthetic, tuple(scorer or ()), Picking(diverse, dedupe, reference), max_total_images, max_seconds,
    )  # fmt: skip
    job = plan_job(rows, options, defaults)
    folder = free_name(out) if new_run else out
    check_folder(folder, prompts)
    if dry_run:
        _print(job.describe(), as_json)
        return EXIT_OK
    return _run_job(job, folder, as_json)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="emoji (embedded), a diffusers-layout folder, or a hub id.")],
    steps: Annotated[int, typer.Option("--steps", "--num-inference-steps", help="Network calls of the plan.")],
    prompts: Annotated[Path | None, typer.Option(help="A prompt file to fit on; default: some plain prompts.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The folder to write to; default: the model's scheduler folder.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", "--cfg-scale", help="Default: the model's own."),
    ] = None,
    noises: Annotated[int, typer.Option(help="Pictures to fit on; a quarter of them only to compare.")] = 48,
    variant: Annotated[str | None, typer.Option(help="Weight files to take, say fp16.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noises.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Fit step schedule and solver coefficients to a model, for `generate --scheduler tuned`; stopped, it goes on."""
    from genkit.sampling.tuning import tune_model

    _print(tune_model(model, steps, prompts, out, guidance_scale, noises, variant, seed, device, as_json), as_json)
    return EXIT_OK


@app.command("filter")
def filter_run(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    where: Annotated[str | None, typer.Option(help="What an image must pass; in place of the rows' gates.")] = None,
    rank_by: Annotated[str | None, typer.Option(help="What 'best' means; default clip.")] = None,
    keep: Annotated[int | None, typer.Option(help="Keep the best so many of each row.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Copy the kept pictures and their captions here.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="Of -o: folder, webdataset or parquet.")] = "folder",
    shard_size: Annotated[str | None, typer.Option(help="Of webdataset and parquet: 500MB, 2GB, …")] = None,
    diverse: Diverse = None,
    dedupe: Dedupe = None,
    reference: Reference = None,
    as_json: AsJson = False,
) -> int:
    """Decide again what is kept: no model, no torch; nothing is deleted."""
    from genkit.datasets.export import Target
    from genkit.selection.calibrate import named_gate
    from genkit.selection.picking import Picking
    from genkit.studies.filter import refilter

    picking, target = Picking(diverse, dedupe, reference), Target.of(form, shard_size)
    _print(refilter(run, named_gate(run, where), rank_by, keep, out, picking, target), as_json)
    return EXIT_OK


@app.command()
def score(
    images: Annotated[Path, typer.Argument(help="A picture, a folder of pictures, or a run folder.")],
    prompts: Annotated[Path | None, typer.Option(help="A prompt file: row k is for picture k by name.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    labels: Annotated[str | None, typer.Option(help="a,b,c: texts for zero-shot classification.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write JSON lines here in place of standard output.")
    ] = None,
    clip: Annotated[str, typer.Option(help="emoji-clip, a folder with a CLIPModel, or a hub id.")] = "emoji-clip",
    device: Device = "auto",
    dtype: Dtype = "auto",
    aesthetic: Aesthetic = None,
    scorer: Scorers = None,
) -> int:
    """Score pictures against prompts, one JSON line a picture; what a run has embedded is not embedded again."""
    from genkit.studies.score import score_images

    return score_images(images, prompts, prompt, labels, out, clip, device, dtype, aesthetic, scorer or ())


@app.command()
def classify(
    images: Annotated[Path, typer.Argument(help="A picture, a folder of pictures, or a run folder.")],
    labels: Annotated[
        str | None, typer.Option(help="a,b,c: the texts to choose from; default: the names of the subfolders.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write JSON lines here in place of a table.")] = None,
    clip: Annotated[str, typer.Option(help="emoji-clip, a folder with a CLIPModel, or a hub id.")] = "emoji-clip",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> int:
    """Say which of some labels each picture shows; with a folder for each label, how often that is right."""
    from genkit.studies.score import classify_images

    return classify_images(images, labels, out, clip, device, dtype, as_json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="emoji, emoji-clip, a model folder, or a hub id.")],
    variant: Annotated[str | None, typer.Option(help="Weight files to take, say fp16.")] = None,
    as_json: AsJson = False,
) -> int:
    """Check a model without loading it, and say what it is."""
    from genkit.components import inspect_model

    _print(inspect_model(model, variant=variant).describe(), as_json)
    return EXIT_OK


@app.command()
def env(as_json: AsJson = False) -> int:
    """Print versions, devices, which attention backends work here, and what else a bug report needs."""
    from genkit.device.attention import table_lines
    from genkit.device.devices import environment

    found = environment()
    lines = [] if as_json else table_lines(found.pop("attention"))
    _print(found, as_json)
    for line in lines:
        print(line)
    return EXIT_OK


def main() -> None:
    """Run the command and leave with its exit code; errors are one line on standard error."""
    try:
        code = _run(sys.argv[1:])
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        code = EXIT_OK
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        print(f"genkit: {error}", file=sys.stderr)
        code = EXIT_HOST
    # Threads that are still compiling, or writing to a disk that hangs, must not hold the command up
    busy = any(thread.name == "genkit-compile" for thread in threading.enumerate())
    os._exit(code) if busy or code == EXIT_HOST else sys.exit(code)


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        _refuse_repeats(command, arguments)
        return command.main(arguments, prog_name="genkit", standalone_mode=False) or EXIT_OK
    except UsageError as error:
        return _say(error.format_message().rstrip("."), EXIT_INPUT)
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_SIGINT
    except InputError as error:
        return _say(str(error), EXIT_INPUT)
    except HostError as error:
        return _say(str(error), EXIT_HOST)


def _say(message: str, code: int) -> int:
    from genkit.progress import printable

    print(f"genkit: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _refuse_repeats(command: Any, arguments: list[str]) -> None:
    """Refuse an option given twice: click would silently take the last one."""
    sub = command.commands.get(arguments[0]) if arguments else None
    names = {} if sub is None else {o: p.name for p in sub.params for o in p.opts if o.startswith("-")}
    seen: set[str] = set()
    for argument in arguments[1:]:
        if argument == "--":
            return
        name = names.get(argument.split("=")[0])
        if name in seen and name != "scorer":
            raise InputError(f"{argument.split('=')[0]}: given twice")
        seen |= {name} if name else set()


# What a field needs beside it to be checked by itself: a row of the file may give it.
_PARTNERS: dict[str, dict[str, Any]] = {
    "strength": {"image": "-"},
    "mask_image": {"image": "-"},
    "keep": {"num_images": 100_000},
    "max_images": {"keep": 1, "gate": "not nan"},
}


def _check(fields: dict[str, Any]) -> None:
    """Check the command line's defaults before any row is read, so that the message names the option, not a row."""
    from genkit.rows.request import Request

    for name, value in fields.items():
        if name in ("gate", "rank_by"):  # may speak of labels that only rows give
            continue
        try:
            Request(**{**_PARTNERS.get(name, {}), name: value})
        except InputError as error:
            raise InputError(f"--{str(error).replace('_', '-', str(error).split(':')[0].count('_'))}") from None


def _run_job(job: Job, folder: Path, as_json: bool) -> int:
    from genkit.device.devices import reuse_memory
    from genkit.job import run_job

    reuse_memory()
    summary = run_job(job, folder)
    _print({**summary.__dict__, "images_per_second": round(summary.images_per_second, 3)}, as_json)
    if not as_json:
        print(f"gallery: {folder / 'index.html'}", file=sys.stderr)
    return summary.exit_code


def _slots(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 4096 and len(text) < 9):
        raise InputError(f"--batch-size: {text!r} is not auto or a number from 1 to 4096")
    return int(text)


def _print(found: dict[str, Any], as_json: bool) -> None:
    from genkit.progress import printable, printable_json

    if as_json:
        print(printable_json(found))
        return
    lines = list(_flat(found))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(printable(f"{name:<{width}}  {value}"))


def _flat(found: dict[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and value, "unet.dtype" for a value within a value."""
    for name, value in found.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{under}{name}.")
        else:
            yield under + name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


from genkit.cli import commands as _commands  # noqa: E402, F401  # it adds its own to `app`

if __name__ == "__main__":
    main()
