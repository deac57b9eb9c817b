"""Models and this machine: inspect, convert, env."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.app import LOOK, Command, app, print_found
from genkit.cli.options import AsJson, Prediction, TextEncoder, Vae, Variant
from genkit.errors import EXIT_OK


@app.command(cls=Command, rich_help_panel=LOOK)
def inspect(
    model: Annotated[str, typer.Argument(help="emoji, emoji-clip, a model folder, a hub id, or a .safetensors file.")],
    variant: Variant = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    prediction: Prediction = "auto",
    as_json: AsJson = False,
) -> int:
    """Check a model without loading it and print what it is; for a single file also hashes and metadata."""
    from genkit.components import inspect_model
    from genkit.components.control import control_in, facts
    from genkit.components.info import file_facts
    from genkit.components.words import embedding_in

    embedding = embedding_in(model)
    if embedding is not None:
        print_found(embedding.facts(), as_json)
        return EXIT_OK
    control = control_in(model)
    if control is not None:
        print_found({"model": model, **facts(control)}, as_json)
        return EXIT_OK
    info = inspect_model(model, variant=variant, vae=vae, text_encoder=text_encoder, prediction=prediction)
    print_found({**info.describe(), **file_facts(info)}, as_json)
    return EXIT_OK


@app.command(cls=Command, rich_help_panel=LOOK)
def models(
    folder: Annotated[Path, typer.Argument(help="A folder of models, LoRAs and ControlNets.")],
    variant: Variant = None,
    as_json: AsJson = False,
) -> int:
    """List the models, LoRAs and ControlNets in a folder, by the names that `serve --models` gives them."""
    from genkit.components.collection import collection
    from genkit.progress import printable

    items = [item.describe() for item in collection(folder, variant)]
    if as_json:
        print_found({"models": items}, as_json)
        return EXIT_OK
    for item in items:
        facts = [str(item[key]) for key in ("kind", "family", "size") if key in item]
        facts += [f"{item['parameters'] / 1e6:.0f} million parameters"] if "parameters" in item else []
        print(printable(f"{item['name']}: {', '.join(facts)}" + (f": {item['why']}" if "why" in item else "")))
    return EXIT_OK


@app.command(cls=Command, rich_help_panel=LOOK)
def convert(
    model: Annotated[str, typer.Argument(help="A .safetensors file, a model folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="A new folder, or a new .safetensors file.")],
    variant: Variant = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    prediction: Prediction = "auto",
    as_json: AsJson = False,
) -> int:
    """Convert a single file to a diffusers folder, or a folder to a single file."""
    from genkit.components import inspect_model
    from genkit.components.convert import convert as write

    info = inspect_model(model, variant=variant, vae=vae, text_encoder=text_encoder, prediction=prediction)
    for note in info.notes:
        print(note, file=sys.stderr)
    print_found(write(info, out), as_json)
    return EXIT_OK


@app.command(cls=Command, rich_help_panel=LOOK)
def env(as_json: AsJson = False) -> int:
    """Print versions, devices and working attention backends, for a bug report."""
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
