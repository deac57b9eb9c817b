"""`genkit generate` beside a plain loop over diffusers' StableDiffusionPipeline: wall time, first picture, peak memory.

    python benchmarks/main_job.py [--images 48] [--steps 20] [--repeat 3] [--control]

Every figure is of a whole process, imports and loading included, started from scratch: the command draws, scores, saves
and writes its gallery; the loop draws in batches of 1 or 8, saves PNGs and scores them with the same CLIP model after.
"first" is when the first picture is on the disk. The runs take turns, so that a machine that slows down slows
all alike; medians are printed. --control: every picture follows one of its own by a ControlNet for the embedded UNet,
which is new and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "genkit" / "components" / "embedded"


def prompts(count: int) -> list[str]:
    lines = (ROOT / "prompts" / "demo.txt").read_text().splitlines()
    found = [line for line in lines if line.strip() and not line.startswith("#")]
    return [found[i % len(found)] for i in range(count)]


def control(folder: Path, images: int) -> Path:
    """Write a ControlNet for the embedded model into a folder, and a picture for each image; return the network's."""
    import numpy as np
    from diffusers import ControlNetModel, UNet2DConditionModel
    from PIL import Image

    unet = UNet2DConditionModel.from_pretrained(MODELS / "emoji" / "unet")
    ControlNetModel.from_unet(unet).save_pretrained(folder / "net")
    for i in range(images):
        pixels = np.random.default_rng(i).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")
    return folder / "net"


def plain_loop(out: Path, texts: list[str], steps: int, batch: int, pictures: Path | None) -> None:
    """What a user writes: the pipeline in a loop, PNGs saved, then CLIP over the saved files."""
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
    from PIL import Image
    from transformers import AutoProcessor, CLIPModel

    if pictures is None:
        pipe = StableDiffusionPipeline.from_pretrained(MODELS / "emoji", torch_dtype=torch.float32)
    else:
        net = ControlNetModel.from_pretrained(pictures / "net")
        pipe = StableDiffusionControlNetPipeline.from_pretrained(
            MODELS / "emoji", controlnet=net, torch_dtype=torch.float32
        )
    pipe.set_progress_bar_config(disable=True)
    for i in range(0, len(texts), batch):
        part = texts[i : i + batch]
        generators = [torch.Generator("cpu").manual_seed(i + k) for k in range(len(part))]
        steered = {}
        if pictures is not None:
            steered = {"image": [Image.open(pictures / f"{i + k:06d}.png") for k in range(len(part))]}
        images = pipe(part, num_inference_steps=steps, guidance_scale=5.0, generator=generators, **steered).images
        for k, image in enumerate(images):
            image.save(out / f"{i + k:06d}.png")
    model = CLIPModel.from_pretrained(MODELS / "emoji-clip", torch_dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(MODELS / "emoji-clip")
    with torch.no_grad():
        for i in range(0, len(texts), 8):
            part = [Image.open(out / f"{k:06d}.png") for k in range(i, min(i + 8, len(texts)))]
            inputs = processor(text=texts[i : i + 8], images=part, padding=True, return_tensors="pt")
            found = model(**inputs)
            (found.image_embeds * found.text_embeds).sum(dim=1).tolist()


def command(way: str, out: Path, images: int, steps: int, pictures: Path | None) -> list[str]:
    if way == "genkit":
        rows: list[dict[str, str]] = [{"prompt": text} for text in prompts(images)]
        if pictures is not None:
            rows = [{**row, "control_image": str(pictures / f"{i:06d}.png")} for i, row in enumerate(rows)]
        file = out / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        steered = [] if pictures is None else ["--control", str(pictures / "net")]
        return [sys.executable, "-m", "genkit", "generate", str(file), "-o", str(out / "run"), "--steps", str(steps),
                "--guidance-scale", "5", "--json", *steered]  # fmt: skip
    steered = [] if pictures is None else ["--pictures", str(pictures)]
    return [sys.executable, __file__, "--loop", way, "--out", str(out), "--images", str(images), "--steps", str(steps),
            *steered]  # fmt: skip


def measure(way: str, images: int, steps: int, pictures: Path | None) -> tuple[float, float, float]:
    """Return (seconds, seconds until the first picture, peak MiB) of one process."""
    with tempfile.TemporaryDirectory() as folder:
        words = command(way, Path(folder), images, steps, pictures)
        place = Path(folder, "run", "images") if way == "genkit" else Path(folder)
        began, first, ended = time.perf_counter(), float("nan"), 0
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
            while not ended:
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                if first != first and any(place.glob("*.png")):
                    first = time.perf_counter() - began
                time.sleep(0.02)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{way}: exit code {process.returncode}")
        return time.perf_counter() - began, first, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pictures", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        plain_loop(given.out, prompts(given.images), given.steps, int(given.loop), given.pictures)
        return
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) if given.control else None
        if pictures is not None:
            control(pictures, given.images)
        compare(given, pictures)


def compare(given: argparse.Namespace, pictures: Path | None) -> None:
    """Measure the ways in turn, and print the table."""
    found: dict[str, list[tuple[float, float, float]]] = {"1": [], "8": [], "genkit": []}
    for _ in range(given.repeat):
        for way, runs in found.items():
            runs.append(measure(way, given.images, given.steps, pictures))
    steered = "" if pictures is None else ", a ControlNet"
    print(f"{given.images} images, {given.steps} steps, guidance 5, embedded model{steered}, float32; "
          f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores; "
          f"median of {given.repeat} (min to max)")  # fmt: skip
    titles = {"1": "diffusers loop, batch 1", "8": "diffusers loop, batch 8", "genkit": "genkit generate"}
    ours = statistics.median(seconds for seconds, *_ in found["genkit"])
    print(f"{'':24}  {'seconds':>20}  {'images/s':>8}  {'first':>6}  {'peak MiB':>8}  {'genkit is':>9}")
    for way, runs in found.items():
        seconds = [s for s, *_ in runs]
        middle, first, peak = (statistics.median(run[k] for run in runs) for k in range(3))
        spread = f"{middle:.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"{titles[way]:24}  {spread:>20}  {given.images / middle:>8.2f}  {first:>6.1f}  {peak:>8.0f}  "
              f"{middle / ours:>8.2f}x")  # fmt: skip


if __name__ == "__main__":
    main()
