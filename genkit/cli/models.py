"""Models and this machine: inspect, env."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from genkit.cli.app import LOOK, Command, app, print_found
from genkit.cli.options import AsJson, Variant
from genkit.errors import EXIT_OK


@app.command(cls=Command, rich_help_panel=LOOK)
def inspect(
    model: Annotated[str, typer.Argument(help="emoji, emoji-clip, a model folder, or a hub id.")],
    variant: Variant = None,
    as_json: AsJson = False,
) -> int:
    """Check a model without loading it, and say what it is."""
    from genkit.components import inspect_model

    print_found(inspect_model(model, variant=variant).describe(), as_json)
    return EXIT_OK


@app.command(cls=Command, rich_help_panel=LOOK)
def env(as_json: AsJson = False) -> int:
    """Print versions, devices, which attention backends work here, and what else a bug report needs."""
    from genkit.device.environment import environment
    from genkit.device.probes import table_lines

    found = environment()
    lines = [] if as_json else table_lines(found.pop("attention"))
    print_found(found, as_json)
    for line in lines:
        print(line)
    if lines and find_spec("xformers") is None:
        print("xformers is not installed: pip install 'genkit-diffusion[xformers]'")
    return EXIT_OK
