"""Folders of captioners beside BLIP in the layout of transformers: tiny networks with seeded random weights."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    GPT2Config,
    GPT2Tokenizer,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from tests.senses import IMAGENET, SMALL

LETTERS = ["\u0120", *string.ascii_letters, *".,?!'"]  # of byte-level BPE without merges; the first is a blank
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def tiny_florence(folder: Path) -> Path:
    """Write a Florence2ForConditionalGeneration folder as florence-community/Florence-2-base: 64 pixels, letters."""
    torch.manual_seed(3)
    vocab = {word: n for n, word in enumerate([*SPECIAL, *LETTERS])}
    tokenizer: Any = BartTokenizer(vocab=vocab, merges=[], extra_special_tokens={"image_token": "<image>"})
    text = BartConfig(
        vocab_size=len(tokenizer) + 2, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=160,
    )  # fmt: skip
    vision: dict[str, Any] = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2],
        "window_size": 4, "projection_dim": 16,
    }  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    model: Any = Florence2ForConditionalGeneration(
        Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=image)
    )
    generation = {"num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True, "forced_bos_token_id": 0,
                  "forced_eos_token_id": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
                  "decoder_start_token_id": 2}  # fmt: skip
    size = {"height": 64, "width": 64}
    processor = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "Florence2Processor", "size": size,
        "crop_size": size, "do_center_crop": False, "resample": 3, "image_seq_length": 65, **IMAGENET,
    }  # fmt: skip
    return _write(model, tokenizer, folder, processor, generation)


def tiny_vit_gpt2(folder: Path) -> Path:
    """Write a VisionEncoderDecoderModel folder as nlpconnect/vit-gpt2-image-captioning: 32 pixels, letters."""
    torch.manual_seed(4)
    vocab = {word: n for n, word in enumerate([*LETTERS, "<|endoftext|>"])}
    tokenizer: Any = GPT2Tokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>")
    end = vocab["<|endoftext|>"]
    vit = ViTConfig(**{**SMALL, "image_size": 32, "patch_size": 8})
    gpt2: Any = GPT2Config(  # type: ignore[call-arg]
        vocab_size=len(vocab), n_positions=64, n_embd=12, n_layer=2, n_head=2, is_decoder=True,
        add_cross_attention=True, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    config: Any = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)
    model: Any = VisionEncoderDecoderModel(config)
    generation = {"decoder_start_token_id": end, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2, **half}
    return _write(model, tokenizer, folder, processor, generation)


def _write(model: Any, tokenizer: Any, folder: Path, processor: dict[str, Any], generation: dict[str, Any]) -> Path:
    with torch.no_grad():  # as drawn it says the same of every picture
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.0 if "cross" in name or "encoder_attn" in name else 0.4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    flags = {"do_normalize": True, "do_resize": True, "do_rescale": True}
    (folder / "preprocessor_config.json").write_text(json.dumps({**flags, **processor}))
    return folder
