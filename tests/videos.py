"""Clips, and folders of video classifiers in the layout of transformers: tiny networks with seeded random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import XCLIPConfig, XCLIPModel

from tests.senses import IMAGENET, SMALL, noise
from tests.tiny import EMBEDDED, TOKENS


def tiny_xclip(folder: Path, frames: int = 4) -> Path:
    """Write an XCLIPModel folder as microsoft/xclip-base-patch32: 32 pixels, emoji tokenizer; return it."""
    torch.manual_seed(6)
    vision = {**SMALL, "image_size": 32, "patch_size": 8, "num_frames": frames, "mit_hidden_size": 16,
              "mit_intermediate_size": 32, "mit_num_attention_heads": 2}  # fmt: skip
    config: Any = XCLIPConfig(
        text_config={**SMALL, **TOKENS}, vision_config=vision, projection_dim=16, prompt_num_attention_heads=2
    )
    model: Any = XCLIPModel(config)
    with torch.no_grad():  # as drawn all clips are alike
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / "emoji" / "tokenizer" / name, folder / name)
    flags = {"do_center_crop": True, "do_normalize": True, "do_resize": True}
    processor = {"feature_extractor_type": "VideoMAEFeatureExtractor", "size": 32, "crop_size": 32, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps({**flags, **processor, **IMAGENET}))
    return folder


def shots(count: int, seed: int = 0, height: int = 40, width: int = 56) -> list[Image.Image]:
    """Return frames of coarse noise, each another one."""
    return [noise(100 * seed + n, height, width) for n in range(count)]


def animation(file: Path, frames: list[Image.Image]) -> Path:
    """Write frames as an animated GIF or lossless WebP, and return its name."""
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    return file


def frame_folder(folder: Path, frames: list[Image.Image]) -> Path:
    """Write frames as PNG files and return their folder."""
    folder.mkdir(parents=True)
    for n, frame in enumerate(frames):
        frame.save(folder / f"{n}.png")
    return folder
