"""The closed list of what a model folder may name: components, classes, pipelines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from genkit.components import keys, shapes
from genkit.components.rules import FLAG, Key, Rule, choice, optional

# Old spellings of weights, in files that are still in use: attention as diffusers wrote it before 0.15, the prefix that
# transformers dropped in version 5, and a buffer that was saved as if it were a weight.
DIFFUSERS_RENAMES = (
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
CLIP_RENAMES = ((r".*\bembeddings\.position_ids$", ""),)
CLIP_TEXT_RENAMES = (*CLIP_RENAMES, (r"^text_model\.", ""))


@dataclasses.dataclass(frozen=True)
class Network:
    """A class of network: where it comes from, its config's keys, and what its config says about its weights.

    stem: name of its weight files. table: its config's keys. check(config, where): raises InputError where keys do not
    go together.
    landmarks(config): shapes of some weights, enough to bound depth and width before anything is built.
    renames: (pattern, replacement) for old names of weights; an empty replacement of the whole name drops the weight.
    unused: keys that are checked and not passed on. nested: tables, known and unused, of the configs inside the config.
    """

    library: str
    stem: str
    table: Mapping[str, Key]
    check: Callable[[Mapping[str, Any], str], None]
    landmarks: Callable[[Mapping[str, Any]], shapes.Shapes]
    renames: tuple[tuple[str, str], ...]
    unused: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
    nested: Mapping[str, tuple[Mapping[str, Key], Mapping[str, Rule]]] = dataclasses.field(default_factory=dict)


NETWORKS = {
    "UNet2DModel": Network(
        "diffusers", "diffusion_pytorch_model", keys.UNET2D, shapes.check_unet2d, shapes.unet, DIFFUSERS_RENAMES
    ),
    "UNet2DConditionModel": Network(
        "diffusers", "diffusion_pytorch_model", keys.UNET2D_CONDITION, shapes.check_unet, shapes.unet, DIFFUSERS_RENAMES
    ),
    "AutoencoderKL": Network(
        "diffusers", "diffusion_pytorch_model", keys.AUTOENCODER_KL, shapes.check_blocks, shapes.vae, DIFFUSERS_RENAMES
    ),
    "CLIPTextModel": Network(
        "transformers",
        "model",
        keys.CLIP_TEXT,
        shapes.check_clip,
        shapes.clip_text,
        CLIP_TEXT_RENAMES,
        keys.TEXT_UNUSED,
    ),
    "CLIPTextModelWithProjection": Network(
        "transformers",
        "model",
        keys.CLIP_TEXT,
        shapes.check_clip,
        shapes.clip_text_projected,
        CLIP_RENAMES,
        keys.TEXT_UNUSED,
    ),
    "CLIPModel": Network(
        "transformers",
        "model",
        keys.CLIP,
        shapes.check_clip_pair,
        shapes.clip,
        CLIP_RENAMES,
        keys.CLIP_UNUSED,
        {"text_config": (keys.CLIP_TEXT, keys.TEXT_UNUSED), "vision_config": (keys.CLIP_VISION, keys.VISION_UNUSED)},
    ),
}

# Component -> (library, classes). A scheduler's class is read, and checked, by genkit.schedulers.
COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", ("UNet2DModel", "UNet2DConditionModel")),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer_2": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
}
# Parts that Stable Diffusion folders carry and that are never loaded here.
EXTRAS: dict[str, tuple[tuple[str, str], ...]] = {
    "safety_checker": (("stable_diffusion", "StableDiffusionSafetyChecker"),),
    "feature_extractor": (
        ("transformers", "CLIPFeatureExtractor"),
        ("transformers", "CLIPImageProcessor"),
        ("transformers", "CLIPImageProcessorFast"),
        ("transformers", "CLIPImageProcessorPil"),
    ),
    "image_encoder": (("transformers", "CLIPVisionModelWithProjection"),),
}
PIPELINES = {
    "StableDiffusionPipeline": "text-to-image",
    "StableDiffusionImg2ImgPipeline": "text-to-image",
    "StableDiffusionInpaintPipeline": "text-to-image",
    "StableDiffusionXLPipeline": "text-to-image",
    "StableDiffusionXLImg2ImgPipeline": "text-to-image",
    "StableDiffusionXLInpaintPipeline": "text-to-image",
    "DDPMPipeline": "unconditional",
    "DDIMPipeline": "unconditional",
    "PNDMPipeline": "unconditional",
    "LDMPipeline": "unconditional",
}
REQUIRED = {"text-to-image": ("unet", "vae", "text_encoder", "tokenizer"), "unconditional": ("unet",)}
SECOND = ("text_encoder_2", "tokenizer_2")  # what SDXL has besides
INDEX_OPTIONS = {
    "requires_safety_checker": Key(FLAG, False),
    "force_zeros_for_empty_prompt": Key(FLAG, True),  # SDXL's; others have no say in it
    "add_watermarker": Key(optional(FLAG), None),  # SDXL's; no mark is put into the pictures
    "requires_aesthetics_score": Key(choice(False), False),  # of SDXL's refiner, which is not supported
}
