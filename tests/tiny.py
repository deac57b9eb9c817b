"""Model folders in the real layouts, made in a few milliseconds: tiny networks with seeded random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

EMBEDDED = Path(__file__).parent.parent / "genkit" / "components" / "embedded"
# The ids of the emoji tokenizer, which every tiny text encoder is made for.
TOKENS = {
    "vocab_size": 4096,
    "bos_token_id": 4094,
    "eos_token_id": 4095,
    "pad_token_id": 4095,
    "max_position_embeddings": 32,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.1",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
PIXEL_SCHEDULER: dict[str, Any] = {
    "_diffusers_version": "0.42.1",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": True,
}


def tiny_stable_diffusion(
    folder: Path, scheduler: dict[str, Any] | None = None, cross_attention_dim: int = 16, **save: Any
) -> Path:
    """Write a StableDiffusionPipeline folder (16x16 pixels, 8x8x4 latents, emoji tokenizer) and return it.

    scheduler: a config with its `_class_name`; None is DDIM on Stable Diffusion's noise. save: for save_pretrained
    (`variant`, `max_shard_size`).
    """
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=cross_attention_dim,
    )
    unet.save_pretrained(folder / "unet", **save)
    _vae().save_pretrained(folder / "vae", **save)
    text_encoder = CLIPTextModel(CLIPTextConfig(**_clip_text(cross_attention_dim)))
    text_encoder.save_pretrained(folder / "text_encoder", **save)
    _copy_tokenizer(folder / "tokenizer")
    _write(folder / "scheduler" / "scheduler_config.json", scheduler or SCHEDULER)
    parts = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", (scheduler or SCHEDULER)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return _index(folder, "StableDiffusionPipeline", parts)


def tiny_sdxl(folder: Path, **index: Any) -> Path:
    """Write a StableDiffusionXLPipeline folder (32x32 pixels, 16x16x4 latents, emoji tokenizer twice) and return it.

    The second tokenizer pads with another token, as SDXL's does. index: further keys of model_index.json.
    """
    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    unet.save_pretrained(folder / "unet")
    _vae().save_pretrained(folder / "vae")
    narrow = {**_clip_text(16), "num_hidden_layers": 3}
    CLIPTextModel(CLIPTextConfig(**narrow)).save_pretrained(folder / "text_encoder")
    wide = {**_clip_text(24), "num_hidden_layers": 3, "projection_dim": 12, "hidden_act": "gelu"}
    CLIPTextModelWithProjection(CLIPTextConfig(**wide)).save_pretrained(folder / "text_encoder_2")
    _copy_tokenizer(folder / "tokenizer")
    _copy_tokenizer(folder / "tokenizer_2")
    config = json.loads((folder / "tokenizer_2" / "tokenizer_config.json").read_text())
    _write(folder / "tokenizer_2" / "tokenizer_config.json", {**config, "pad_token": "!"})
    _write(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    parts = {
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return _index(folder, "StableDiffusionXLPipeline", {**parts, **index})


def tiny_controlnet(
    folder: Path, model: Path, seed: int = 8, hints: tuple[int, ...] = (8, 16), **save: Any
) -> Path:  # fmt: skip
    """Write a ControlNet for the UNet of a tiny model's folder; none of its layers is zero, as those of a new one are.

    hints: widths of the layers that make pictures as small as latents, one more than the VAE's halvings. save: for
    save_pretrained.
    """
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=hints)
    for module in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.2)
    torch.nn.init.normal_(network.controlnet_cond_embedding.conv_out.weight, std=0.2)
    network.save_pretrained(folder, **save)
    return folder


def tiny_refiner(folder: Path, scheduler: dict[str, Any] | None = None, **index: Any) -> Path:
    """Write a folder of SDXL's refiner, for the latents of `tiny_sdxl`: the second text encoder alone, five time_ids.

    scheduler, index: as with the others.
    """
    torch.manual_seed(6)
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(12, 24),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(3, 6),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 12,
    )
    unet.save_pretrained(folder / "unet")
    _vae().save_pretrained(folder / "vae")
    wide = {**_clip_text(24), "num_hidden_layers": 3, "projection_dim": 12, "hidden_act": "gelu"}
    CLIPTextModelWithProjection(CLIPTextConfig(**wide)).save_pretrained(folder / "text_encoder_2")
    _copy_tokenizer(folder / "tokenizer_2")
    config = json.loads((folder / "tokenizer_2" / "tokenizer_config.json").read_text())
    _write(folder / "tokenizer_2" / "tokenizer_config.json", {**config, "pad_token": "!"})
    _write(folder / "scheduler" / "scheduler_config.json", scheduler or SCHEDULER)
    parts = {
        "add_watermarker": None,
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "scheduler": ["diffusers", (scheduler or SCHEDULER)["_class_name"]],
        "text_encoder": [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": [None, None],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return _index(folder, "StableDiffusionXLImg2ImgPipeline", {**parts, **index})


def random_sd15(folder: Path, clip: bool = False) -> Path:
    """Write a folder of Stable Diffusion 1.5's shapes with random half-precision weights (2.1 GB), emoji tokenizer.

    clip: with CLIP's vocabulary and tokenizer, as the model has them.
    """
    blocks = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    text: dict[str, Any] = {
        **({} if clip else TOKENS),
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    }
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel(
                sample_size=64,
                down_block_types=blocks[0],
                up_block_types=blocks[1],
                cross_attention_dim=768,
                attention_head_dim=8,
            ),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                sample_size=512,
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
    generator = torch.Generator().manual_seed(0)
    for name, network in networks.items():
        network.config.save_pretrained(folder / name) if name == "text_encoder" else network.save_config(folder / name)
        weights = {
            key: torch.empty(w.shape).normal_(1.0 if "norm" in key else 0.0, 0.02, generator=generator).half()
            for key, w in network.state_dict().items()
            if w.is_floating_point()
        }
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_file(weights, folder / name / f"{stem}.safetensors", metadata={"format": "pt"})
    if clip:
        shutil.copytree(EMBEDDED / "clip-tokenizer", folder / "tokenizer")
    else:
        _copy_tokenizer(folder / "tokenizer")
    _write(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    parts = {
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{key: [None, None] for key in ("feature_extractor", "image_encoder", "safety_checker")},
        "requires_safety_checker": False,
    }
    return _index(folder, "StableDiffusionPipeline", parts)


def tiny_ddpm(folder: Path, scheduler: str = "DDPMScheduler") -> Path:
    """Write a DDPMPipeline (or DDIMPipeline, by the scheduler's class) folder: 16x16 pixels, one UNet2DModel."""
    _unet2d(sample_size=16, channels=3).save_pretrained(folder / "unet")
    _write(folder / "scheduler" / "scheduler_config.json", {"_class_name": scheduler, **PIXEL_SCHEDULER})
    parts = {"scheduler": ["diffusers", scheduler], "unet": ["diffusers", "UNet2DModel"]}
    return _index(folder, scheduler.replace("Scheduler", "Pipeline"), parts)


def tiny_latent_unconditional(folder: Path) -> Path:
    """Write a folder of an unconditional latent model: a UNet2DModel over the 8x8x4 latents of a VAE, 16x16 pixels."""
    _unet2d(sample_size=8, channels=4).save_pretrained(folder / "unet")
    _vae().save_pretrained(folder / "vae")
    _write(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    parts = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return _index(folder, "LDMPipeline", parts)


def tiny_clip(folder: Path, projection: int = 8, **save: Any) -> Path:
    """Write a CLIPModel folder with tokenizer and preprocessor (16x16 pixels, embeddings of that width); return it."""
    torch.manual_seed(3)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    model = CLIPModel(CLIPConfig(text_config=_clip_text(16), vision_config=vision, projection_dim=projection))
    model.save_pretrained(folder, **save)
    _copy_tokenizer(folder)
    preprocessor = json.loads((EMBEDDED / "emoji-clip" / "preprocessor_config.json").read_text())
    preprocessor["size"] = preprocessor["crop_size"] = {"height": 16, "width": 16}
    _write(folder / "preprocessor_config.json", preprocessor)
    return folder


def _unet2d(sample_size: int, channels: int) -> UNet2DModel:
    torch.manual_seed(2)
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def _clip_text(width: int) -> dict[str, Any]:
    return {
        **TOKENS,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }


def _copy_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / "emoji" / "tokenizer" / name, folder / name)


def _index(folder: Path, pipeline: str, parts: dict[str, Any]) -> Path:
    _write(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.42.1", **parts})
    return folder


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def tiny_siglip(folder: Path, second: bool = False) -> Path:
    """Write a SiglipModel folder (16x16 pixels, embeddings of width 16) in the layout of Google's, and return it.

    second: SigLIP 2's, with Gemma's tokenizer.
    """
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(3)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**shared, "image_size": 16, "patch_size": 5}
    text = {**shared, "vocab_size": _siglip_tokenizer(folder, second), "max_position_embeddings": 12}
    model = SiglipModel(SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision))
    for name, weight in model.named_parameters():  # those of the constructor are all but equal for any text
        torch.nn.init.normal_(weight, std=0.3 if weight.ndim > 1 else 0.1)
        if name == "logit_scale":
            torch.nn.init.constant_(weight, 2.3)
        if name == "logit_bias":
            torch.nn.init.constant_(weight, -1.5)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "projection_size"):  # Google's do not state them
        del config["text_config"][name]
    _write(folder / "config.json", config)
    settings: dict[str, Any] = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 2 if second else 3,
    }
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}}
    kinds = {"image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor"}
    _write(folder / "preprocessor_config.json", {**settings, **kinds, "rescale_factor": 0.00392156862745098})
    return folder


