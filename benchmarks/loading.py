"""Loading a folder of Stable Diffusion 1.5's size beside diffusers' from_pretrained: seconds and peak memory.

    python benchmarks/loading.py [--device cpu] [--repeat 3]

Makes a folder of random half-precision weights (2.1 GB, removed at the end), then loads it in processes of their own,
in turns; the seconds are those of the call, imports not counted, the memory is the most that the process ever held
(peak RSS) and, on a GPU, the most that torch held there. Medians. The files are in the system's cache, for both alike.
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
WAYS = {"diffusers": "from_pretrained of diffusers", "genkit": "genkit", "low": "genkit, for --memory low"}


def load(way: str, folder: str, device: str, dtype_name: str) -> None:
    """Load once, and print what it took as JSON."""
    import torch

    dtype = getattr(torch, dtype_name)
    if way == "diffusers":
        from diffusers import StableDiffusionPipeline

        began = time.perf_counter()
        parts = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    else:
        import diffusers.models.autoencoders.autoencoder_kl
        import diffusers.models.unets.unet_2d_condition  # noqa: F401
        import transformers.models.clip.modeling_clip  # noqa: F401

        from genkit.components import inspect_model, load_components

        began = time.perf_counter()
        info = inspect_model(folder)
        parts = load_components(info, device=device, dtype=dtype, in_ram=info.parts if way == "low" else ())
    found = {"seconds": time.perf_counter() - began, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device != "cpu":
        torch.cuda.synchronize()
        found = {**found, "seconds": time.perf_counter() - began, "gpu": torch.cuda.max_memory_allocated() / 2**30}
    assert parts is not None
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        load(given.load[0], given.load[1], given.device, given.load[2])
        return
    from tests.tiny import random_sd15

    dtypes = ("float16", "float32") if given.device == "cpu" else ("float16",)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = str(random_sd15(Path(name)))
        for _ in range(given.repeat):
            for dtype in dtypes:
                for way in WAYS if given.device != "cpu" else ("diffusers", "genkit"):
                    words = [sys.executable, __file__, "--device", given.device, "--load", way, folder, dtype]
                    out = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
                    found.setdefault((dtype, way), []).append(json.loads(out.splitlines()[-1]))
    cores = len(os.sched_getaffinity(0))
    where = f"{given.device}, {platform.machine()}, {cores} cores"
    print(f"1,030 million float16 weights; {where}; medians of {given.repeat}")
    print(f"{'':44}  {'seconds':>8}  {'peak RSS GiB':>12}  {'peak GPU GiB':>12}")
    for (dtype, way), runs in found.items():
        seconds, gib, gpu = (statistics.median(r.get(k, 0) for r in runs) for k in ("seconds", "gib", "gpu"))
        print(f"{WAYS[way] + ', to ' + dtype:44}  {seconds:8.2f}  {gib:12.2f}  {gpu:12.2f}")


if __name__ == "__main__":
    main()
