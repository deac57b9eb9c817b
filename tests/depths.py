"""Folders of depth models in the layout of transformers: tiny networks with seeded random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BeitConfig,
    BitConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    GLPNConfig,
    GLPNForDepthEstimation,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)

from tests.senses import IMAGENET, SMALL

HEADS: dict[str, Any] = {"neck_hidden_sizes": [8, 8, 12, 12], "fusion_hidden_size": 8}
HALF: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True}
DINO: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 42,
    "patch_size": 14, "out_features": ["stage1", "stage2", "stage3", "stage4"], "reshape_hidden_states": False,
    "apply_layernorm": True,
}  # fmt: skip


def tiny_dpt(folder: Path) -> Path:
    """Write a DPTForDepthEstimation folder with its own ViT, as Intel/dpt-large: squares of 32 pixels."""
    config = DPTConfig(
        **{**SMALL, "num_hidden_layers": 4}, **HEADS, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3]
    )
    processor = {"feature_extractor_type": "DPTFeatureExtractor", "size": 32, "resample": 2, **HALF}
    return _write(DPTForDepthEstimation(config), folder, processor)


def tiny_dpt_dinov2(folder: Path) -> Path:
    """Write a DPTForDepthEstimation folder as facebook/dpt-dinov2-small-nyu: pictures as they are, padded."""
    config = DPTConfig(
        backbone_config=Dinov2Config(**DINO), neck_hidden_sizes=[8, 8, 12, 12], fusion_hidden_size=256,
        add_projection=True, use_bias_in_fusion_residual=False,
    )  # fmt: skip
    processor = {
        "image_processor_type": "DPTImageProcessor", "do_resize": False, "do_rescale": False, "do_pad": True,
        "size_divisor": 14, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375],
        "size": {"height": 384, "width": 384}, "keep_aspect_ratio": False, "ensure_multiple_of": 1, "resample": 3,
    }  # fmt: skip
    return _write(DPTForDepthEstimation(config), folder, processor)


def tiny_dpt_hybrid(folder: Path) -> Path:
    """Write a DPTForDepthEstimation folder as Intel/dpt-hybrid-midas: a BiT before the ViT."""
    bit: Any = BitConfig(  # type: ignore[call-arg]
        global_padding="same", layer_type="bottleneck", depths=[1, 1, 1], hidden_sizes=[32, 32, 32, 32],
        embedding_size=32, num_groups=4, out_features=["stage1", "stage2", "stage3"], embedding_dynamic_padding=True,
    )  # fmt: skip
    config = DPTConfig(
        **{**SMALL, "num_hidden_layers": 4}, neck_hidden_sizes=[32, 32, 12, 12], fusion_hidden_size=8, image_size=32,
        patch_size=16, backbone_out_indices=[0, 1, 2, 3], is_hybrid=True, backbone_config=bit,
        backbone_featmap_shape=[1, 32, 2, 2],
    )  # fmt: skip
    processor = {"feature_extractor_type": "DPTFeatureExtractor", "size": 32, "resample": 3, **HALF}
    return _write(DPTForDepthEstimation(config), folder, processor)


def tiny_depth_anything(folder: Path, **fields: Any) -> Path:
    """Write a DepthAnythingForDepthEstimation folder as LiheYoung/depth-anything-small-hf: proportions kept."""
    config = DepthAnythingConfig(
        backbone_config=Dinov2Config(**DINO), reassemble_hidden_size=16, **HEADS, head_hidden_size=6, **fields
    )
    processor = {
        "image_processor_type": "DPTImageProcessor", "size": {"height": 42, "width": 42}, "resample": 3,
        "keep_aspect_ratio": True, "ensure_multiple_of": 14, "do_pad": False, "size_divisor": None,
        "do_rescale": True, **IMAGENET,
    }  # fmt: skip
    return _write(DepthAnythingForDepthEstimation(config), folder, processor)


def tiny_zoedepth(folder: Path, heads: int = 1, **processor: Any) -> Path:
    """Write a ZoeDepthForDepthEstimation folder as Intel/zoedepth-nyu, with two heads as Intel/zoedepth-nyu-kitti."""
    beit: Any = BeitConfig(  # type: ignore[call-arg]
        **{**SMALL, "num_hidden_layers": 4}, image_size=32, patch_size=8, use_relative_position_bias=True,
        reshape_hidden_states=False, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    bins = [{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": name} for name in ("nyu", "kitti")[:heads]]
    config = ZoeDepthConfig(
        backbone_config=beit, neck_hidden_sizes=[8, 8, 12, 12], fusion_hidden_size=8, bottleneck_features=8,
        num_relative_features=4, num_attractors=[4, 4, 2, 2], bin_embedding_dim=8, bin_configurations=bins,
        num_patch_transformer_layers=4, patch_transformer_hidden_size=128, patch_transformer_intermediate_size=8,
        patch_transformer_num_attention_heads=2,
    )  # fmt: skip
    stated = {"image_processor_type": "ZoeDepthImageProcessor", "size": {"height": 32, "width": 40}, "do_pad": True,
              "ensure_multiple_of": 8, "keep_aspect_ratio": True, "resample": 2, **HALF}  # fmt: skip
    stated = {name: value for name, value in {**stated, **processor}.items() if value is not None}
    return _write(ZoeDepthForDepthEstimation(config), folder, stated, gain=1.5)


def tiny_glpn(folder: Path) -> Path:
    """Write a GLPNForDepthEstimation folder as vinvino02/glpn-nyu: sides of 32 pixels and multiples of them."""
    config = GLPNConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8,
        mlp_ratios=[2, 2, 2, 2],
    )  # fmt: skip
    processor = {"feature_extractor_type": "GLPNFeatureExtractor", "do_rescale": True, "resample": 2,
                 "size_divisor": 32, "do_normalize": None}  # fmt: skip
    return _write(GLPNForDepthEstimation(config), folder, processor)


def _write(model: Any, folder: Path, processor: dict[str, Any], gain: float = 1) -> Path:
    torch.manual_seed(9)
    with torch.no_grad():  # as drawn, depth is almost constant
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, gain * min(0.25, weight[0].numel() ** -0.5))
            elif "head" in name:
                weight.fill_(0.3)
    model.save_pretrained(folder)
    flags = {"do_normalize": True, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps({**flags, **processor}))
    return folder
