"""Serve: pictures over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.app import MAKE, Command, app
from genkit.cli.generate import RowOptions
from genkit.cli.options import spread
from genkit.errors import HostError, InputError
from genkit.options import Options

# Options that make no sense for rows of many clients
LEFT_OUT = (
    "segmenter", "seed", "format", "quality", "no_metadata", "picking", "max_total_images", "max_seconds", "quiet",
    "image", "mask_image", "mask", "mask_threshold", "mask_grow", "mask_invert", "strength", "keep", "gate",
    "rank_by", "max_images", "labels", "detect", "ask", "expansions", "num_images",
)  # fmt: skip


@app.command(cls=Command, rich_help_panel=MAKE)
@spread(without=LEFT_OUT)
def serve(
    row: RowOptions,
    options: Options,
    models: Annotated[
        Path | None, typer.Option(help="A folder of models and LoRAs, served by name; --model is the first.")
    ] = None,
    loaded: Annotated[
        int | None, typer.Option(min=1, help="With --models: how many are in memory at once; default 1.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 7860,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of keys, one a line, that calls need.")] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Listen beyond this machine without a key.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name by which a proxy's clients call it. May be given several times.")
    ] = None,
    framed_by: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may show the page in a frame.")
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="A folder for runs that clients start.")] = None,
    workers: Annotated[
        str | None, typer.Option(help="So many processes draw, each with a GPU, or cores, of its own: 4, or 4:64.")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="Serve from a cluster of Ray: auto, or HOST:PORT.")] = None,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for what is in flight when the server stops.")] = 30.0,
    max_queue: Annotated[
        float, typer.Option(min=1, help="Pictures of the model's size and steps that may wait.")
    ] = 256,
    max_pixels: Annotated[int | None, typer.Option(min=64, help="Pixels of a picture.")] = None,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps of a picture.")] = 150,
    max_images: Annotated[int, typer.Option(min=1, help="Pictures of a request.")] = 16,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request.")] = 2**25,
) -> int:
    """Draw for clients of the OpenAI images API and others, all in one batch, and for a page."""
    try:
        from genkit.serve.server import Listen, run
    except ImportError as error:
        needed = "fastapi, uvicorn, prometheus-client and python-multipart"
        raise HostError(f"serve needs {needed}: pip install 'genkit-diffusion[serve]' ({error})") from None
    from genkit.serve.choice import Choice
    from genkit.serve.rows import Most

    if loaded is not None and models is None:
        raise InputError("--loaded: has no effect without --models")
    listen = Listen(host, port, api_key_file, no_key, runs, drain, allow_host or (), framed_by or ())
    usual = Most()
    most = Most(max_pixels or usual.pixels, max_steps, max_images, max_body, usual.prompt)
    if workers is not None or ray is not None:
        from genkit.serve import replicas

        if models is not None:
            raise InputError("--models: does not go with --workers and --ray: each of them serves one model")
        return replicas.run(options, row.fields(), listen, most, max_queue, workers, ray)
    choice = None if models is None else Choice(models, loaded or 1)
    return run(options, row.fields(), listen, most, max_queue, choice)
