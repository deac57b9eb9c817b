"""Look for pictures and words: search, interrogate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.app import SCORE, Command, app
from genkit.cli.options import AsJson, Clip, Device, Dtype, refuse_idle
from genkit.errors import EXIT_OK, EXIT_SOME_FAILED, InputError

SearchClip = Annotated[
    str,
    typer.Option(help="auto (the run's own, else emoji-clip), a folder with a CLIPModel or SiglipModel, or a hub id."),
]


@app.command(cls=Command, rich_help_panel=SCORE)
def search(
    images: Annotated[Path, typer.Argument(help="A run folder, or a folder of pictures.")],
    text: Annotated[list[str] | None, typer.Option("--text", help="What to look for; several are averaged.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture to look for; several are averaged.")
    ] = None,
    without: Annotated[list[str] | None, typer.Option("--not", help="What found pictures should not show.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many pictures to list.")] = 20,
    clip: SearchClip = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    page: Annotated[Path | None, typer.Option(help="Also write an HTML page with the pictures to this file.")] = None,
    as_json: AsJson = False,
) -> int:
    """Find pictures of a run or folder by text or by example, nearest first."""
    from genkit.files import user_path
    from genkit.pages.search import check_page, write_page
    from genkit.progress import printable, printable_json
    from genkit.studies.search import report, say
    from genkit.studies.search import search as find

    if page is not None:
        check_page(page)
    shows = [user_path(path) for path in image or ()]
    found = find(images, text or (), shows, without or (), k, clip=clip, device=device, dtype=dtype, quiet=as_json)
    if page is not None:
        write_page(page, found.query, found.results, f"{found.pictures} pictures of {images}, by {found.clip}")
    for line in [printable_json(dataclasses.asdict(found))] if as_json else map(printable, report(found)):
        print(line)
    say(found)
    return EXIT_SOME_FAILED if found.problems else EXIT_OK


@app.command(cls=Command, rich_help_panel=SCORE)
def interrogate(
    ctx: typer.Context,
    images: Annotated[list[Path], typer.Argument(help="Pictures, folders of pictures, or runs.")],
    clip: Clip = "emoji-clip",
    lists: Annotated[
        Path | None, typer.Option(help="Folder of .txt files with one phrase per line; default: built-in lists.")
    ] = None,
    count: Annotated[int | None, typer.Option("--generate", help="Draw this many pictures of each caption.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The run folder of --generate.")] = None,
    model: Annotated[str, typer.Option(help="The model that --generate draws with.")] = "emoji",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> int:
    """Describe pictures with CLIP: the nearest phrases of some lists, and a caption made of them."""
    from genkit.components import inspect_model
    from genkit.files import user_path
    from genkit.progress import printable, printable_json
    from genkit.rows.request import Request
    from genkit.studies.interrogate import draw_similar, report
    from genkit.studies.interrogate import interrogate as described

    if (count is None) != (out is None):
        raise InputError("--generate, --out: the one needs the other: how many pictures, and the run that they go to")
    if count is None:
        refuse_idle(ctx, "generate", "model")
    else:
        Request(prompt="a picture", num_images=count)
        if inspect_model(model).kind != "text-to-image":
            raise InputError(f"--model: {model} draws no prompts")
    found = []
    for one in described([user_path(p) for p in images], clip=clip, lists=lists, device=device, dtype=dtype):
        found.append(one)
        print(printable_json(one.to_json()) if as_json else "\n".join(map(printable, report(one).splitlines())))
    failed = any(one.error is not None for one in found)
    if count is not None and out is not None:
        summary = draw_similar(found, count, out, model, device, dtype)
        return summary.exit_code or (EXIT_SOME_FAILED if failed else EXIT_OK)
    return EXIT_SOME_FAILED if failed else EXIT_OK
