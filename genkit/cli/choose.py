"""Look back at runs and choose: filter, label, calibrate, study, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.app import CHOOSE, Command, app, print_found
from genkit.cli.options import AsJson, Device, refuse_idle, spread
from genkit.errors import EXIT_OK
from genkit.selection.picking import Picking


@app.command("filter", cls=Command, rich_help_panel=CHOOSE)
@spread
def filter_run(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    picking: Picking,
    where: Annotated[str | None, typer.Option(help="What an image must pass; in place of the rows' gates.")] = None,
    rank_by: Annotated[str | None, typer.Option(help="What 'best' means; default clip.")] = None,
    keep: Annotated[int | None, typer.Option(help="Keep the best so many of each row.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Copy the kept pictures and their captions here.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="Of -o: folder, webdataset or parquet.")] = "folder",
    shard_size: Annotated[str | None, typer.Option(help="Of webdataset and parquet: 500MB, 2GB, …")] = None,
    as_json: AsJson = False,
) -> int:
    """Decide again what is kept: no model, no torch; nothing is deleted."""
    from genkit.datasets.export import Target
    from genkit.selection.calibrate import named_gate
    from genkit.studies.filter import refilter

    target = Target.of(form, shard_size)
    print_found(refilter(run, named_gate(run, where), rank_by, keep, out, picking, target), as_json)
    return EXIT_OK


@app.command(cls=Command, rich_help_panel=CHOOSE)
def label(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    where: Annotated[str | None, typer.Option(help="Show only the pictures that pass.")] = None,
    shuffle: Annotated[int, typer.Option(metavar="SEED", help="Of the order, which is random.")] = 0,
    port: Annotated[int, typer.Option(help="0: a free one.")] = 0,
) -> int:
    """Serve a page on this machine that takes votes (y good, n bad) on a run's pictures into its votes.csv."""
    from genkit.pages.label import label as serve
    from genkit.selection.calibrate import named_gate

    return serve(run, named_gate(run, where), shuffle, port)


@app.command(cls=Command, rich_help_panel=CHOOSE)
def calibrate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    labels: Annotated[Path, typer.Option(help="votes.csv (image,vote), or a list of the good pictures.")],
    precision: Annotated[float, typer.Option(help="The share of good ones among those that pass.")],
    score: Annotated[str | None, typer.Option(help="What to compare; default clip_z, or clip.")] = None,
    where: Annotated[str | None, typer.Option(help="What a picture must pass besides.")] = None,
    bad: Annotated[Path | None, typer.Option(help="With a list of good pictures: that of the bad ones.")] = None,
    others_bad: Annotated[
        bool, typer.Option("--others-bad", help="With a list of good pictures: all were looked at.")
    ] = False,
    confidence: Annotated[float, typer.Option(help="Of the interval.")] = 0.95,
    sure: Annotated[bool, typer.Option("--sure", help="Leave no more than 1 - confidence to luck.")] = False,
    name: Annotated[str, typer.Option(help="Of the gate in RUN/gates.json, for filter --where @NAME.")] = "calibrated",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the expression alone.")] = False,
    as_json: AsJson = False,
) -> int:
    """Fit a gate to labelled pictures: the lowest threshold above which so many are good."""
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
        bool, typer.Option("--prune", help="Redraw some rows to see what early stopping would buy.")
    ] = False,
    images: Annotated[int, typer.Option(help="With --prune: how many images to redraw, about.")] = 64,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Say what best-of-N, and early stopping, buy on the model and prompts of a run; written to its study.json."""
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
    b: Annotated[Path, typer.Argument(help="A run of the same rows: another model, other settings.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write the page here, with copies of the pictures.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Say which of two runs scores higher, pair by pair, and show them side by side."""
    from genkit.progress import printable, printable_json
    from genkit.studies.compare import compare_runs, report

    found = compare_runs(a, b, out)
    print(printable_json(found) if as_json else "\n".join(map(printable, report(found).splitlines())))
    return EXIT_OK
