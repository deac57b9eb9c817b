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
    words: Annotated[str, typer.Option(help="What to look for, one mask each: a fox,the sky.")],
    model: Annotated[str, typer.Option(help="A folder or hub id of a CLIPSeg model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the masks and segments.jsonl.")],
    threshold: Annotated[float, typer.Option(help="Lowest probability at which a pixel is in the mask.")] = 0.5,
    grow: Annotated[int, typer.Option(help="Grow the masks by this many pixels.")] = 0,
    invert: Annotated[bool, typer.Option("--invert", help="White is everything except what the words name.")] = False,
    soft: Annotated[
        bool, typer.Option("--soft", help="Write probabilities, 0 to 255, instead of black and white.")
    ] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Also write the pictures with their masks in colour.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Write a mask for each text and picture, for `generate --mask-image`: white is what the text names."""
    from genkit.studies.segment import segment_images

    return segment_images(images, words, model, out, threshold, grow, invert, soft, draw, device, dtype)


@app.command(cls=Command, rich_help_panel=SCORE)
def caption(
    images: Pictures,
    model: Annotated[str, typer.Option(help="A folder or hub id of a BLIP, Florence-2 or ViT-GPT2 model.")],
    question: Annotated[str | None, typer.Option(help="Question for a model that answers questions.")] = None,
    begin: Annotated[str | None, typer.Option(help="How BLIP captions begin, such as 'a photo of'.")] = None,
    write: Annotated[
        str | None,
        typer.Option(help="Write training captions: txt (beside each picture) or jsonl (one metadata.jsonl)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace captions that exist.")] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write JSON lines to this file instead of standard output.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Maximum tokens of a caption; default 50 (Florence-2 detailed 200, more-detailed 1000)."),
    ] = None,
    detail: Annotated[
        str | None, typer.Option(help="How much Florence-2 says: caption, detailed or more-detailed.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Caption pictures, or ask a question about each; one JSON line per picture, or captions to train on."""
    from genkit.studies.caption import caption_images

    return caption_images(images, model, question, begin, write, overwrite, out, tokens, device, dtype, detail)


@app.command(cls=Command, rich_help_panel=SCORE)
def depth(
    images: Pictures,
    model: Annotated[str, typer.Option(help="A folder or hub id of a DPT, Depth Anything, ZoeDepth or GLPN model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the depth maps and depth.jsonl.")],
    npy: Annotated[bool, typer.Option("--npy", help="Write the values as float32 .npy instead of 16-bit PNG.")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Also write the depth in colours.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace depth maps that exist.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Write a depth map of each picture, as 16-bit grey PNG."""
    from genkit.studies.depth import depth_images

    return depth_images(images, model, out, npy, draw, overwrite, device, dtype)


@app.command("classify-video", cls=Command, rich_help_panel=SCORE)
def classify_video(
    clips: Annotated[list[Path], typer.Argument(help="Clips: animated GIF or WebP files, or folders of frames.")],
    labels: Annotated[str, typer.Option(help="What a clip may show: a dog runs,a dog sleeps.")],
    model: Annotated[str, typer.Option(help="A folder or hub id of an X-CLIP model.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write JSON lines to this file instead of standard output.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Name the label that fits each clip best; one JSON line per clip."""
    from genkit.studies.video import classify_clips

    return classify_clips(clips, labels, model, out, device, dtype)
