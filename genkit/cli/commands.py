"""More of the `genkit` command: what looks back at runs. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from genkit.cli import AsJson, Device, _say, app
from genkit.errors import EXIT_INPUT, EXIT_OK, EXIT_SOME_FAILED


@app.command()
def doctor(
    data: Annotated[str | None, typer.Argument(help="A folder, .tar or .parquet; default: the recipe's.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="What it is to train: checks sizes, tokens, memory too.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write a page with thumbnails here.")] = None,
    as_json: AsJson = False,
) -> int:
    """Say what is wrong with a data set: captions, bad, small and double pictures; exits 2 for what stops training."""
    from genkit.training.doctor import diagnose, write_page

    report = diagnose(data, recipe, quiet=as_json)
    if out is not None:
        write_page(report, out)
    print(json.dumps(report.plain(), ensure_ascii=False) if as_json else "\n".join(report.lines()))
    return EXIT_INPUT if report.errors else EXIT_OK


@app.command()
def study(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prune: Annotated[
        bool, typer.Option("--prune", help="Redraw some rows to see what early stopping would buy.")
    ] = False,
    images: Annotated[int, typer.Option(help="With --prune: how many images to redraw, about.")] = 64,
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Say what best-of-N, and early stopping, buy on the model and prompts of a run; written to its study.json."""
    from genkit.studies.study import described, study_run

    found = study_run(run, prune, images, device, quiet=as_json)
    print(json.dumps(found, ensure_ascii=False) if as_json else described(found))
    return EXIT_OK


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, see training/recipes.")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As train.steps=100.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default runs/NAME-OF-THE-RECIPE.")] = None,
    device: Device = "auto",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the model when it is done.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Train a model, or go on with it: the same command goes on exactly where the last one stopped."""
    from genkit.training.recipe import read_recipe

    read = read_recipe(recipe, changes or ())
    folder = Path("runs") / recipe.stem if out is None else out
    from genkit.training.loop import Diverged
    from genkit.training.loop import train as run
    from genkit.training.report import described

    try:
        outcome = run(read, folder, device=device, quiet=as_json)
    except Diverged as error:
        return _say(str(error), EXIT_SOME_FAILED)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        return outcome.exit_code
    if push_to_hub is not None and outcome.exit_code == EXIT_OK:
        from genkit.training.output import push

        print(push(folder, push_to_hub))
    print(json.dumps(dataclasses.asdict(outcome)) if as_json else described(outcome, folder))
    return outcome.exit_code
