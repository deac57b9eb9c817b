"""Serve: pictures over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.app import MAKE, Command, app
from genkit.cli.generate import RowOptions
from genkit.cli.options import Workers, refuse_idle, spread
from genkit.errors import HostError, InputError
from genkit.options import Options

# Options that make no sense for rows of many clients
LEFT_OUT = (
    "segmenter", "seed", "format", "quality", "no_metadata", "picking", "max_total_images", "max_seconds", "quiet",
    "image", "mask_image", "mask", "mask_threshold", "mask_grow", "mask_invert", "strength", "keep", "gate",
    "rank_by", "max_images", "labels", "detect", "ask", "expansions", "num_images", "controls", "control_image",
    "control_preprocess",
)  # fmt: skip


@app.command(cls=Command, rich_help_panel=MAKE)
@spread(without=LEFT_OUT)
def serve(
    ctx: typer.Context,
    *,
    models: Annotated[
        Path | None,
        typer.Option(help="Serve the models, LoRAs and ControlNets of this folder by name; --model is the first."),
    ] = None,
    loaded: Annotated[int, typer.Option(min=1, help="With --models: how many to hold in memory.")] = 1,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine needs a key or --no-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 7860,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with one API key per line; calls need one of them.")
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Serve other machines without a key.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further host name to answer to, e.g. behind a proxy; repeatable.")
    ] = None,
    framed_by: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may embed the page in a frame; repeatable.")
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder for the runs that clients start (/v1/runs).")] = None,
    workers: Workers = None,
    ray: Annotated[str | None, typer.Option(help="Serve from a Ray cluster: auto, or HOST:PORT.")] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds to finish what is being drawn when the server stops.")
    ] = 30.0,
    max_queue: Annotated[
        float, typer.Option(min=1, help="How many pictures (of the model's own size and steps) may wait.")
    ] = 256,
    max_pixels: Annotated[int, typer.Option(min=64, help="Maximum pixels of a picture.")] = 2**22,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="Maximum steps of a picture.")] = 150,
    max_images: Annotated[int, typer.Option(min=1, help="Maximum pictures of a request.")] = 16,
    max_body: Annotated[int, typer.Option(min=1024, help="Maximum bytes of a request.")] = 2**25,
    row: RowOptions,
    options: Options,
) -> int:
    """Serve pictures over HTTP: the OpenAI images API, the AUTOMATIC1111 API and a web page."""
    try:
        from genkit.serve.server import Listen, run
    except ImportError as error:
        needed = "fastapi, uvicorn, prometheus-client and python-multipart"
        raise HostError(f"serve needs {needed}: pip install 'genkit-diffusion[serve]' ({error})") from None
    from genkit.serve.choice import Choice
    from genkit.serve.rows import Most

    if models is None:
        refuse_idle(ctx, "models", "loaded")
    listen = Listen(host, port, api_key_file, no_key, runs, drain, allow_host or (), framed_by or ())
    most = Most(max_pixels, max_steps, max_images, max_body)
    if workers is not None or ray is not None:
        from genkit.serve import replicas

        if models is not None:
            raise InputError("--models: does not go with --workers and --ray: each of them serves one model")
        return replicas.run(options, row.fields(), listen, most, max_queue, workers, ray)
    choice = None if models is None else Choice(models, loaded)
    return run(options, row.fields(), listen, most, max_queue, choice)
