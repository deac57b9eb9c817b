"""Draw pictures again from their own settings: replay."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from genkit.cli.app import MAKE, Command, app, print_found
from genkit.cli.options import AsJson, DryRun, NewRun, Out, given_model, spread
from genkit.errors import EXIT_OK, InputError
from genkit.options import Options


@app.command(cls=Command, rich_help_panel=MAKE)
@spread
def replay(
    ctx: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE|KEY=VALUE", help="Pictures or folders of them, and fields to change."),
    ],
    out: Out,
    options: Options,
    other_weights: Annotated[
        bool,
        typer.Option(
            "--other-weights", help="Draw even if weights, LoRAs or input pictures differ from the recorded ones."
        ),
    ] = False,
    new_run: NewRun = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Redraw pictures from the settings inside them, and report which are identical and what changed.

    The model is the one that the pictures name, unless --model is given.
    """
    from genkit.device.devices import reuse_memory
    from genkit.progress import printable, printable_json
    from genkit.rows.pictures import find_pictures, is_override, read_overrides
    from genkit.runs.destination import free_name
    from genkit.studies.replay import lines_of, plan_replay, run_replay

    overrides = read_overrides([word for word in words if is_override(word)])
    places = [word for word in words if not is_override(word)]
    if not places:
        raise InputError("PICTURE: give at least one picture, or a folder of them")
    folder = free_name(out) if new_run else out
    options = dataclasses.replace(options, quiet=as_json)
    model = given_model(ctx, options)
    plan = plan_replay(find_pictures(places), overrides, options, model, folder, other_weights)
    if dry_run:
        print_found(plan.describe(), as_json)
        return EXIT_OK
    reuse_memory()
    report, summary = run_replay(plan, folder)
    print(printable_json(report) if as_json else "\n".join(map(printable, lines_of(report))))
    return summary.exit_code
