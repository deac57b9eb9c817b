"""Loading a folder or a single file of Stable Diffusion 1.5's size beside diffusers: seconds and peak memory.

    python benchmarks/loading.py [--device cpu] [--repeat 3]

Makes a folder of random half-precision weights, and the same as one file in the original layout (2.1 GB each, removed
at the end), then loads them in processes of their own, in turns. The seconds are those of the call, and of a file also
of the first call of the UNet, on one row of a 64x64 picture; imports are not counted. The memory is the most that the
process ever held (peak RSS) and, on a GPU, the most that torch held there. Medians. The files are in the system's
cache, for both alike; diffusers takes the configs of the single file from the folder, as there is no network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
WAYS = {
    "diffusers": "from_pretrained of diffusers", "genkit": "genkit", "low": "genkit, for --memory low",
    "diffusers file": "from_single_file, first call", "genkit file": "genkit, single file, first call",
}  # fmt: skip
FILE = "model.safetensors"


def load(way: str, folder: str, device: str, dtype_name: str) -> None:
    """Load once, and print what it took as JSON."""
    import torch

    dtype = getattr(torch, dtype_name)
    file = str(Path(folder, FILE))
    if way.startswith("diffusers"):
        from diffusers import StableDiffusionPipeline

        began = time.perf_counter()
        if way == "diffusers":
            parts = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
        else:
            parts = StableDiffusionPipeline.from_single_file(
                file, config=folder, torch_dtype=dtype, local_files_only=True, safety_checker=None
            ).to(device)
    else:
        import diffusers.models.autoencoders.autoencoder_kl
        import diffusers.models.unets.unet_2d_condition  # noqa: F401
        import transformers.models.clip.modeling_clip  # noqa: F401

        from genkit.components import inspect_model, load_components

        began = time.perf_counter()
        info = inspect_model(file if way == "genkit file" else folder)
        parts = load_components(info, device=device, dtype=dtype, in_ram=info.parts if way == "low" else ())
    if way.endswith("file"):
        with torch.inference_mode():
            x, text = (
                torch.zeros(1, 4, 8, 8, device=device, dtype=dtype),
                torch.zeros(1, 77, 768, device=device, dtype=dtype),
            )
            parts.unet(x, torch.tensor(500.0, device=device), text)
    found = {"seconds": time.perf_counter() - began, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device != "cpu":
        torch.cuda.synchronize()
        found = {**found, "seconds": time.perf_counter() - began, "gpu": torch.cuda.max_memory_allocated() / 2**30}
    assert parts is not None
    print(json.dumps(found))


def make(folder: Path) -> None:
    """Write the folder, and in it the single file."""
    from genkit.components import inspect_model
    from genkit.components.convert import convert
    from tests.tiny import random_sd15

    convert(inspect_model(random_sd15(folder, clip=True)), folder / FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        load(given.load[0], given.load[1], given.device, given.load[2])
        return
    if given.make:
        make(Path(given.make))
        return
    dtypes = ("float16", "float32") if given.device == "cpu" else ("float16",)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = name  # made by another process: the peak memory of this one would count as its children's
        subprocess.run([sys.executable, __file__, "--make", folder], stdout=subprocess.DEVNULL, check=True)
        for _ in range(given.repeat):
            for dtype in dtypes:
                for way in (way for way in WAYS if way != "low" or given.device != "cpu"):
                    words = [sys.executable, __file__, "--device", given.device, "--load", way, folder, dtype]
                    out = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
                    found.setdefault((dtype, way), []).append(json.loads(out.splitlines()[-1]))
    cores = len(os.sched_getaffinity(0))
    where = f"{given.device}, {platform.machine()}, {cores} cores"
    print(f"1,066 million float16 weights; {where}; medians of {given.repeat}")
    print(f"{'':44}  {'seconds':>8}  {'peak RSS GiB':>12}  {'peak GPU GiB':>12}")
    for (dtype, way), runs in found.items():
        seconds, gib, gpu = (statistics.median(r.get(k, 0) for r in runs) for k in ("seconds", "gib", "gpu"))
        print(f"{WAYS[way] + ', to ' + dtype:44}  {seconds:8.2f}  {gib:12.2f}  {gpu:12.2f}")


if __name__ == "__main__":
    main()
