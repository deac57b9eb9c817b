"""Classifier folders in the layout of transformers: tiny networks with seeded random weights, of every class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LABELS = ("tabby, tabby cat", "dog", "red fox", "house", "green apple")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
        "patch_size": 8}  # fmt: skip
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
_CONV = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
_FOUR = {"depths": [1, 1, 1, 1], "hidden_sizes": [4, 8, 12, 16]}
_PVT = {"image_size": 32, "num_hidden_layers": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [4, 8, 12, 16],
        "num_attention_heads": [1, 1, 1, 1],
        "mlp_ratios": [2, 2, 2, 2], "sequence_reduction_ratios": [2, 2, 2, 1], "patch_sizes": [4, 2, 2, 2]}  # fmt: skip
_LEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1],
          "key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2],
          "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]]}  # fmt: skip
SQUARE: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
BEIT = {"feature_extractor_type": "BeitFeatureExtractor", "size": 40, "crop_size": 32, "do_center_crop": True}
BIT = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40},
       "crop_size": {"height": 32, "width": 32}}  # fmt: skip
CONVNEXT = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 32, "crop_pct": 0.8, **IMAGENET}
WARPED = {"image_processor_type": "ConvNextImageProcessorFast", "size": {"shortest_edge": 384}}
MOBILEVIT = {"feature_extractor_type": "MobileViTFeatureExtractor", "size": 72, "crop_size": 64, "resample": 2}

# Of each class: what its config needs to be tiny, and what its folder says of its processor.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ViTForImageClassification": (_VIT, {"size": 32, **IMAGENET}),  # without a processor's name, as the first ones
    "ViTMSNForImageClassification": (_VIT, SQUARE),
    "IJepaForImageClassification": (_VIT, SQUARE),
    "DeiTForImageClassification": (_VIT, {"feature_extractor_type": "DeiTFeatureExtractor", "size": 36,
                                          "crop_size": 32}),
    "DeiTForImageClassificationWithTeacher": (_VIT, {"size": 40, "crop_size": 32, "do_center_crop": True}),
    "BeitForImageClassification": ({**_VIT, "use_relative_position_bias": True}, BEIT),
    "Data2VecVisionForImageClassification": ({**_VIT, "use_shared_relative_position_bias": True}, BEIT),
    "SwinForImageClassification": (_SWIN, {"size": 32, "resample": 3, **IMAGENET}),
    "Swinv2ForImageClassification": (_SWIN, SQUARE),
    "SwiftFormerForImageClassification": ({"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]},
                                          {**SQUARE, "size": 64}),
    "ConvNextForImageClassification": (_FOUR, CONVNEXT),
    "ConvNextV2ForImageClassification": (_FOUR, WARPED),
    "ResNetForImageClassification": ({"embedding_size": 8, **_CONV, "layer_type": "basic"}, CONVNEXT),
    "RegNetForImageClassification": ({"embedding_size": 8, **_FOUR, "groups_width": 4}, CONVNEXT),
    "BitForImageClassification": ({"embedding_size": 8, **_FOUR, "hidden_sizes": [8, 8, 16, 16], "num_groups": 2}, BIT),
    "Dinov2ForImageClassification": ({**_VIT, "mlp_ratio": 2}, BIT),
    "Dinov2WithRegistersForImageClassification": ({**_VIT, "mlp_ratio": 2, "num_register_tokens": 2}, BIT),
    "FocalNetForImageClassification": ({"image_size": 32, "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                        "focal_levels": [1, 1], "focal_windows": [3, 3]}, BIT),
    "HieraForImageClassification": ({"embed_dim": 8, "image_size": [32, 32], "patch_size": [3, 3],
                                     "patch_stride": [2, 2], "patch_padding": [1, 1], "depths": [1, 1, 1],
                                     "num_heads": [1, 2, 2], "masked_unit_size": [4, 4],
                                     "masked_unit_attention": [True, True, False], "query_stride": [2, 2],
                                     "num_query_pool": 2, "embed_dim_multiplier": 2.0}, BIT),
    "CLIPForImageClassification": ({"vision_config": _VIT, "text_config": {"hidden_size": 16, "num_hidden_layers": 1,
                                    "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99},
                                    "projection_dim": 16}, {**BIT, "image_processor_type": "CLIPImageProcessor"}),
    "SiglipForImageClassification": ({"vision_config": _VIT, "text_config": {"hidden_size": 16, "num_hidden_layers": 1,
                                      "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99}},
                                     {**SQUARE, "image_processor_type": "SiglipImageProcessor", "resample": 3}),
    "PvtV2ForImageClassification": ({**_PVT, "num_hidden_layers": 4, "sr_ratios": [2, 2, 2, 1],
                                     "patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2]}, {"size": 32}),
    "SegformerForImageClassification": ({"hidden_sizes": [4, 8, 12, 16], "depths": [1, 1, 1, 1],
                                         "num_attention_heads": [1, 1, 1, 1]},
                                        {"feature_extractor_type": "SegformerFeatureExtractor", "size": 64}),
    "LevitForImageClassification": (_LEVIT, {"feature_extractor_type": "LevitFeatureExtractor", "size": 64,
                                             "crop_size": 64}),
    "LevitForImageClassificationWithTeacher": (_LEVIT, {"image_processor_type": "LevitImageProcessor",
                                                        "size": {"shortest_edge": 64},
                                                        "crop_size": {"height": 64, "width": 64}}),
    "PoolFormerForImageClassification": ({**_FOUR, "num_encoder_blocks": 4},
                                         {"feature_extractor_type": "PoolFormerFeatureExtractor", "size": 32,
                                          "crop_size": 32, "crop_pct": 0.9}),
    "MobileNetV1ForImageClassification": ({"depth_multiplier": 0.25}, {"size": {"shortest_edge": 40}, "crop_size":
                                          {"height": 32, "width": 32},
                                          "image_processor_type": "MobileNetV1ImageProcessor"}),
    "MobileNetV2ForImageClassification": ({"depth_multiplier": 0.25}, {"size": {"shortest_edge": 40}, "crop_size":
                                          {"height": 32, "width": 32},
                                          "feature_extractor_type": "MobileNetV2FeatureExtractor"}),
    "MobileViTForImageClassification": ({"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
                                         "image_size": 64, "num_attention_heads": 2}, MOBILEVIT),
    "MobileViTV2ForImageClassification": ({"image_size": 64, "width_multiplier": 0.25}, MOBILEVIT),
}  # fmt: skip


def tiny_classifier(
    folder: Path, kind: str = "ViTForImageClassification", labels: tuple[str, ...] = LABELS, **fields: Any
) -> Path:
    """Write a classifier's folder (about 32x32 pixels, LABELS) and return it. fields: of its config."""
    import transformers

    config, processor = CASES[kind]
    cls = getattr(transformers, kind)
    torch.manual_seed(11)
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    model = cls(cls.config_class(**config, **named, **fields)).eval()
    with torch.no_grad():  # as drawn it says the same of every picture
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 2 / weight[0].numel() ** 0.5)
        norms = [
            module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d)
        ]
        if norms:  # their statistics are those of noise, or every logit is huge
            for norm in norms:
                norm.momentum = 1.0
            model.train()(torch.randn(16, 3, 64, 64))
            model.eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
