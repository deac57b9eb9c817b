"""A single file of Stable Diffusion 1.5's or SDXL's shape draws what its folder draws, and what diffusers draws.

    python benchmarks/real_shapes.py [--only sd15 sdxl]

Random half-precision weights, computed in float32 on the CPU: 64x64 pixels, 4 steps, guidance 5. Makes a folder and, as
`genkit convert` does, a file in the original layout (2 GB each of SD1.5, 7 GB of SDXL, removed at the end); each way of
drawing is a process of its own. diffusers takes the configs of the file from the folder, as there is no network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
WAYS = ("genkit, file", "genkit, folder", "diffusers, file", "diffusers, folder")
SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "width": 64, "height": 64}
PROMPT = "a red fox in the snow, oil painting"


def make(folder: Path, family: str) -> None:
    """Write the folder with CLIP's own tokenizer, which a single file is read with, and the file."""
    import shapes

    from genkit.components import inspect_model
    from genkit.components.convert import convert
    from genkit.components.families import SCHEDULERS
    from genkit.components.single import TOKENIZER

    shapes.WORDS = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    {"sd15": shapes.write_sd15, "sdxl": shapes.write_sdxl}[family](folder / family, "cpu")
    scheduler = SCHEDULERS[{"sd15": "SD 1", "sdxl": "SDXL"}[family]]  # which a file of the family has
    (folder / family / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = folder / family / "model_index.json"
    index.write_text(
        json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", scheduler["_class_name"]]})
    )
    for tokenizer in (folder / family).glob("tokenizer*"):
        shutil.rmtree(tokenizer)
        shutil.copytree(TOKENIZER, tokenizer)
    second = folder / family / "tokenizer_2" / "tokenizer_config.json"
    if second.exists():  # as SDXL's own
        second.write_text(json.dumps({**json.loads(second.read_text()), "pad_token": "!"}))
    convert(inspect_model(folder / family), folder / f"{family}.safetensors")


def draw(way: str, folder: Path, family: str) -> Any:
    """Return the picture (64, 64, 3) of one way."""
    import torch

    who, what = way.split(", ")
    place = folder / (family if what == "folder" else f"{family}.safetensors")
    if who == "genkit":
        from genkit import TextToImage

        generator = TextToImage.from_pretrained(place, device="cpu", dtype="float32")
        return generator(PROMPT, seed=3, **SETTINGS).images[0]
    import diffusers

    cls = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    options: dict[str, Any] = {"torch_dtype": torch.float32, "local_files_only": True}
    options |= {} if family == "sdxl" else {"safety_checker": None}
    if what == "folder":
        pipeline = cls.from_pretrained(place, **options)
    else:
        pipeline = cls.from_single_file(str(place), config=str(folder / family), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(3), **SETTINGS).images[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("sd15", "sdxl"), default=("sd15", "sdxl"))
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        way, folder, family = given.run[0], Path(given.run[1]), given.run[2]
        if way == "make":
            make(folder, family)
        else:
            np.save(folder / f"{way}.npy", np.asarray(draw(way, folder, family)).astype(int))
        return 0
    most = 0
    for family in given.only:
        with tempfile.TemporaryDirectory(prefix="genkit-benchmark-") as name:
            for way in ("make", *WAYS):
                began = time.monotonic()
                subprocess.run([sys.executable, __file__, "--run", way, name, family], check=True, capture_output=True)
                print(f"{family}: {way}: {time.monotonic() - began:.0f} s", flush=True)
            pictures = {way: np.load(f"{name}/{way}.npy") for way in WAYS}
        first = pictures[WAYS[0]]
        for way, picture in pictures.items():
            difference = int(np.abs(picture - first).max())
            most = max(most, difference)
            print(f"{family}: {way}: largest difference to {WAYS[0]}: {difference} of 255, spread {np.ptp(picture)}")
    return int(most > 2)


if __name__ == "__main__":
    sys.exit(main())
