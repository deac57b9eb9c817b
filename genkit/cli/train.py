"""Train models, and look at the data first: train, doctor."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.app import TRAIN, Command, app, fail
from genkit.cli.options import AsJson, Device
from genkit.errors import EXIT_HOST, EXIT_INPUT, EXIT_OK, EXIT_SOME_FAILED, HostError, InputError, shown


@app.command(cls=Command, rich_help_panel=TRAIN)
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.yaml), see training/recipes.")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as train.steps=100.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default: runs/NAME-OF-THE-RECIPE.")] = None,
    device: Device = "auto",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the model to the Hugging Face hub when it is done.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=64, help="Train with this many processes on this machine.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Train a model from a recipe; run the same command again to continue exactly where it stopped."""
    from genkit.training.processes import check_launch
    from genkit.training.recipe import read_recipe

    first = os.environ.get("RANK", "0") == "0"  # of several processes, which speaks and writes
    try:
        check_launch()
        read = read_recipe(recipe, changes or ())
    except InputError as error:
        return fail(str(error), EXIT_INPUT) if first else EXIT_INPUT
    if processes is not None and processes > 1:
        from genkit.training.launch import launch

        if not first:  # under torchrun, which the first one refuses
            return EXIT_INPUT
        told = [str(recipe), *(changes or ()), *(("-o", str(out)) if out else ()), "--device", device]
        told += [*(("--push-to-hub", push_to_hub) if push_to_hub else ()), *(("--json",) if as_json else ())]
        return launch(processes, ["train", *told])
    if "WORLD_SIZE" in os.environ:
        from genkit.training.launch import end_with_launcher

        end_with_launcher()
    folder = Path("runs") / recipe.stem if out is None else out
    # Of a connection that ends torch's C++ prints a page in every process.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from genkit.training.loop import Diverged
    from genkit.training.loop import train as run
    from genkit.training.processes import Silent, leave
    from genkit.training.report import described

    try:
        outcome = run(read, folder, device=device, quiet=as_json)
    except (Diverged, InputError, HostError) as error:
        codes = {InputError: EXIT_INPUT, HostError: EXIT_HOST}
        return leave(fail(str(error), codes.get(type(error), EXIT_SOME_FAILED)))
    except Silent as error:
        return leave(int(str(error.code)))
    if not first:
        return outcome.exit_code
    if push_to_hub is not None and outcome.exit_code == EXIT_OK:
        from genkit.training.output import push

        print(push(folder, push_to_hub))
    print(json.dumps(dataclasses.asdict(outcome)) if as_json else described(outcome, folder))
    return outcome.exit_code


@app.command(cls=Command, rich_help_panel=TRAIN)
def doctor(
    data: Annotated[
        str | None, typer.Argument(help="The data set: a folder, .tar or .parquet; default: the recipe's.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe: also check sizes, caption lengths and memory for it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write an HTML page with thumbnails to this file.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check a data set for broken, small and duplicate pictures and bad captions; exits with 2 on errors."""
    from genkit.progress import printable_json
    from genkit.training.doctor import diagnose, write_page

    try:
        (data or "").encode()
    except UnicodeEncodeError:
        raise InputError(f"DATA: {shown(data)} is not UTF-8, as a recipe's data.path has to be") from None
    report = diagnose(data, recipe, quiet=as_json)
    if out is not None:
        write_page(report, out)
    print(printable_json(report.plain()) if as_json else "\n".join(report.lines()))
    return EXIT_INPUT if report.errors else EXIT_OK
