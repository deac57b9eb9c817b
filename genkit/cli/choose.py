"""Look back at runs and choose: filter, label, calibrate, study, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.app import CHOOSE, Command, app, print_found
from genkit.cli.options import AsJson, Device, refuse_idle, spread, stated
from genkit.errors import EXIT_OK, InputError
from genkit.selection.picking import Picking


@app.command("filter", cls=Command, rich_help_panel=CHOOSE)
@spread
def filter_run(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    picking: Picking,
    where: Annotated[
        str | None, typer.Option(help="Condition that an image must meet; replaces the rows' gates.")
    ] = None,
    rank_by: Annotated[str | None, typer.Option(help="Score that decides which images are best; default clip.")] = None,
    keep: Annotated[int | None, typer.Option(help="How many images to keep per row, best first.")] = None,
    votes: Annotated[
        Path | None,
        typer.Option(help="Keep what was voted good: a votes.csv of `genkit label`, or a text file of picture names."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Copy the kept pictures and their captions here.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="Format of -o: folder, webdataset or parquet.")] = "folder",
    shard_size: Annotated[str | None, typer.Option(help="Size of webdataset and parquet shards: 500MB, 2GB, …")] = None,
    as_json: AsJson = False,
) -> int:
    """Decide again what a run keeps, and export it; takes seconds, needs no model, deletes nothing."""
    from genkit.datasets.export import Target
    from genkit.selection.calibrate import named_gate
    from genkit.studies.filter import refilter

    target = Target.of(form, shard_size)
    print_found(refilter(run, named_gate(run, where), rank_by, keep, out, picking, target, votes), as_json)
    return EXIT_OK


@app.command(cls=Command, rich_help_panel=CHOOSE)
def label(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second run of the same rows: choose the better picture of each pair.")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Show only pictures that meet this condition.")] = None,
    shuffle: Annotated[int, typer.Option(metavar="SEED", help="Seed of the random order, and of which is left.")] = 0,
    in_order: Annotated[bool, typer.Option("--in-order", help="Go row by row, not in random order.")] = False,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Show all pictures of a row at once; mark the good ones.")
    ] = False,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 0,
) -> int:
    """Vote on a run's pictures in the browser, or compare those of two runs without knowing which is whose."""
    from genkit.pages.label import label as serve
    from genkit.selection.calibrate import named_gate
    from genkit.studies.prefer import prefer

    if other is not None:
        for name in ("where", "side_by_side"):
            if stated(ctx, name):
                raise InputError(f"--{name.replace('_', '-')}: has no effect with a second run")
        return prefer(run, other, shuffle, in_order, port)
    return serve(run, named_gate(run, where), None if in_order else shuffle, port, side_by_side)


@app.command(cls=Command, rich_help_panel=CHOOSE)
def calibrate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    labels: Annotated[Path, typer.Option(help="votes.csv (image,vote), or a list of the good pictures.")],
    precision: Annotated[float, typer.Option(help="Share of the passing pictures that should be good.")],
    score: Annotated[str | None, typer.Option(help="Score to find a threshold for; default clip_z, or clip.")] = None,
    where: Annotated[str | None, typer.Option(help="A further condition that pictures must meet.")] = None,
    bad: Annotated[Path | None, typer.Option(help="With a list of good pictures: the list of bad ones.")] = None,
    others_bad: Annotated[
        bool, typer.Option("--others-bad", help="With a list of good pictures: all others are bad.")
    ] = False,
    confidence: Annotated[float, typer.Option(help="Confidence of the interval.")] = 0.95,
    sure: Annotated[
        bool, typer.Option("--sure", help="Ask for the precision with that confidence, not on average.")
    ] = False,
    name: Annotated[
        str, typer.Option(help="Name of the gate in RUN/gates.json, for filter --where @NAME.")
    ] = "calibrated",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the expression.")] = False,
    as_json: AsJson = False,
) -> int:
    """Find a score threshold from labelled pictures: the lowest that reaches --precision."""
    from genkit.progress import printable, printable_json
    from genkit.selection.calibrate import calibrate as fitted
    from genkit.selection.calibrate import named_gate, report

    found = fitted(
        run, labels, precision, score, named_gate(run, where),
        bad=bad, others_bad=others_bad, confidence=confidence, sure=sure, name=name,
    )  # fmt: skip
    lines = [found["expression"]] if quiet else report(found).splitlines()
    print(printable_json(found) if as_json else "\n".join(map(printable, lines)))
    return EXIT_OK


@app.command(cls=Command, rich_help_panel=CHOOSE)
def study(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prune: Annotated[
        bool, typer.Option("--prune", help="Redraw some rows to estimate what early stopping would save.")
    ] = False,
    images: Annotated[int, typer.Option(help="With --prune: about how many images to redraw.")] = 64,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Estimate what best-of-N and early stopping gain on a run's model and prompts; written to its study.json."""
    from genkit.progress import printable_json
    from genkit.studies.study import described, study_run

    if not prune:
        refuse_idle(ctx, "prune", "images", "device")
    found = study_run(run, prune, images, device, quiet=as_json)
    print(printable_json(found) if as_json else described(found))
    return EXIT_OK


@app.command(cls=Command, rich_help_panel=CHOOSE)
def compare(
    a: Annotated[Path, typer.Argument(help="A run folder.")],
    b: Annotated[Path, typer.Argument(help="A run of the same rows with another model or settings.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the page here, with copies of the pictures.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Compare two runs of the same rows, pair by pair, and show them side by side."""
    from genkit.progress import printable, printable_json
    from genkit.studies.compare import compare_runs, report

    found = compare_runs(a, b, out, quiet=as_json)
    print(printable_json(found) if as_json else "\n".join(map(printable, report(found).splitlines())))
    return EXIT_OK
