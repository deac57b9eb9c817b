"""genkit beside diffusers on one GPU: pictures a second, first picture, peak memory. Random weights, no download.

    python benchmarks/gpu.py [--only sd15 one interval mixed low sdxl] [--lines N] [--minutes 8] [--profile]
                             [--json FILE]
    python benchmarks/gpu.py --tiny          # the same code on a CPU, with tiny networks: does it run?

Every line is a process of its own, started from scratch, in the order of the table; what would begin after the minutes
are over is left out, and said. `images/s` counts from the first network call to the last picture, `late` only the last
third or so of them (by then everything is loaded), `10 s` the pictures that were there ten seconds after the first
network call, `first` the seconds from process start to the first picture. `roof` is what `late` is of what the GPU
could do if the matrix products of UNet and VAE, at the speed of its best one, were all there is to do.

sd15: Stable Diffusion 1.5's shape, 512x512, 20 steps, guidance 7.5, float16; saved as PNG and scored with CLIP L/14.
one: a picture at a time, neither saved nor scored. interval: guidance on the first half of the steps. mixed: 200
requests of 10 to 50 steps, half of them guided, two sizes; not saved. low: one picture with --memory low.
sdxl: SDXL's shape, 1024x1024.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contestants as c


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the table. count, batch: on a GPU; a tiny run draws a few. base: the line that it is compared with."""

    group: str
    title: str
    run: Callable[[c.Setup, float], c.Outcome]
    count: int
    batch: int = 16


ENTRIES = (
    Entry("sd15", "genkit", c.genkit_job, 256),
    Entry("sd15", "diffusers, compiled, channels_last, batch 16", functools.partial(c.diffusers_job, tune=True), 128),
    Entry("sd15", "diffusers, prompt by prompt", c.diffusers_job, 12, 1),
    Entry("sd15", "diffusers, batch 16", c.diffusers_job, 64),
    Entry("sd15", "genkit, no CUDA graphs", functools.partial(c.genkit_job, graphs=False), 128),
    Entry("sd15", "genkit, neither files nor scores", c.genkit_pictures, 128),
    Entry("one", "diffusers", c.diffusers_one, 5),
    Entry("one", "genkit", c.genkit_one, 5),
    Entry("interval", "genkit, all steps guided", c.genkit_pictures, 64),
    Entry("interval", "genkit, half of the steps guided", functools.partial(c.genkit_pictures, interval=[0, 0.5]), 64),
    Entry("mixed", "diffusers, static batches", c.diffusers_mixed, 200),
    Entry("mixed", "genkit, static batches", functools.partial(c.genkit_mixed, static=True), 200),
    Entry("mixed", "genkit", c.genkit_mixed, 200),
    Entry("low", "genkit --memory low", c.genkit_low, 1),
    Entry("sdxl", "diffusers, batch 8", c.diffusers_job, 16, 8),
    Entry("sdxl", "genkit", c.genkit_job, 32, 8),
    Entry("sdxl", "diffusers, compiled, channels_last, batch 8", functools.partial(c.diffusers_job, tune=True), 24, 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(dict.fromkeys(e.group for e in ENTRIES)))
    parser.add_argument("--lines", type=int, help="only so many lines of each group")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="tiny networks, on a CPU unless there is a GPU")
    parser.add_argument("--profile", action="store_true", help="print where genkit's time goes")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        run_entry(ENTRIES[given.run], given.folder, given.tiny, given.started, given.profile)
        return
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="genkit-benchmark-") as folder:
        machine = prepare(Path(folder), given.only or [e.group for e in ENTRIES], given.tiny)
        print(f"{machine['device']}, {machine['versions']}")
        if machine["peak"]:
            print(f"{machine['peak']:.0f} TFLOP/s in products of 8192x8192")
        print(", ".join(f"{tera:.3f} TFLOP a picture of {name}" for name, tera in machine["work"].items()))
        found, left = [], []
        for number, entry in enumerate(ENTRIES):
            if given.only and entry.group not in given.only:
                continue
            if given.lines is not None and sum(line["group"] == entry.group for line in found) >= given.lines:
                continue
            if time.time() - began > 60 * given.minutes:
                left.append(f"{entry.group}: {entry.title}")
                continue
            found.append(
                {
                    "group": entry.group,
                    "title": entry.title,
                    **measured(number, Path(folder), given.tiny, given.profile),
                }
            )
            print_line(found, machine)
        if left:
            print(f"left out after {given.minutes:g} minutes: {'; '.join(left)}")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "results": found}, indent=1) + "\n")


