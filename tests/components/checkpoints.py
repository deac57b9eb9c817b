"""Tiny models of each family of Stable Diffusion, with CLIP's whole vocabulary, as folders of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from genkit.components.families import SCHEDULERS
from genkit.components.single import TOKENIZER

FAMILIES = ("SD 1", "SD 2", "SDXL", "SDXL refiner")
_HALF: dict[str, Any] = {"block_out_channels": (64, 128), "layers_per_block": 1, "norm_num_groups": 32}
_TWO: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "SD 1": {**_HALF, **_TWO, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 64},
    "SD 2": {
        **_HALF, **_TWO, "sample_size": 64, "attention_head_dim": (1, 2), "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "SDXL": {
        **_HALF, "sample_size": 128, "attention_head_dim": (1, 2), "cross_attention_dim": 64 + 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 6 * 32 + 96,
    },
    "SDXL refiner": {
        "block_out_channels": (64, 64, 128, 128), "layers_per_block": 1, "norm_num_groups": 32, "sample_size": 128,
        "attention_head_dim": (1, 1, 2, 2), "cross_attention_dim": 128, "transformer_layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 5 * 32 + 96,
    },
}  # fmt: skip


def folder_of(family: str, out: Path, **unet: Any) -> Path:
    """Write the folder of a tiny model of `family` with random weights and return it."""
    torch.manual_seed(5)
    sdxl, refiner = family.startswith("SDXL"), family == "SDXL refiner"
    UNet2DConditionModel(**{**UNETS[family], **unet}).save_pretrained(out / "unet")
    AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.13025 if sdxl else 0.18215, force_upcast=sdxl,
    ).save_pretrained(out / "vae")  # fmt: skip
    layers = {"SD 1": 2, "SD 2": 23}.get(family, 3)
    act = "gelu" if family == "SD 2" else "quick_gelu"
    if not refiner:
        CLIPTextModel(_text(64, layers, act)).save_pretrained(out / "text_encoder")
        _tokenizer(out / "tokenizer", "!" if family == "SD 2" else "<|endoftext|>")
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"}
    if sdxl:
        CLIPTextModelWithProjection(_text(128, 3, "gelu", 96)).save_pretrained(out / "text_encoder_2")
        _tokenizer(out / "tokenizer_2", "!")
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": not refiner,
        }
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    scheduler = {"_diffusers_version": "0.42.1", **SCHEDULERS[family]}
    if family == "SD 2":
        scheduler["prediction_type"] = "v_prediction"
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index |= {
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }  # fmt: skip
    if refiner:
        index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    (out / "model_index.json").write_text(json.dumps(index))
    return out


def _text(width: int, layers: int, act: str, projection: int | None = None) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, hidden_act=act,
        num_attention_heads=width // 64, max_position_embeddings=77, projection_dim=projection or width,
        pad_token_id=1, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip


def _tokenizer(out: Path, padding: str) -> None:
    shutil.copytree(TOKENIZER, out)
    path = out / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": padding}))
