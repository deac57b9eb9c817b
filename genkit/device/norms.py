"""Blocks of a network on a GPU in channels-last layout, with norms, activations and sums fused by Triton kernels.

Convolutions in half precision are fastest on channels-last data; torch's group norm is slow on it, and loses more than
they gain. Here one pass sums the channels and a second one normalises and activates: two reads and a write of a norm's
input, where torch's operators take three and two. Biases are added to what these passes read anyway.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

import torch
from torch.nn.functional import conv2d, gelu, group_norm, layer_norm, linear, silu

from genkit.errors import reason

try:
    import triton

    from genkit.device import kernels
except ImportError:  # no wheel for this system: networks stay as they are
    triton = None

ROWS, COLS = 64, 64  # positions and channels of a tile
CHUNK = 512  # positions summed by one program
TILE = 2048  # values of a program that computes each position alone
WIDTH = 128  # channels of a group up to which one compiled kernel does for all


def fuse_norms(network: Any, device: torch.device) -> str | None:
    """Lay a network out channels-last, and let its residual blocks use the kernels; return None, or why not.

    For inference on a GPU only; its weights may still be in RAM, where pinned ones stay pinned. Other modules compute
    as before, on tensors in the other layout.
    """
    found = unusable(device, network.dtype)
    if found is not None:
        return found
    for weight in network.parameters():
        if weight.ndim == 4:
            moved = weight.data.contiguous(memory_format=torch.channels_last)
            weight.data = moved.pin_memory() if weight.is_pinned() and not moved.is_pinned() else moved
    for module in network.modules():
        if _is_plain_block(module):
            vars(module)["forward"] = types.MethodType(_block, module)
        elif type(module) is torch.nn.Conv2d and module.kernel_size == (1, 1) and module.stride == (1, 1):
            vars(module)["forward"] = types.MethodType(_pointwise, module)
        elif type(module).__name__ == "Transformer2DModel" and module.is_input_continuous:
            module.norm.forward = types.MethodType(_norm, module.norm)
            module._get_output_for_continuous_inputs = types.MethodType(_as_picture, module)
        elif type(module).__name__ == "GEGLU":
            module.forward = types.MethodType(_geglu, module)
        elif _is_plain_transformer(module):
            module.forward = types.MethodType(_transformer, module)
    last = getattr(network, "decoder", network)  # a VAE's decoder, or a UNet
    if type(getattr(last, "conv_norm_out", None)) is torch.nn.GroupNorm and type(last.conv_act) is torch.nn.SiLU:
        last.conv_norm_out.forward = types.MethodType(_norm_silu, last.conv_norm_out)
        last.conv_act = torch.nn.Identity()
    return None


@functools.cache
def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot be used on this device, or None; they are compiled and compared with torch."""
    if device.type != "cuda":
        return "for a GPU"
    if triton is None:
        return "Triton is not installed"
    try:
        for channels, groups in ((96, 32), (128, 32)):
            x = torch.randn(2, channels, 24, 24, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            weight, bias = torch.randn(2, channels, device=device, dtype=dtype)
            added = torch.randn(2, channels, device=device, dtype=dtype)
            with torch.inference_mode():
                found = norm(x, groups, weight, bias, 1e-5, True, added)
                wide = x.double() + added.double()[:, :, None, None]
                expected = silu(group_norm(wide, groups, weight.double(), bias.double(), 1e-5))
            if _differ(found, expected, dtype):
                return "wrong numbers"
        for channels in (320, 640, 1280):  # of Stable Diffusion: compiled now, while weights are read
            x, other = torch.randn(2, 2, 24, channels, device=device, dtype=dtype)
            weight, bias = torch.randn(2, channels, device=device, dtype=dtype)
            with torch.inference_mode():
                total, found = add_norm(x, other, weight, bias, 1e-5)
                expected = layer_norm(total.double(), (channels,), weight.double(), bias.double(), 1e-5)
                a, b = x.double().chunk(2, dim=-1)
                wrong = _differ(found, expected, dtype) or _differ(gated(x), a * gelu(b), dtype)
            if wrong or _differ(total, x.double() + other.double(), dtype):
                return "wrong numbers"
    except Exception as error:  # no compiler on this machine, a driver that Triton does not know, …
        return f"{type(error).__name__}: {reason(error)}"
    return None


def _differ(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    return not (found.double() - expected).abs().max() < max(1e-4, 32 * torch.finfo(dtype).eps)


def norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activate: bool,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return group_norm(x + added), through SiLU if `activate`; x: (B, C, H, W), added: (B, C) or (C,)."""
    if torch.compiler.is_compiling():  # which fuses it in its own way
        if added is not None:
            x = x + added.view(-1, x.shape[1], 1, 1)
        x = group_norm(x, groups, weight, bias, eps)
        return silu(x) if activate else x
    x = x.contiguous(memory_format=torch.channels_last)
    rows, channels, positions = len(x), x.shape[1], x.shape[2] * x.shape[3]
    chunks, columns = triton.cdiv(positions, CHUNK), triton.cdiv(channels, COLS)
    sums = torch.empty(rows, chunks, 2, channels, device=x.device, dtype=torch.float32)
    scale = torch.empty(rows, 2, channels, device=x.device, dtype=torch.float32)
    out = torch.empty_like(x)
    step = 0 if added is None or added.ndim == 1 else channels  # from one row of `added` to the next
    width = channels // groups
    with torch.cuda.device(x.device) if x.is_cuda else _nothing:
        kernels.sum_up[rows, chunks, columns](x, sums, positions, channels, chunks, CHUNK, ROWS, COLS)
        kernels.to_scale[rows, groups](
            sums, weight, bias, x if added is None else added, scale, positions, channels, chunks, eps, width, step,
            added is not None, max(WIDTH, triton.next_power_of_2(width)),
        )  # fmt: skip
        kernels.apply[rows, triton.cdiv(positions, ROWS), columns](
            x, scale, out, positions, channels, activate, ROWS, COLS
        )
    return out


def add(x: torch.Tensor, other: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x + other + bias; x and other (B, C, H, W), bias (C,)."""
    if bias is None:
        return x + other
    if torch.compiler.is_compiling():
        return x + other + bias.view(-1, 1, 1)
    x, other = (t.contiguous(memory_format=torch.channels_last) for t in (x, other))
    out = torch.empty_like(x)
    with torch.cuda.device(x.device) if x.is_cuda else _nothing:
        kernels.add[(triton.cdiv(x.numel(), 4096),)](x, other, bias, out, x.numel(), x.shape[1], 4096)
    return out


def _block(self: Any, input_tensor: torch.Tensor, temb: torch.Tensor | None = None, *_: Any, **__: Any) -> torch.Tensor:
    """diffusers' ResnetBlock2D.forward."""
    x = norm(input_tensor, self.norm1.num_groups, self.norm1.weight, self.norm1.bias, self.norm1.eps, True)
    x = conv2d(x, self.conv1.weight, None, self.conv1.stride, self.conv1.padding)
    added = self.conv1.bias
    if self.time_emb_proj is not None:
        added = self.time_emb_proj(temb if self.skip_time_act or temb is None else silu(temb)) + added
    x = norm(x, self.norm2.num_groups, self.norm2.weight, self.norm2.bias, self.norm2.eps, True, added)
    x = conv2d(x, self.conv2.weight, None, self.conv2.stride, self.conv2.padding)
    if self.conv_shortcut is not None:
        input_tensor = self.conv_shortcut(input_tensor)
    return add(x, input_tensor, self.conv2.bias)


def _pointwise(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A 1 x 1 convolution as a linear layer, which adds its bias on the way."""
    return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def _as_picture(
    self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, batch_size: int, height: int, width: int,
    inner_dim: int,
) -> torch.Tensor:  # fmt: skip
    """Transformer2DModel's output, without the copy to the other layout."""
    if self.use_linear_projection:
        hidden_states = self.proj_out(hidden_states)
    x = hidden_states.view(batch_size, height, width, -1).permute(0, 3, 1, 2)
    return (x if self.use_linear_projection else self.proj_out(x)) + residual


def _geglu(self: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return gated(self.proj(hidden_states))


def gated(x: torch.Tensor) -> torch.Tensor:
    """Return a * gelu(b) of x (..., 2 * width), which holds a and b side by side."""
    width = x.shape[-1] // 2
    if torch.compiler.is_compiling():
        a, b = x.chunk(2, dim=-1)
        return a * gelu(b)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], width)
    count = out.numel() // width
    columns = 256 if width % 256 == 0 else 64  # a number that divides the width leaves no lane idle
    rows = TILE // columns
    with torch.cuda.device(x.device) if x.is_cuda else _nothing:
        kernels.gate[(triton.cdiv(count, rows), triton.cdiv(width, columns))](x, out, count, width, rows, columns)
    return out


def add_norm(
    x: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + other, or x where there is no other, and its layer norm; all (..., C)."""
    if torch.compiler.is_compiling():
        x = x if other is None else x + other
        return x, layer_norm(x, weight.shape, weight, bias, eps)
    x = x.contiguous()
    other = None if other is None else other.contiguous()
    out, total = torch.empty_like(x), x if other is None else torch.empty_like(x)
    channels = x.shape[-1]
    count, columns = x.numel() // channels, triton.next_power_of_2(channels)
    rows = max(1, 2 * TILE // columns)
    with torch.cuda.device(x.device) if x.is_cuda else _nothing:
        kernels.add_norm[(triton.cdiv(count, rows),)](
            x, x if other is None else other, weight, bias, total, out, count, channels, eps, int(other is not None),
            rows, columns,
        )  # fmt: skip
    return total, out


def _transformer(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """diffusers' BasicTransformerBlock.forward, each sum computed with the norm that follows it."""
    x, normed = _sum_and_norm(hidden_states, None, self.norm1)
    attended = encoder_hidden_states if self.only_cross_attention else None
    more = self.attn1(normed, encoder_hidden_states=attended, attention_mask=attention_mask)
    if self.attn2 is not None:
        x, normed = _sum_and_norm(x, more, self.norm2)
        more = self.attn2(normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    x, normed = _sum_and_norm(x, more, self.norm3)
    return self.ff(normed) + x


def _sum_and_norm(x: torch.Tensor, other: torch.Tensor | None, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return add_norm(x, other, norm.weight, norm.bias, norm.eps)


def _is_plain_transformer(module: Any) -> bool:
    """Whether a module is a BasicTransformerBlock that `_transformer` computes."""
    if type(module).__name__ != "BasicTransformerBlock" or module.norm_type != "layer_norm":
        return False
    norms = [module.norm1, module.norm3, *([] if module.attn2 is None else [module.norm2])]
    return (
        module.pos_embed is None
        and not hasattr(module, "fuser")
        and module._chunk_size is None
        and all(type(n) is torch.nn.LayerNorm and n.weight is not None and n.bias is not None for n in norms)
    )


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return norm(x, self.num_groups, self.weight, self.bias, self.eps, False)


def _norm_silu(self: Any, x: torch.Tensor) -> torch.Tensor:
    return norm(x, self.num_groups, self.weight, self.bias, self.eps, True)


def _is_plain_block(module: Any) -> bool:
    """Whether a module is a ResnetBlock2D that `_block` computes."""
    if type(module).__name__ != "ResnetBlock2D":
        return False
    convolutions = (module.conv1, module.conv2)
    return (
        (module.time_embedding_norm == "default" or module.time_emb_proj is None)
        and type(module.nonlinearity) is torch.nn.SiLU
        and module.upsample is None
        and module.downsample is None
        and module.output_scale_factor == 1
        and module.dropout.p == 0
        and all(type(c) is torch.nn.Conv2d and c.bias is not None for c in convolutions)
        and all(type(n) is torch.nn.GroupNorm and n.affine for n in (module.norm1, module.norm2))
    )


_nothing = contextlib.nullcontext()