def prepare(folder: Path, groups: list[str], tiny: bool) -> dict[str, Any]:
    """Write the models, in a process of its own, and return what machine this is and how fast it multiplies."""
    script = f"import gpu; gpu.write_models({str(folder)!r}, {groups!r}, {tiny!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write_models(folder: str, groups: list[str], tiny: bool) -> None:
    import diffusers
    import shapes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        raise SystemExit("no CUDA device here; --tiny tries the benchmark out on a CPU")
    writers = {"sd15": shapes.write_sd15, "sdxl": shapes.write_sdxl}
    needed = {"sdxl" if group == "sdxl" else "sd15" for group in groups}
    work = {}
    for name in sorted(needed):
        writers[name](Path(folder, name), device, tiny)
        work[name] = teraflop(name, tiny)
    shapes.write_clip(Path(folder, "clip"), device, tiny)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    print(json.dumps({
        "device": name, "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        "peak": products(device) if device == "cuda" else None, "work": work,
    }))  # fmt: skip


def teraflop(name: str, tiny: bool) -> float:
    """Return the floating-point operations of one picture: 20 guided steps and a decode."""
    once = row_operations(name, tiny)
    return (2 * c.STEPS * once["unet"] + once["vae"]) / 1e12


def row_operations(name: str, tiny: bool) -> dict[str, float]:
    """Return the floating-point operations of a row of UNet and VAE decoder, in convolutions and products."""
    import shapes
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    config = {("sd15", False): shapes.SD15, ("sd15", True): shapes.TINY_SD15,
              ("sdxl", False): shapes.SDXL, ("sdxl", True): shapes.TINY_SDXL}[name, tiny]  # fmt: skip
    vae = shapes.TINY_VAE if tiny else shapes.VAE
    side, width = config["sample_size"], config["cross_attention_dim"]
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(**config)
        blocks = len(vae["block_out_channels"])
        decoder = AutoencoderKL(**vae, down_block_types=("DownEncoderBlock2D",) * blocks,
                                up_block_types=("UpDecoderBlock2D",) * blocks)  # fmt: skip
        added = None
        if "addition_embed_type" in config:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        with FlopCounterMode(display=False) as once:
            unet(torch.empty(1, 4, side, side), torch.ones(1), torch.empty(1, 77, width), added_cond_kwargs=added)
        with FlopCounterMode(display=False) as decode:
            decoder.decode(torch.empty(1, 4, side, side))
    return {"unet": once.get_total_flops(), "vae": decode.get_total_flops()}


def products(device: str) -> float:
    """Return the TFLOP/s of half-precision matrix products, the best of some."""
    import torch

    a = torch.randn(8192, 8192, device=device, dtype=torch.float16)
    best = 0.0
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            a @ a
        end.record()
        torch.cuda.synchronize()
        best = max(best, 5 * 2 * 8192**3 / start.elapsed_time(end) / 1e9)
    return best


def measured(number: int, folder: Path, tiny: bool, profile: bool) -> dict[str, Any]:
    words = [sys.executable, __file__, "--run", str(number), "--folder", str(folder), "--started", str(time.time())]
    words += ["--tiny"] if tiny else []
    words += ["--profile"] if profile and ENTRIES[number].title.startswith("genkit") else []
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def run_entry(entry: Entry, folder: Path, tiny: bool, started: float, profile: bool) -> None:
    """Run one contestant in this process and print what came of it as JSON."""
    import torch

    from genkit import phases

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = folder / ("sdxl" if entry.group == "sdxl" else "sd15")
    count, batch = (min(entry.count, 6), min(entry.batch, 4)) if tiny else (entry.count, entry.batch)
    if profile:
        phases.record()
    with tempfile.TemporaryDirectory() as out:
        setup = c.Setup(model, folder / "clip", Path(out), device, tiny, count, batch)
        found = entry.run(setup, started)
    times = sorted(found.times)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_reserved() if device == "cuda" else resident
    print(json.dumps({
        "images": len(times), "per_second": len(times) / times[-1], "late_per_second": c.late_rate(times),
        "in_10_s": sum(t <= 10 for t in times), "first_s": found.first, "peak_gib": peak / 2**30, "note": found.note,
        "phases": phases.report(),
    }))  # fmt: skip


def print_line(found: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Print the last line of the table, its head and its group's name before it where they are new."""
    line = found[-1]
    if len(found) == 1:
        print(f"\n{'':46}{'images/s':>9}{'late':>7}{'roof':>6}{'10 s':>6}{'first s':>9}{'peak GiB':>9}")
    if len(found) == 1 or found[-2]["group"] != line["group"]:
        print(line["group"])
    if "failed" in line:
        print(f"  {line['title']:44}  failed: {line['failed']}", flush=True)
        return
    roof = ""
    if machine["peak"] and line["group"] in machine["work"]:
        roof = f"{100 * line['late_per_second'] * machine['work'][line['group']] / machine['peak']:.0f} %"
    print(f"  {line['title']:44}{line['per_second']:>9.2f}{line['late_per_second']:>7.2f}{roof:>6}{line['in_10_s']:>6}"
          f"{line['first_s']:>9.1f}{line['peak_gib']:>9.2f}  {line['note']}", flush=True)  # fmt: skip
    for text in line["phases"]:
        print(f"      {text}")


if __name__ == "__main__":
    main()
