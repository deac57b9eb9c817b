"""Look at pictures with other models than CLIP: segment, caption, depth, video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genkit.cli.app import SCORE, Command, app
from genkit.cli.options import Device, Dtype

Pictures = Annotated[Path, typer.Argument(help="A picture, a folder of pictures, or a run folder.")]


@app.command(cls=Command, rich_help_panel=SCORE)
def segment(
    images: Pictures,
    words: Annotated[str, typer.Option(help="a fox,the sky: what to look for; a mask each.")],
    model: Annotated[str, typer.Option(help="A folder or hub id of a CLIPSeg model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for masks and segments.jsonl.")],
    threshold: Annotated[float, typer.Option(help="The probability from which on a pixel is in the mask.")] = 0.5,
    grow: Annotated[int, typer.Option(help="Grow the masks by so many pixels.")] = 0,
    invert: Annotated[bool, typer.Option("--invert", help="White is all but what the words name.")] = False,
    soft: Annotated[bool, typer.Option("--soft", help="Write probabilities, 0 to 255, in place of masks.")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Write the pictures with their masks in colour, too.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Write a mask of what each text names in each picture: white is what `generate --mask-image` draws anew."""
    from genkit.studies.segment import segment_images

    return segment_images(images, words, model, out, threshold, grow, invert, soft, draw, device, dtype)


@app.command(cls=Command, rich_help_panel=SCORE)
def caption(
    images: Pictures,
    model: Annotated[str, typer.Option(help="A folder or hub id of a BLIP, Florence-2 or ViT-GPT2 model.")],
    question: Annotated[str | None, typer.Option(help="What to ask a model that answers questions.")] = None,
    begin: Annotated[str | None, typer.Option(help="How captions of BLIP begin, say 'a photo of'.")] = None,
    write: Annotated[
        str | None, typer.Option(help="Write training data: txt beside each picture, or jsonl: one metadata.jsonl.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also where a caption is there already.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write JSON lines here in place of standard output.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="The most tokens of a caption: 50; of Florence's details 200 and 1000.")
    ] = None,
    detail: Annotated[
        str | None, typer.Option(help="How much Florence-2 says: caption, detailed or more-detailed.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Caption pictures, or ask a question about each; one JSON line a picture, or captions to train on."""
    from genkit.studies.caption import caption_images

    return caption_images(images, model, question, begin, write, overwrite, out, tokens, device, dtype, detail)


@app.command(cls=Command, rich_help_panel=SCORE)
def depth(
    images: Pictures,
    model: Annotated[str, typer.Option(help="A folder or hub id of a DPT or Depth Anything model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for depth and depth.jsonl.")],
    npy: Annotated[
        bool, typer.Option("--npy", help="Write the values as float32 .npy in place of 16-bit PNG.")
    ] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Write the depth in colours, too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also where the depth is there already.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Write how near or far each pixel of each picture is, as 16-bit grey PNG."""
    from genkit.studies.depth import depth_images

    return depth_images(images, model, out, npy, draw, overwrite, device, dtype)


@app.command("classify-video", cls=Command, rich_help_panel=SCORE)
def classify_video(
    clips: Annotated[list[Path], typer.Argument(help="Animated GIF or WebP files, or a folder of frames each.")],
    labels: Annotated[str, typer.Option(help="a dog runs,a dog sleeps: what it could be.")],
    model: Annotated[str, typer.Option(help="A folder or hub id of an X-CLIP model.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write JSON lines here in place of standard output.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Say which label fits each clip best; one JSON line a clip."""
    from genkit.studies.video import classify_clips

    return classify_clips(clips, labels, model, out, device, dtype)