def _siglip_tokenizer(folder: Path, second: bool) -> int:
    """Write tokenizer.json and tokenizer_config.json as SigLIP has them; return how many tokens there are."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    letters = [f"▁{c}" for c in "abcdefghijklmnopqrstuvwxyz"] + list("abcdefghijklmnopqrstuvwxyz▁")
    if second:
        names = ["<pad>", "<eos>", "<bos>", "<unk>", *letters, "▁fo", "▁ap", ",", "!"]
        vocab = {name: number for number, name in enumerate(names)}
        merges = [*(("▁", c) for c in "abcdefghijklmnopqrstuvwxyz"), ("▁f", "o"), ("▁a", "p")]
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        stated: dict[str, Any] = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True}
        stated |= {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        special = names[:4]
    else:
        pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -4.0) for c in letters), ("▁fo", -3.0), ("▁apple", -3.5)]
        pieces[1], pieces[0], special = ("</s>", 0.0), ("<pad>", 0.0), ["<pad>", "</s>", "<unk>"]
        pieces.insert(2, ("<unk>", 0.0))
        tokenizer = Tokenizer(models.Unigram(pieces, 2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        stated = {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True, "sp_model_kwargs": {}}
        stated |= {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", {**stated, "model_max_length": 12 if not second else int(1e30)})
    return tokenizer.get_vocab_size()
