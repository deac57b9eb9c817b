"""The options of a run: one dataclass for the command line, Python, and whatever else starts a run.

The text of an annotation is the option's help on the command line; fields without one are not options there.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from genkit.selection.picking import NONE, Picking


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that hold for a whole run. `batch_size` None: by device and memory; `quality` None: encoders.QUALITY."""

    model: Annotated[str, "emoji (embedded), a diffusers-layout folder, a hub id, or one .safetensors file."] = "emoji"
    vae: Annotated[str | None, "A VAE in place of the model's own: a file, a folder, or a model that has one."] = None
    text_encoder: Annotated[
        str | None, "A file, folder or model to take the text encoders from; two files with a comma."
    ] = None
    prediction: Annotated[
        str, "auto, epsilon, v_prediction or sample: of the UNet, where its file does not show it."
    ] = "auto"
    embeddings: Annotated[tuple[Any, ...], "A textual inversion, as FILE or FILE:WORD; repeatable."] = ()
    embedding_dir: Annotated[str | None, "A folder of textual inversions: file names that prompts use are words."] = (
        None
    )
    refiner: Annotated[str | None, "SDXL's refiner, a folder, hub id or file, for the last steps of each picture."] = (
        None
    )
    refiner_start: Annotated[float | None, "Where --refiner takes over, a fraction of the steps; default 0.8."] = None
    segmenter: Annotated[str | None, "A CLIPSeg model, folder or hub id, that finds masks in words, of --mask."] = None
    variant: Annotated[str | None, "Weight files to take, say fp16."] = None
    lora_dir: Annotated[str | None, "Where LoRAs that prompts and old pictures name, <lora:name:0.8>, are."] = None
    wildcards: Annotated[str | None, "Where the files of __wildcards__ are: with --syntax a1111."] = None
    seed: Annotated[int, "With --prompt the image's seed; with a file, what rows derive theirs from; -1 is any."] = 0
    batch_size: Annotated[int | None, "Images in flight: auto, or a number."] = None
    device: Annotated[str, "auto, cpu, mps, cuda or cuda:N."] = "auto"
    dtype: Annotated[str, "auto (float16 on a GPU, float32 on a CPU), float32, float16, bfloat16, int8 (weights)."] = (
        "auto"
    )
    attention: Annotated[
        str, "auto (the fastest that works), sdpa, flash, cudnn, efficient, xformers, sliced or math."
    ] = "auto"
    memory: Annotated[str, "auto (what fits), high (all on the device) or low (least)."] = "auto"
    clip: Annotated[str, "auto, none, emoji-clip, a folder with a CLIPModel or SiglipModel, or a hub id."] = "auto"
    detector: Annotated[
        str | None, "A zero-shot detector, for count['cat'] and the like in gates: a folder or a hub id."
    ] = None
    classifier: Annotated[str | None, "An image classifier, for p_class['tabby'] in gates: a folder or a hub id."] = (
        None
    )
    captioner: Annotated[
        str | None, "A model that answers questions, for answer['is it red?'] in gates: a folder or a hub id."
    ] = None
    format: Annotated[str, "Of the pictures: png, webp, jpeg or jxl."] = "png"
    quality: Annotated[
        int | None, "Of webp, jpeg and jxl, 1 to 100; default 90; at 100 webp and jxl keep every bit."
    ] = None
    no_metadata: Annotated[bool, "Write pictures that say nothing of how they were made."] = False
    aesthetic: Annotated[str | None, "A .safetensors with weight [1, width] and bias [1] over CLIP embeddings."] = None
    scorers: Annotated[tuple[Any, ...], "An installed scorer; repeatable."] = ()  # names, or in Python functions
    picking: Picking = NONE
    max_total_images: Annotated[int | None, "Begin no more when the run has so many."] = None
    max_seconds: Annotated[float | None, "Begin no more images after so long."] = None
    quiet: bool = False
