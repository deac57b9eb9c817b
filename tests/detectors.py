"""Detector folders in the layout of transformers: tiny networks with seeded random weights, and their processors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    SwinConfig,
)

from tests.tiny import EMBEDDED, TOKENS

SIDE = 32  # pixels of a picture as the OWLs read it; patches of 8
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".?", "a", "cat", "dog", "red", "fox", "the", "of", "two", "in"]


def _owl() -> dict[str, Any]:
    text = {**TOKENS, "max_position_embeddings": 16, "pad_token_id": 0, "hidden_size": 16, "intermediate_size": 32}
    small = {"num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 24, "intermediate_size": 48, "image_size": SIDE, "patch_size": 8}
    return {"text_config": {**text, **small}, "vision_config": {**vision, **small}, "projection_dim": 16}


def tiny_owlvit(folder: Path, seed: int = 5, **save: Any) -> Path:
    """Write an OwlViTForObjectDetection folder (16 boxes, emoji tokenizer) and return it."""
    torch.manual_seed(seed)
    _lively(OwlViTForObjectDetection(OwlViTConfig(**_owl()))).save_pretrained(folder, **save)
    _clip_tokenizer(folder)
    size = {"size": [SIDE, SIDE], "crop_size": SIDE, "do_center_crop": False, "resample": 3}
    _write(folder, {"feature_extractor_type": "OwlViTFeatureExtractor", "do_resize": True, **size, **CLIP})
    return folder


def tiny_owlv2(folder: Path) -> Path:
    """Write an Owlv2ForObjectDetection folder (16 boxes, emoji tokenizer) and return it."""
    torch.manual_seed(6)
    _lively(Owlv2ForObjectDetection(Owlv2Config(**_owl()))).save_pretrained(folder)
    _clip_tokenizer(folder)
    size = {"size": {"height": SIDE, "width": SIDE}, "do_pad": True, "resample": 2, "rescale_factor": 1 / 255}
    _write(folder, {"image_processor_type": "Owlv2ImageProcessor", **size, **CLIP})
    return folder


def tiny_grounding_dino(folder: Path) -> Path:
    """Write a GroundingDinoForObjectDetection folder (8 boxes, a vocabulary of WORDS) and return it."""
    torch.manual_seed(7)
    swin: dict[str, Any] = {
        "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
        "window_size": 4, "out_indices": [2, 3, 4],
    }  # fmt: skip
    bert = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=32)  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**swin), text_config=bert, d_model=32, encoder_layers=1, decoder_layers=2,
        num_queries=8, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_n_points=2, decoder_n_points=2,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)}).save_pretrained(folder)
    mean = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    size = {"size": {"shortest_edge": 80, "longest_edge": 120}, "do_pad": True, "resample": 2}
    _write(folder, {"image_processor_type": "GroundingDinoImageProcessor", "format": "coco_detection", **size, **mean})
    return folder


def _lively(model: Any) -> Any:
    """Return an OWL whose scores differ from box to box and word to word: its heads as drawn are almost constant."""
    with torch.no_grad():
        for part in (model.class_head, model.box_head):
            for weight in part.parameters():
                weight.normal_(0, 0.4)
        model.class_head.logit_shift.weight.zero_()
        model.class_head.logit_scale.weight.normal_(0, 0.3)
    return model


def _clip_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / "emoji" / "tokenizer" / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "!", "model_max_length": 16}))


def _write(folder: Path, processor: dict[str, Any]) -> None:
    flags = {"do_normalize": True, "do_rescale": True}
    (folder / "preprocessor_config.json").write_text(json.dumps({**flags, **processor}))
