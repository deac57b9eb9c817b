"""Residual blocks laid out for a GPU, driven on the CPU by torch's own operators: each network computes what it did."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from genkit.components import inspect_model, load_components
from genkit.device import norms
from genkit.device.norms import fuse_norms
from tests.tiny import tiny_ddpm, tiny_latent_unconditional, tiny_sdxl, tiny_stable_diffusion

CPU = torch.device("cpu")


@pytest.fixture
def plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels be torch's operators, as under a compiler."""
    monkeypatch.setattr(norms, "unusable", lambda device, dtype: None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("write", [tiny_stable_diffusion, tiny_sdxl, tiny_latent_unconditional, tiny_ddpm])
@torch.inference_mode()
def test_networks_compute_what_they_did(write: Any, tmp_path: Path, plain_operators: None) -> None:
    torch.manual_seed(0)
    parts = load_components(inspect_model(write(tmp_path) or tmp_path), device=CPU, dtype=torch.float32)
    unet, config = parts.unet, parts.unet.config
    x, t = torch.randn(3, config.in_channels, 8, 8), torch.tensor([1.0, 20.0, 500.0])
    given: dict[str, Any] = {}
    if getattr(config, "cross_attention_dim", None):
        given["encoder_hidden_states"] = torch.randn(3, 32, config.cross_attention_dim)
    if getattr(config, "addition_embed_type", None):
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(3, pooled), "time_ids": torch.full((3, 6), 16.0)}
    compare(unet, lambda network: network(x, t, **given).sample)
    if parts.vae is not None:
        z, picture = torch.randn(2, parts.vae.config.latent_channels, 8, 8), torch.randn(2, 3, 16, 16)
        compare(parts.vae, lambda network: network.decode(z).sample)
        compare(parts.vae, lambda network: network.encode(picture).latent_dist.mean)


def compare(network: Any, call: Any) -> None:
    fused = copy.deepcopy(network)
    assert fuse_norms(fused, CPU) is None
    blocks = [m for m in fused.modules() if type(m).__name__ == "ResnetBlock2D"]
    assert blocks and all("forward" in block.__dict__ for block in blocks), "every block of these is a plain one"
    expected = call(network)
    assert (call(fused) - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


def test_other_blocks_are_left_alone(plain_operators: None) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    for options in (
        {"time_embedding_norm": "scale_shift"}, {"non_linearity": "gelu"}, {"up": True}, {"down": True},
        {"output_scale_factor": 2.0}, {"dropout": 0.1},
    ):  # fmt: skip
        assert not norms._is_plain_block(ResnetBlock2D(in_channels=32, temb_channels=16, **options)), options
    adapted = ResnetBlock2D(in_channels=32, temb_channels=16)
    assert norms._is_plain_block(adapted)
    adapted.conv1 = torch.nn.Sequential(adapted.conv1)  # type: ignore[assignment]  # as an adapter or 8-bit weights wrap it
    assert not norms._is_plain_block(adapted)


def test_where_the_kernels_cannot_run_nothing_changes(tmp_path: Path) -> None:
    unet = load_components(inspect_model(tiny_stable_diffusion(tmp_path)), device=CPU, dtype=torch.float32).unet
    assert fuse_norms(unet, CPU) == "for a GPU"
    assert not any("forward" in module.__dict__ for module in unet.modules())
