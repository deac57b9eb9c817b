"""More of the `genkit` command: what looks back at runs. Nothing here imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from genkit.cli import AsJson, Device, app
from genkit.errors import EXIT_OK


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
    from genkit.study import described, study_run

    found = study_run(run, prune, images, device, quiet=as_json)
    print(json.dumps(found, ensure_ascii=False) if as_json else described(found))
    return EXIT_OK
