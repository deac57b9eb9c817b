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

    model: Annotated[str, "emoji (built in), a diffusers folder, a hub id, or one .safetensors file."] = "emoji"
    vae: Annotated[str | None, "Use this VAE instead of the model's: a file, a folder, or a model that has one."] = None
    text_encoder: Annotated[
        str | None, "Use these text encoders: a file, a folder or a model; for SDXL two files, FILE,FILE."
    ] = None
    prediction: Annotated[
        str, "What the UNet predicts if its file does not say: auto, epsilon, v_prediction or sample."
    ] = "auto"
    embeddings: Annotated[tuple[Any, ...], "A textual inversion, as FILE or FILE:WORD; repeatable."] = ()
    embedding_dir: Annotated[str | None, "Folder of textual inversions, used where a prompt has a file's name."] = None
    refiner: Annotated[str | None, "SDXL refiner for the last steps: a folder, hub id or file."] = None
    refiner_start: Annotated[float | None, "Fraction of the steps after which --refiner takes over; default 0.8."] = (
        None
    )
    segmenter: Annotated[str | None, "CLIPSeg model that finds what --mask names: a folder or a hub id."] = None
    variant: Annotated[str | None, "Variant of the weight files, such as fp16."] = None
    lora_dir: Annotated[str | None, "Folder of the LoRAs that prompts and old pictures name: <lora:name:0.8>."] = None
    control_dir: Annotated[str | None, "Folder of the ControlNets that old pictures and a server's clients name."] = (
        None
    )
    wildcards: Annotated[str | None, "With --syntax a1111: folder of the files for __wildcards__."] = None
    seed: Annotated[
        int, "With --prompt, the image's seed; with a file, rows without a seed derive theirs from it; -1: random."
    ] = 0
    batch_size: Annotated[int | None, "Images drawn at the same time: auto, or a number."] = None
    device: Annotated[str, "auto, cpu, mps, cuda or cuda:N."] = "auto"
    dtype: Annotated[str, "auto (float16 on a GPU, float32 on a CPU), float32, float16, bfloat16, int8 (weights)."] = (
        "auto"
    )
    attention: Annotated[
        str, "auto (the fastest that works), sdpa, flash, cudnn, efficient, xformers, sliced or math."
    ] = "auto"
    memory: Annotated[str, "auto (what fits), high (everything stays on the device) or low (least memory)."] = "auto"
    clip: Annotated[str, "auto, none, emoji-clip, a folder with a CLIPModel or SiglipModel, or a hub id."] = "auto"
    detector: Annotated[
        str | None, "Zero-shot detector, for gates such as count['cat'] == 2: a folder or a hub id."
    ] = None
    classifier: Annotated[
        str | None, "Image classifier, for gates such as p_class['tabby'] > 0.5: a folder or a hub id."
    ] = None
    captioner: Annotated[
        str | None,
        "Model that answers questions, for gates such as answer['is it red?'] == 'yes': a folder or a hub id.",
    ] = None
    format: Annotated[str, "Format of the picture files: png, webp, jpeg or jxl."] = "png"
    quality: Annotated[
        int | None, "Quality of webp, jpeg and jxl, 1 to 100; default 90; at 100 webp and jxl are lossless."
    ] = None
    no_metadata: Annotated[bool, "Do not write prompt and settings into the picture files."] = False
    aesthetic: Annotated[
        str | None, "Aesthetic head over CLIP embeddings: a .safetensors with weight [1, width] and bias [1]."
    ] = None
    scorers: Annotated[tuple[Any, ...], "An installed scorer plugin; repeatable."] = ()  # names, or in Python functions
    picking: Picking = NONE
    max_total_images: Annotated[int | None, "Stop starting new images when the run has this many."] = None
    max_seconds: Annotated[float | None, "Stop starting new images after this many seconds."] = None
    quiet: bool = False
