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
    prompts: Annotated[Path | None, typer.Option(help="A prompt file: row k is for picture k by name.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    labels: Labels = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write JSON lines here in place of standard output.")
    ] = None,
    clip: Clip = "emoji-clip",
    device: Device = "auto",
    dtype: Dtype = "auto",
    aesthetic: Aesthetic = None,
    scorer: Scorers = None,
) -> int:
    """Score pictures against prompts, one JSON line a picture; what a run has embedded is not embedded again."""
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
        str | None, typer.Option(help="A classifier with labels of its own, in place of CLIP: a folder or a hub id.")
    ] = None,
    top: Annotated[int, typer.Option(help="With --model: how many labels a picture.")] = 5,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write JSON lines here in place of a table.")] = None,
    clip: Clip = "emoji-clip",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> int:
    """Say which of some labels each picture shows; with a folder for each label, how often that is right.

    With --model JSON lines, of the labels that a classifier has.
    """
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
    words: Annotated[str | None, typer.Option(help="a cat,a dog: what to look for.")] = None,
    like: Annotated[Path | None, typer.Option(help="A picture of what to look for, in place of words; OWLs.")] = None,
    threshold: Annotated[float | None, typer.Option(help="The least score; default: the detector's.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write JSON lines here in place of standard output.")
    ] = None,
    draw: Annotated[Path | None, typer.Option(help="A folder for the pictures with their boxes.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Find what words, or a picture, name: boxes in pixels, scores and colours, one JSON line a picture."""
    from genkit.rows.typed import typed
    from genkit.studies.detect import detect_images

    named = [] if words is None else typed("detect", words)
    return detect_images(images, named, like, detector, threshold, out, draw, device, dtype)
