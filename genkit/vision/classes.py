"""The closed list of model classes that may be loaded as vision models, from transformers and timm, with settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from genkit.vision.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Processor
from genkit.vision.processors import PROCESSORS
from genkit.vision.timms import KIND, RENAMES


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model class: the sense it serves, its `model_type`, its image processor and its tokenizer.

    tokenizer: a class of transformers, or None for a model without text input. processor: defaults of its image
    processor. nested: {part of its config: model types that this part may have}. renames: as in `read_weights`, for
    keys that older versions of transformers wrote. answers: whether it answers questions and writes no captions.
    words: the part of its config that holds vocab_size, and the default of that. generates: whether it reads
    generation_config.json.
    """

    sense: str
    model_type: str
    processor: Processor
    tokenizer: str | None = None
    nested: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    answers: bool = False
    words: tuple[str, int] = ("text_config", 30522)
    generates: bool = False


_OLD = ((r".*\.position_ids$", ""), (r".*\brelative_position_index$", ""))  # buffers that older versions saved
# Classes of transformers with a closed set of labels: model_type, and the processor where a folder names none.
_CLASSIFIERS = {
    "ViTForImageClassification": ("vit", "ViT"),
    "ViTMSNForImageClassification": ("vit_msn", "ViT"),
    "IJepaForImageClassification": ("ijepa", "ViT"),
    "DeiTForImageClassification": ("deit", "DeiT"),
    "DeiTForImageClassificationWithTeacher": ("deit", "DeiT"),
    "BeitForImageClassification": ("beit", "Beit"),
    "Data2VecVisionForImageClassification": ("data2vec-vision", "Beit"),
    "SwinForImageClassification": ("swin", "ViT"),
    "Swinv2ForImageClassification": ("swinv2", "ViT"),
    "SwiftFormerForImageClassification": ("swiftformer", "ViT"),
    "ConvNextForImageClassification": ("convnext", "ConvNext"),
    "ConvNextV2ForImageClassification": ("convnextv2", "ConvNext"),
    "ResNetForImageClassification": ("resnet", "ConvNext"),
    "RegNetForImageClassification": ("regnet", "ConvNext"),
    "BitForImageClassification": ("bit", "Bit"),
    "Dinov2ForImageClassification": ("dinov2", "Bit"),
    "Dinov2WithRegistersForImageClassification": ("dinov2_with_registers", "Bit"),
    "FocalNetForImageClassification": ("focalnet", "Bit"),
    "HieraForImageClassification": ("hiera", "Bit"),
    "CLIPForImageClassification": ("clip", "CLIP"),
    "SiglipForImageClassification": ("siglip", "Siglip"),
    "PvtV2ForImageClassification": ("pvt_v2", "Pvt"),
    "SegformerForImageClassification": ("segformer", "Segformer"),
    "LevitForImageClassification": ("levit", "Levit"),
    "LevitForImageClassificationWithTeacher": ("levit", "Levit"),
    "PoolFormerForImageClassification": ("poolformer", "PoolFormer"),
    "MobileNetV1ForImageClassification": ("mobilenet_v1", "MobileNetV1"),
    "MobileNetV2ForImageClassification": ("mobilenet_v2", "MobileNetV2"),
    "MobileViTForImageClassification": ("mobilevit", "MobileViT"),
    "MobileViTV2ForImageClassification": ("mobilevitv2", "MobileViT"),
}
CLASSES: dict[str, Kind] = {
    "OwlViTForObjectDetection": Kind(
        "detector", "owlvit", Processor({"height": 768, "width": 768}, "bicubic", CLIP_MEAN, CLIP_STD),
        tokenizer="CLIPTokenizer", renames=_OLD,
    ),
    "Owlv2ForObjectDetection": Kind(
        "detector", "owlv2",
        Processor({"height": 960, "width": 960}, "bilinear", CLIP_MEAN, CLIP_STD, square=True),
        tokenizer="CLIPTokenizer", renames=_OLD,
    ),
    "GroundingDinoForObjectDetection": Kind(
        "detector", "grounding-dino",
        Processor({"shortest_edge": 800, "longest_edge": 1333}, "bilinear", IMAGENET_MEAN, IMAGENET_STD),
        tokenizer="BertTokenizer",
        nested={"backbone_config": ("swin",), "text_config": ("bert",)},
        renames=_OLD,
    ),
    "CLIPSegForImageSegmentation": Kind(
        "segmenter", "clipseg", Processor({"height": 224, "width": 224}, "bilinear", (0.5,) * 3, (0.5,) * 3),
        tokenizer="CLIPTokenizer", renames=_OLD,
        nested={"text_config": ("clipseg_text_model",), "vision_config": ("clipseg_vision_model",)},
    ),
    **{
        name: Kind(
            "captioner", "blip", Processor({"height": 384, "width": 384}, "bicubic", CLIP_MEAN, CLIP_STD),
            tokenizer="BertTokenizer", renames=_OLD,
            nested={"text_config": ("blip_text_model",), "vision_config": ("blip_vision_model",)},
            answers=name == "BlipForQuestionAnswering",
        )
        for name in ("BlipForConditionalGeneration", "BlipForQuestionAnswering")
    },
    **{
        name: Kind("classifier", model_type, PROCESSORS[processor], renames=_OLD)
        for name, (model_type, processor) in _CLASSIFIERS.items()
    },
    KIND: Kind("classifier", "timm_wrapper", PROCESSORS["Bit"], renames=RENAMES),  # its preprocessing is in its config
    "Florence2ForConditionalGeneration": Kind(
        "captioner", "florence2", Processor({"height": 768, "width": 768}, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
        tokenizer="BartTokenizer", words=("text_config", 50265), generates=True,
        nested={"text_config": ("bart",), "vision_config": ("florence_vision",)},
    ),
    "VisionEncoderDecoderModel": Kind(
        "captioner", "vision-encoder-decoder",
        Processor({"height": 224, "width": 224}, "bilinear", (0.5,) * 3, (0.5,) * 3),
        tokenizer="GPT2Tokenizer", words=("decoder", 50257), generates=True,
        nested={"encoder": ("vit",), "decoder": ("gpt2",)},
        renames=(*_OLD, (r".*\.(attn|crossattention)\.(masked_)?bias$", "")),
    ),
    "XCLIPModel": Kind(
        "video classifier", "xclip",
        Processor({"shortest_edge": 224}, "bilinear", IMAGENET_MEAN, IMAGENET_STD, crop=(224, 224)),
        tokenizer="CLIPTokenizer", renames=_OLD,
        nested={"text_config": ("xclip_text_model",), "vision_config": ("xclip_vision_model",)},
    ),
    "DPTForDepthEstimation": Kind(
        "depth estimator", "dpt",
        Processor({"height": 384, "width": 384}, "bicubic", (0.5,) * 3, (0.5,) * 3, multiple=1),
        nested={"backbone_config": ("dinov2", "bit")},
    ),
    "DepthAnythingForDepthEstimation": Kind(
        "depth estimator", "depth_anything",
        Processor({"height": 384, "width": 384}, "bicubic", (0.5,) * 3, (0.5,) * 3, multiple=1),
        nested={"backbone_config": ("dinov2",)},
    ),
    "ZoeDepthForDepthEstimation": Kind(
        "depth estimator", "zoedepth",
        Processor({"height": 384, "width": 512}, "bilinear", (0.5,) * 3, (0.5,) * 3, multiple=1 / 32, keep_ratio=True,
                  mirrored=True, corners=True),
        nested={"backbone_config": ("beit",)}, renames=_OLD,
    ),
    "GLPNForDepthEstimation": Kind(
        "depth estimator", "glpn", Processor(None, "bilinear", (0.0,) * 3, (1.0,) * 3, floor=32),
    ),
}  # fmt: skip
