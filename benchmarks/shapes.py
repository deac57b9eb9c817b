"""Model folders in the shapes of well-known checkpoints with random weights, for timing: nothing is downloaded.

Speed does not depend on the values of weights as long as they are finite: the last layers are scaled so that latents
stay finite for any number of steps and pictures are not of one colour. The tokenizer is that of the embedded model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

EMBEDDED = Path(__file__).parent.parent / "genkit" / "components" / "embedded"
WORDS = {"vocab_size": 4096, "bos_token_id": 4094, "eos_token_id": 4095, "pad_token_id": 4095}
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.42.1", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "timestep_spacing": "leading", "steps_offset": 1, "interpolation_type": "linear", "use_karras_sigmas": False,
}  # fmt: skip

_CROSS, _PLAIN = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
SD15 = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
    "attention_head_dim": 8, "layers_per_block": 2,
    "down_block_types": (*[_CROSS[0]] * 3, _CROSS[1]), "up_block_types": (_PLAIN[1], *[_PLAIN[0]] * 3),
}  # fmt: skip
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": (_CROSS[1], *[_CROSS[0]] * 2), "up_block_types": (*[_PLAIN[0]] * 2, _PLAIN[1]),
}  # fmt: skip
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
VIT_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14,
}  # fmt: skip

# The same architectures at a size that a CPU computes in milliseconds, to try a benchmark out.
TINY_SD15 = {**SD15, "sample_size": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32}
TINY_SDXL = {
    **SDXL, "sample_size": 16, "block_out_channels": (32, 32, 64), "cross_attention_dim": 48,
    "attention_head_dim": (2, 2, 4), "transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}  # fmt: skip
TINY_VAE = {**VAE, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "sample_size": 64}
TINY_L = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_G = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_VIT = {**TINY_L, "image_size": 28, "patch_size": 14}


def write_sd15(folder: Path, device: str, tiny: bool = False) -> Path:
    """Write a StableDiffusionPipeline folder in the shape of Stable Diffusion 1.5, float16, and return it."""
    _unet(TINY_SD15 if tiny else SD15, device).save_pretrained(folder / "unet")
    _vae(TINY_VAE if tiny else VAE, device, 0.18215).save_pretrained(folder / "vae")
    _text(folder / "text_encoder", TINY_L if tiny else CLIP_L, device, "CLIPTextModel")
    _tokenizer(folder / "tokenizer")
    _write(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "EulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None], "feature_extractor": [None, None],
        "image_encoder": [None, None], "requires_safety_checker": False,
    })  # fmt: skip
    return folder


def write_sdxl(folder: Path, device: str, tiny: bool = False) -> Path:
    """Write a StableDiffusionXLPipeline folder in the shape of SDXL base, float16, and return it."""
    _unet(TINY_SDXL if tiny else SDXL, device).save_pretrained(folder / "unet")
    vae = {**(TINY_VAE if tiny else VAE), "sample_size": 128 if tiny else 1024}
    _vae(vae, device, 0.13025).save_pretrained(folder / "vae")
    _text(folder / "text_encoder", TINY_L if tiny else CLIP_L, device, "CLIPTextModel")
    wide = {**(TINY_G if tiny else CLIP_G), "projection_dim": 16 if tiny else 1280}
    _text(folder / "text_encoder_2", wide, device, "CLIPTextModelWithProjection")
    for name in ("tokenizer", "tokenizer_2"):
        _tokenizer(folder / name)
    _write(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write(folder / "model_index.json", {
        "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.1",
        "force_zeros_for_empty_prompt": True, "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })  # fmt: skip
    return folder


def write_clip(folder: Path, device: str, tiny: bool = False) -> Path:
    """Write a CLIPModel folder in the shape of CLIP ViT-L/14, float16, and return it."""
    from transformers import CLIPConfig, CLIPModel

    text, vision = (
        {**WORDS, "max_position_embeddings": 77, **(TINY_L if tiny else CLIP_L)},
        TINY_VIT if tiny else VIT_L,
    )
    with torch.device(device):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16 if tiny else 768))
    model.half().save_pretrained(folder)
    _tokenizer(folder)
    preprocessor = json.loads((EMBEDDED / "emoji-clip" / "preprocessor_config.json").read_text())
    side = vision["image_size"]
    preprocessor["size"] = preprocessor["crop_size"] = {"height": side, "width": side}
    _write(folder / "preprocessor_config.json", preprocessor)
    return folder


def _unet(config: dict[str, Any], device: str) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**config)
    unet.conv_out.weight.data.mul_(0.1)  # small predictions: the latent is little more than its own noise
    return unet.half()


def _vae(config: dict[str, Any], device: str, scale: float) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = len(config["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    with torch.device(device):
        vae = AutoencoderKL(**config, **kinds, scaling_factor=scale)
    return vae.half()


def _text(folder: Path, config: dict[str, Any], device: str, name: str) -> None:
    import transformers

    torch.manual_seed(0)
    whole = transformers.CLIPTextConfig(**WORDS, max_position_embeddings=77, **config)
    with torch.device(device):
        model = getattr(transformers, name)(whole)
    model.half().save_pretrained(folder)


def _tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    source = EMBEDDED / "emoji" / "tokenizer"
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text())
    _write(folder / "tokenizer_config.json", {**config, "model_max_length": 77})


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))
