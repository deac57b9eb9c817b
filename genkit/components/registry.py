"""The closed list of what a model folder may name: network classes, components, pipelines. Nothing else is imported.

To add a network class:

1. keys.py: a table of its config's keys with the library's defaults; tests/components/test_config.py compares it with
   the class's signature.
2. shapes.py: a check of keys that depend on each other, and the shapes of a few weights that bound depth and width.
3. Here: its entry in NETWORKS, and the class under its component in COMPONENTS. A new component is also a field of
   Components (loading.py), and folder.py checks that it fits the other components.
4. Here: the pipeline classes whose folders hold it, in PIPELINES.
5. footprint.py: how many elements are alive in one call, from which needs.py computes memory.
6. tests/tiny.py: a tiny model with it, for the tests in tests/components/ and tests/device/test_memory.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from genkit.components import keys, shapes
from genkit.components.rules import FLAG, Key, Rule, optional

# Names of weights in older files: attention as diffusers named it before 0.15, the prefix that transformers dropped in
# version 5, and a buffer that was saved among the weights.
OLD_ATTENTION = (
    (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
)
OLD_CLIP = ((r".*\bembeddings\.position_ids$", ""),)
# Of a whole CLIP where its text half is wanted
WHOLE_CLIP = ((r"^(vision_model\..*|visual_projection\.weight|logit_scale)$", ""),)
OLD_CLIP_TEXT = (*OLD_CLIP, *WHOLE_CLIP, (r"^text_projection\.weight$", ""), (r"^text_model\.", ""))
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network class of `library`, "diffusers" or "transformers", and how its config and weights are checked.

    table: its config's keys. check(config, where): raises InputError for keys that contradict each other.
    landmarks(config): shapes of some weights, enough to bound depth and width before the network is built.
    renames: (regular expression, replacement) for weight names of older files; a name that becomes empty is dropped.
    unused: config keys that are accepted and not passed on. nested: (table, unused) of each config inside the config.
    """

    library: str
    table: Mapping[str, Key]
    check: Callable[[Mapping[str, Any], str], None]
    landmarks: Callable[[Mapping[str, Any]], shapes.Shapes]
    renames: tuple[tuple[str, str], ...]
    unused: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
    nested: Mapping[str, tuple[Mapping[str, Key], Mapping[str, Rule]]] = dataclasses.field(default_factory=dict)

    @property
    def stem(self) -> str:
        """Name of its weight files before ".safetensors" and the like."""
        return STEMS[self.library]


NETWORKS = {
    "UNet2DModel": Network("diffusers", keys.UNET2D, shapes.check_unet2d, shapes.unet, OLD_ATTENTION),
    "UNet2DConditionModel": Network("diffusers", keys.UNET2D_CONDITION, shapes.check_unet, shapes.unet, OLD_ATTENTION),
    "ControlNetModel": Network("diffusers", keys.CONTROLNET, shapes.check_control, shapes.control, OLD_ATTENTION),
    "AutoencoderKL": Network("diffusers", keys.AUTOENCODER_KL, shapes.check_blocks, shapes.vae, OLD_ATTENTION),
    "CLIPTextModel": Network(
        "transformers", keys.CLIP_TEXT, shapes.check_clip, shapes.clip_text, OLD_CLIP_TEXT, keys.TEXT_UNUSED
    ),
    "CLIPTextModelWithProjection": Network(
        "transformers", keys.CLIP_TEXT, shapes.check_clip, shapes.clip_text_projected, (*OLD_CLIP, *WHOLE_CLIP),
        keys.TEXT_UNUSED,
    ),
    "CLIPModel": Network(
        "transformers", keys.CLIP, shapes.check_clip_pair, shapes.clip, OLD_CLIP, keys.CLIP_UNUSED,
        {"text_config": (keys.CLIP_TEXT, keys.TEXT_UNUSED), "vision_config": (keys.CLIP_VISION, keys.VISION_UNUSED)},
    ),
    "SiglipModel": Network(
        "transformers", keys.SIGLIP, shapes.check_siglip, shapes.siglip, OLD_CLIP, keys.SIGLIP_UNUSED,
        {"text_config": (keys.SIGLIP_TEXT, keys.SIGLIP_TEXT_UNUSED),
         "vision_config": (keys.SIGLIP_VISION, keys.SIGLIP_VISION_UNUSED)},
    ),
}  # fmt: skip

# The components of a model_index.json: (library, classes). genkit.schedulers checks the scheduler's class.
COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unet": ("diffusers", ("UNet2DModel", "UNet2DConditionModel")),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "tokenizer_2": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
}
# Networks that are given beside a model.
BESIDE: dict[str, tuple[str, tuple[str, ...]]] = {"controlnet": ("diffusers", ("ControlNetModel",))}
# The scorers, by the model_type of their config.json.
SCORERS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
# Components of Stable Diffusion folders that are never loaded.
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "safety_checker": ("stable_diffusion", ("StableDiffusionSafetyChecker", "FlaxStableDiffusionSafetyChecker")),
    "feature_extractor": (
        "transformers",
        ("CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    ),
    "image_encoder": ("transformers", ("CLIPVisionModelWithProjection",)),
    "controlnet": ("diffusers", ("ControlNetModel", "MultiControlNetModel")),  # rows name it
}
# The pipeline classes of a model_index.json, and the kind of model that each is.
PIPELINES = {
    "StableDiffusionPipeline": "text-to-image",
    "StableDiffusionImg2ImgPipeline": "text-to-image",
    "StableDiffusionInpaintPipeline": "text-to-image",
    "StableDiffusionXLPipeline": "text-to-image",
    "StableDiffusionXLImg2ImgPipeline": "text-to-image",
    "StableDiffusionXLInpaintPipeline": "text-to-image",
    "LatentConsistencyModelPipeline": "text-to-image",
    "LatentConsistencyModelImg2ImgPipeline": "text-to-image",
    **dict.fromkeys(
        (
            *("StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"),
            *("StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionXLControlNetImg2ImgPipeline"),
            *("StableDiffusionControlNetInpaintPipeline", "StableDiffusionXLControlNetInpaintPipeline"),
        ),
        "text-to-image",
    ),
    "DDPMPipeline": "unconditional",
    "DDIMPipeline": "unconditional",
    "PNDMPipeline": "unconditional",
    "LDMPipeline": "unconditional",
}
# What the constructors of diffusers' pipelines change in a scheduler's config, or its class.
_OLD = {"steps_offset": 1, "clip_sample": False}
CORRECTED: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": _OLD,
    "StableDiffusionImg2ImgPipeline": _OLD,
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
    "DDIMPipeline": {"_class_name": "DDIMScheduler"},
    "PNDMPipeline": {"_class_name": "PNDMScheduler"},
}
OLD_SIZES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
REQUIRED = {"text-to-image": ("unet", "vae", "text_encoder", "tokenizer"), "unconditional": ("unet",)}
SECOND = ("text_encoder_2", "tokenizer_2")  # required by the SDXL pipelines only
INDEX_OPTIONS = {
    "requires_safety_checker": Key(FLAG, False),
    "force_zeros_for_empty_prompt": Key(FLAG, True),  # SDXL's; other pipelines ignore it
    "add_watermarker": Key(optional(FLAG), None),  # SDXL's; genkit adds no watermark
    "requires_aesthetics_score": Key(FLAG, False),  # true for SDXL's refiner
}
