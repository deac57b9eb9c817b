"""One network call alone, for Stable Diffusion 1.5's shape: milliseconds and share of the roof by layout and kernels.

    python benchmarks/network.py [--rows 4 16 32 64] [--sdxl] [--only LINE …] [--kernels]

Lines: "diffusers", the network as it is loaded; "attention", with fused projections and the chosen attention;
"channels_last", those in the other layout; "fused blocks", those with device/norms.py, as genkit draws; "compiled", by
torch.compile (takes a minute, so only if asked for). The VAE's decode likewise. Calls are replayed as CUDA graphs,
medians of 5. --kernels prints which GPU kernels take the time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import shapes
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 32, 64])
    parser.add_argument("--sdxl", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=[n for n in VARIANTS if n != "compiled"])
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="tiny networks; on a CPU, too")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = "sdxl" if given.sdxl else "sd15"
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        write = shapes.write_sdxl if given.sdxl else shapes.write_sd15
        write(Path(folder), device, given.tiny)
        print(f"model written in {time.time() - began:.0f} s", flush=True)
        peak = gpu.products(device) if device == "cuda" else None
        run(Path(folder), name, device, peak, given)


def run(folder: Path, name: str, device: str, peak: float | None, given: Any) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    dtype = torch.float16 if device == "cuda" else torch.float32
    machine = torch.cuda.get_device_name() if peak else "CPU"
    print(f"{machine}, torch {torch.__version__}, {name}; ms a call (share of the roof)")
    for kind, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        flops = gpu.row_operations(name, given.tiny)[kind]
        for title in given.only:
            network = cls.from_pretrained(folder, subfolder=kind, torch_dtype=dtype).to(device)
            network.eval().requires_grad_(False)
            began = time.time()
            with torch.inference_mode():
                call = VARIANTS[title](network, kind)
                for rows in given.rows if kind == "unet" else [r for r in given.rows if r <= 16]:
                    inputs = example(name, kind, rows, device, dtype, given.tiny)
                    call(*inputs)
                    first = time.time() - began
                    ms = timed(call, inputs)
                    roof = "" if peak is None else f"({100 * rows * flops / ms * 1000 / 1e12 / peak:.0f} %)"
                    line = f"  {kind:5}{title:16}{rows:4} rows {ms:9.2f} ms {ms / rows:8.3f} a row {roof}"
                    print(f"{line}  first call after {first:.1f} s", flush=True)
                    began = time.time()
                if given.kernels and device == "cuda":
                    kernels(call, inputs, title)


def plain(network: Any, kind: str) -> Callable[..., Any]:
    return network.decode if kind == "vae" else network


def as_loaded(network: Any, kind: str) -> Callable[..., Any]:
    call = plain(network, kind)
    return lambda *given: call(*given, return_dict=False)[0]


def attended(network: Any, kind: str) -> Callable[..., Any]:
    from genkit.device.processor import AttentionChoice, fuse_projections

    fuse_projections(network)
    choice = AttentionChoice()
    choice.apply(network)
    print(f"  {choice.text}", flush=True)
    return as_loaded(network, kind)


def channels_last(network: Any, kind: str) -> Callable[..., Any]:
    network.to(memory_format=torch.channels_last)
    return attended(network, kind)


def fused(network: Any, kind: str) -> Callable[..., Any]:
    from genkit.device.norms import fuse_norms

    call = attended(network, kind)
    reason = fuse_norms(network, network.device)
    if reason:
        print(f"  fuse_norms: {reason}")
    return call


def compiled(network: Any, kind: str) -> Callable[..., Any]:
    return torch.compile(channels_last(network, kind), dynamic=False)


VARIANTS = {
    "diffusers": as_loaded,
    "attention": attended,
    "channels_last": channels_last,
    "fused blocks": fused,
    "compiled": compiled,
}


def example(name: str, kind: str, rows: int, device: str, dtype: torch.dtype, tiny: bool) -> list[Any]:
    config = {("sd15", False): shapes.SD15, ("sd15", True): shapes.TINY_SD15,
              ("sdxl", False): shapes.SDXL, ("sdxl", True): shapes.TINY_SDXL}[name, tiny]  # fmt: skip
    x = torch.randn(rows, 4, config["sample_size"], config["sample_size"], device=device, dtype=dtype)
    if kind == "vae":
        return [x]
    given: list[Any] = [x, torch.full((rows,), 500.0, device=device),
                        torch.randn(rows, 77, config["cross_attention_dim"], device=device, dtype=dtype)]  # fmt: skip
    if "addition_embed_type" in config:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        given += [None, None, None, None, {
            "text_embeds": torch.randn(rows, pooled, device=device, dtype=dtype),
            "time_ids": torch.full((rows, 6), 512.0, device=device, dtype=dtype),
        }]  # fmt: skip
    return given


def timed(call: Callable[..., Any], inputs: list[Any]) -> float:
    """Return the median milliseconds of a call; on a GPU of the call captured in a CUDA graph."""
    if not inputs[0].is_cuda:
        began = time.time()
        call(*inputs)
        return 1000 * (time.time() - began)
    call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*inputs)
    graph.replay()
    found = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    del out
    return statistics.median(found)


def kernels(call: Callable[..., Any], inputs: list[Any], title: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call(*inputs)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    whole = sum(e.self_device_time_total for e in events)
    for event in events[:16]:
        ms, share = event.self_device_time_total / 1000, 100 * event.self_device_time_total / whole
        print(f"      {ms:8.2f} ms {share:5.1f} % {event.count:5}  {event.key[:110]}")
    print(f"      {whole / 1000:8.2f} ms in all of {title}", flush=True)


if __name__ == "__main__":
    main()
