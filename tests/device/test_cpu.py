"""The CPU's faster paths compute what the plain ones compute, and notice when they no longer apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import linear

from genkit.device import cpu
from genkit.device.cpu import pack_linears, suit_cpu
from genkit.device.processor import AttentionChoice

EMOJI = Path(__file__).parents[2] / "genkit" / "components" / "embedded" / "emoji"


@pytest.fixture
def unet() -> Any:
    return (
        UNet2DConditionModel.from_pretrained(EMOJI, subfolder="unet", dtype=torch.float32).eval().requires_grad_(False)
    )


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 8, 16, 16), torch.linspace(20, 900, rows), torch.randn(rows, 32, 256)


def test_a_suited_network_computes_the_same(unet: Any) -> None:
    x, t, text = inputs(4)
    with torch.inference_mode():
        expected = unet(x, t, text).sample
        choice = AttentionChoice()
        choice.apply(unet)
        suit_cpu(unet)
        found = unet(x, t, text).sample
    assert set(choice.chosen.values()) == {"sliced"}
    assert 0 < (found - expected).abs().max() < 1e-4, "to rounding, and by another path"


def test_rows_that_differ_in_the_prompt_only_share_the_first_attention(unet: Any) -> None:
    x, t, text = inputs(4)
    x[2:], t[2:] = x[:2], t[:2]
    AttentionChoice().apply(unet)
    (first,) = [m for m in unet.modules() if getattr(getattr(m, "processor", None), "share", False)]
    rows: list[int] = []
    first.to_q.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    with torch.inference_mode():
        shared = unet(x, t, text).sample
        first.processor.share = False
        apart = unet(x, t, text).sample
    assert rows == [2, 4]
    assert (shared - apart).abs().max() < 1e-5 and (shared[:2] - shared[2:]).abs().max() > 1e-3


def test_packed_layers_follow_their_weights() -> None:
    torch.manual_seed(2)
    layer = torch.nn.Linear(96, 128)
    plain = torch.nn.Linear(4, 4)
    assert pack_linears(torch.nn.ModuleList([layer, plain])) == 1, "a small layer is left alone"
    x = torch.randn(3, 5, 96)

    def check() -> None:
        with torch.inference_mode():
            assert (layer(x) - linear(x, layer.weight, layer.bias)).abs().max() < 1e-4

    check()
    with torch.no_grad():
        layer.weight.mul_(2)  # as merging a LoRA does
    check()
    layer.weight = torch.nn.Parameter(torch.randn(128, 96))
    check()
    layer(x).sum().backward()
    assert layer.weight.grad is not None, "training goes through the plain layer"
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_weights_of_a_large_network_are_not_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
    monkeypatch.setattr(cpu, "MOST_PACKED", 3 * 64 * 64 * 4 - 1)
    assert pack_linears(network) == 0
    monkeypatch.setattr(cpu, "MOST_PACKED", 3 * 64 * 64 * 4)
    assert pack_linears(network) == 3
