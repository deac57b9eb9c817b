"""Folders of the other senses in the layout of transformers: tiny networks with seeded random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
)

from tests.tiny import EMBEDDED, TOKENS

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"?.", "a", "picture", "of", "red", "fox", "cat", "two", "how",
         "many", "in", "the", "snow", "on", "grass", "green", "house"]  # fmt: skip


def tiny_clipseg(folder: Path, seed: int = 5) -> Path:
    """Write a CLIPSegForImageSegmentation folder (32x32 pixels, patches of 8, emoji tokenizer) and return it."""
    torch.manual_seed(seed)
    config = CLIPSegConfig(
        text_config={**SMALL, **TOKENS}, vision_config={**SMALL, "image_size": 32, "patch_size": 8, "hidden_size": 24},
        projection_dim=16, extract_layers=[0, 1], reduce_dim=12, decoder_num_attention_heads=2,
        decoder_intermediate_size=24, conditional_layer=0,
    )  # fmt: skip
    model: Any = CLIPSegForImageSegmentation(config)
    with torch.no_grad():  # as drawn its maps are almost constant
        for weight in model.decoder.parameters():
            weight.normal_(0, 0.5)
        for weight in model.clip.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
        model.decoder.transposed_convolution.bias.fill_(-2.0)  # masks of about a tenth of the picture
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / "emoji" / "tokenizer" / name, folder / name)
    _write(folder, {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2, **IMAGENET})
    return folder


def tiny_blip(folder: Path) -> Path:
    """Write a BlipForConditionalGeneration folder (32x32 pixels, a vocabulary of WORDS) and return it."""
    return _blip(BlipForConditionalGeneration, folder)


def tiny_blip_vqa(folder: Path) -> Path:
    """Write a BlipForQuestionAnswering folder (32x32 pixels, a vocabulary of WORDS) and return it."""
    return _blip(BlipForQuestionAnswering, folder)


def _blip(kind: Any, folder: Path) -> Path:
    torch.manual_seed(7)
    # As of Salesforce: the ids of [DEC] and [ENC] are not in the vocabulary
    ids = {"bos_token_id": len(WORDS), "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3}
    text = {**SMALL, **ids, "vocab_size": len(WORDS) + 2, "max_position_embeddings": 40}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    model = kind(BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16))
    with torch.no_grad():  # as drawn it says the same of every picture
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.5 if "crossattention" in name or "vision" in name else 0.3)
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)}).save_pretrained(folder)
    size = {"size": {"height": 32, "width": 32}, "resample": 3}
    _write(folder, {"image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor", **size, **CLIP})
    return folder


def pictures(folder: Path, count: int = 3) -> Path:
    """Write noise of different sizes as PNGs into a folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        noise(n, 40 + 8 * n, 56 - 4 * n).save(folder / f"{n}.png")
    return folder


def noise(seed: int, height: int, width: int) -> Image.Image:
    """Return coarse noise of a size in pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def tensor(picture: Image.Image) -> torch.Tensor:
    """Return a picture as uint8 (1, 3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def _write(folder: Path, processor: dict[str, Any]) -> None:
    flags = {"do_normalize": True, "do_resize": True, "do_rescale": True}
    (folder / "preprocessor_config.json").write_text(json.dumps({**flags, **processor}))
