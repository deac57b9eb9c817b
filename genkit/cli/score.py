"""Score pictures that exist: score, classify, detect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.app import SCORE, Command, app
from genkit.cli.options import Aesthetic, AsJson, Clip, Device, Dtype, Labels, Scorers, stated
from genkit.errors import InputError


@app.command(cls=Command, rich_help_panel=SCORE)
def score(
    images: Annotated[Path, typer.Argument(help="A picture, a folder of pictures, or a run folder.")],
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt file; row k belongs to picture k in order of name.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    labels: Labels = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write JSON lines to this file instead of standard output.")
    ] = None,
    clip: Clip = "emoji-clip",
    device: Device = "auto",
    dtype: Dtype = "auto",
    aesthetic: Aesthetic = None,
    scorer: Scorers = None,
) -> int:
    """Score pictures against prompts; prints one JSON line per picture."""
    from genkit.studies.score import score_images

    return score_images(images, prompts, prompt, labels, out, clip, device, dtype, aesthetic, scorer or ())


@app.command(cls=Command, rich_help_panel=SCORE)
def classify(
    ctx: typer.Context,
    images: Annotated[Path, typer.Argument(help="A picture, a folder of pictures, or a run folder.")],
    labels: Annotated[
        str | None, typer.Option(help="a,b,c: the texts to choose from; default: the names of the subfolders.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="An image classifier with its own labels instead of CLIP: a folder or a hub id.")
    ] = None,
    top: Annotated[int, typer.Option(help="With --model: how many labels to print per picture.")] = 5,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write JSON lines to this file instead of printing a table.")
    ] = None,
    clip: Clip = "emoji-clip",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> int:
    """Name the label that each picture shows; with one folder per label, print the accuracy too."""
    if model is None:
        if stated(ctx, "top"):
            raise InputError(f"--top: {top} needs --model; with --labels p of every label is given")
        from genkit.studies.score import classify_images

        return classify_images(images, labels, out, clip, device, dtype, as_json)
    for name in ("labels", "clip"):
        if stated(ctx, name):
            raise InputError(f"--{name}: has no use with --model, whose labels are its own")
    from genkit.studies.classify import label_images

    return label_images(images, model, top, out, device, dtype)


@app.command(cls=Command, rich_help_panel=SCORE)
def detect(
    images: Annotated[Path, typer.Argument(help="A picture, a folder of pictures, or a run folder.")],
    detector: Annotated[str, typer.Option(help="OWL-ViT, OWLv2 or Grounding DINO: a folder or a hub id.")],
    words: Annotated[str | None, typer.Option(help="What to look for: a cat,a dog.")] = None,
    like: Annotated[
        Path | None, typer.Option(help="A picture of what to look for, instead of --words (OWL-ViT and OWLv2).")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Lowest score of a box; default: the detector's.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write JSON lines to this file instead of standard output.")
    ] = None,
    draw: Annotated[Path | None, typer.Option(help="Folder for copies of the pictures with their boxes drawn.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Find things in pictures: boxes in pixels, scores and colours, one JSON line per picture."""
    from genkit.rows.typed import typed
    from genkit.studies.detect import detect_images

    named = [] if words is None else typed("detect", words)
    return detect_images(images, named, like, detector, threshold, out, draw, device, dtype)
