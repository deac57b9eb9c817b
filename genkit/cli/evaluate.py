"""Evaluate models on suites of prompts: evaluate, leaderboard."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.app import SCORE, Command, app, print_found
from genkit.cli.generate import RowOptions
from genkit.cli.options import AsJson, DryRun, spread
from genkit.errors import EXIT_OK, EXIT_SOME_FAILED
from genkit.options import Options

# What a suite decides itself: which model and which of its pictures count.
DECIDED = (
    "model", "keep", "gate", "rank_by", "max_images", "labels", "expansions", "image", "mask_image", "strength",
    "controls", "control_image", "control_preprocess", "diverse", "dedupe", "reference",
)  # fmt: skip


@app.command(cls=Command, rich_help_panel=SCORE)
@spread(without=DECIDED)
def evaluate(
    model: Annotated[
        str, typer.Argument(help="emoji (built in), a diffusers folder, a hub id, or one .safetensors file.")
    ],
    suite: Annotated[str, typer.Option(help="geneval, emoji, or a file of rows with prompt, verify and task.")],
    row: RowOptions,
    options: Options,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The run folder; default runs/MODEL-on-SUITE.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Folder of pictures to measure FID, KID and CMMD against.")
    ] = None,
    features: Annotated[
        str, typer.Option(help="Features for --against: clip, inception, or an installed feature network.")
    ] = "clip",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Draw a suite of prompts and report how many pictures are right; can be resumed."""
    from genkit.device.devices import reuse_memory
    from genkit.progress import printable, printable_json
    from genkit.suites.evaluate import NUM_IMAGES, described, out_folder, plan_evaluation, run_evaluation

    folder = out_folder(model, suite) if out is None else out
    options = dataclasses.replace(options, quiet=as_json)
    plan = plan_evaluation(
        model, suite, folder, options, {"num_images": NUM_IMAGES, **row.fields()}, against, features
    )  # fmt: skip
    if dry_run:
        print_found({"out": str(folder), **plan.describe()}, as_json)
        return EXIT_OK
    reuse_memory()
    found, summary = run_evaluation(plan, folder)
    if found is None:
        print(
            "genkit: not evaluated: pictures are still to be drawn; run the same command again to continue",
            file=sys.stderr,
        )
        return summary.exit_code or EXIT_SOME_FAILED
    report = {name: value for name, value in found.items() if name != "rows"}
    print(printable_json(report) if as_json else "\n".join(map(printable, described(found, folder).splitlines())))
    return summary.exit_code


@app.command(cls=Command, rich_help_panel=SCORE)
def leaderboard(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Run folders of evaluate, or evaluation.json.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also write it to this .html file.")] = None,
    as_json: AsJson = False,
) -> int:
    """Rank evaluations of one suite, with how sure each difference is."""
    from genkit.progress import printable, printable_json
    from genkit.suites.leaderboard import described
    from genkit.suites.leaderboard import leaderboard as compared

    found = compared(runs, out)
    print(printable_json(found) if as_json else "\n".join(map(printable, described(found).splitlines())))
    return EXIT_OK
