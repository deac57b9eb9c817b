"""Where the time of a network call goes: the embedded model's UNet by kind of operation, genkit beside diffusers.

    python benchmarks/profile_network.py [--rows 16] [--threads 1] [--calls 5]

Milliseconds a call of an operation's own time (torch.profiler), of the networks that `genkit generate` and diffusers'
pipeline run on this device: on a CPU in float32, on a GPU in float16 and device time.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MODEL = Path(__file__).parent.parent / "genkit" / "components" / "embedded" / "emoji"
# Kind of work -> how the names of its operations begin; the rest is "other".
KINDS = {
    "convolutions": ("aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::_conv", "aten::thnn_conv"),
    "linear layers": ("aten::addmm", "aten::mm", "aten::linear", "mkldnn::_linear", "aten::mkldnn_linear"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::exp", "aten::_scaled_dot", "aten::_flash",
                  "aten::_efficient", "aten::_cudnn_attention", "genkit::"),
    "norms": ("aten::native_group_norm", "aten::native_layer_norm", "aten::_fused_rms"),
    "activations": ("aten::silu", "aten::gelu", "aten::sigmoid"),
    "copies, layout": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::upsample"),
    "adding, scaling": ("aten::add", "aten::mul", "aten::div", "aten::sub"),
}  # fmt: skip


@torch.inference_mode()
def measured(network: Any, inputs: tuple[torch.Tensor, ...], calls: int) -> dict[str, float]:
    """Return milliseconds a call for each kind of work."""
    network(*inputs)
    cuda = inputs[0].is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        for _ in range(calls):
            network(*inputs)
        if cuda:
            torch.cuda.synchronize()
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in found.key_averages():
        kind = next((k for k, starts in KINDS.items() if event.key.startswith(starts)), "other")
        spent[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / calls
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=5)
    given = parser.parse_args()
    from diffusers import UNet2DConditionModel

    from genkit import TextToImage

    torch.set_num_threads(given.threads)
    gen = TextToImage.from_pretrained("emoji")
    device, dtype = gen.device, gen.unet.dtype
    peer = UNet2DConditionModel.from_pretrained(MODEL / "unet", torch_dtype=dtype).to(device).eval()
    assert gen.text is not None
    x = torch.randn(given.rows, 8, 16, 16, device=device, dtype=dtype)
    t = torch.full((given.rows,), 500.0, device=device)
    cond = torch.stack(gen.text(["a red fox"]) * given.rows).to(device, dtype)
    found = {
        "diffusers": measured(peer, (x, t, cond), given.calls),
        "genkit": measured(gen.unet, (x, t, cond), given.calls),
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {given.threads} threads"
    print(f"{given.rows} rows, {str(dtype).removeprefix('torch.')}, {name}, torch {torch.__version__}\n")
    print("| ms a call | diffusers | genkit |\n|---|---|---|")
    for kind in [*KINDS, "other"]:
        print(f"| {kind} | {found['diffusers'][kind]:.1f} | {found['genkit'][kind]:.1f} |")
    print(f"| all | {sum(found['diffusers'].values()):.1f} | {sum(found['genkit'].values()):.1f} |")


if __name__ == "__main__":
    main()
