"""Training steps of genkit beside those of diffusers' example script, on the same network, batch and precision.

    python benchmarks/training.py [--model emoji] [--data FOLDER-OR-TAR] [--batch 16] [--steps 24] [--runs 3]
                                  [--workers 0] [--device auto] [--precision fp32] [--compile]

Both fine-tune the UNet of a model with AdamW, an average of the weights, clipped gradients and dropped captions.
The example's step (examples/text_to_image/train_text_to_image.py) is written out with its library's calls: a DataLoader
of PIL pictures, AutoencoderKL.encode, CLIPTextModel, DDPMScheduler.add_noise, EMAModel. "online" encodes pictures and
captions at each step; "cached" has both encoded beforehand, which the example does not offer: it is given the same
tensors from memory. Each contestant is a process of its own, in turn; the first quarter of the steps is not counted.
Medians. stall: the share of the time that the loop waits for its next batch. --compile: genkit compiles its network,
as with `train.compile`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT / "training" / "recipes" / "openmoji.tar"


def genkit(a: argparse.Namespace, cached: bool) -> dict[str, float]:
    """Time genkit's own loop, by its log."""
    from genkit.training import loop
    from genkit.training.recipe import make_recipe
    from genkit.training.setup import Setup

    waited: list[float] = []
    real = Setup.feed

    def timed(self: Setup, start: int) -> Iterator[Any]:
        batches = real(self, start)
        while True:
            began = time.perf_counter()
            tensors = next(batches)
            waited.append(time.perf_counter() - began)
            yield tensors

    if cached:  # else the wait is for the encoders, which are part of the work
        Setup.feed = timed  # type: ignore[method-assign]
    recipe = make_recipe(
        {
            "task": "text-to-image",
            "model": a.model,
            "data": {"path": a.data, "cache": int(cached), "caption_dropout": 0.1, "flip": 0.5, "workers": a.workers},
            "train": {
                "steps": a.steps,
                "batch_size": a.batch,
                "mixed_precision": a.precision,
                "ema": 0.999,
                "compile": a.compile,
            },
            "evaluate": {"every": 0, "pictures": 1, "num_inference_steps": 1},
            "save": {"every": 10**6},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        loop.train(recipe, Path(folder), device=a.device, quiet=True)
        seconds = [json.loads(line)["seconds"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    skip = a.steps // 4
    spent = seconds[-1] - seconds[skip - 1]
    stall = sum(waited[skip:]) / spent if waited else float("nan")
    return {"rate": (a.steps - skip) * a.batch / spent, "stall": stall}


def diffusers(a: argparse.Namespace, cached: bool) -> dict[str, float]:
    """Time the step of diffusers' example, its library's calls in its order."""
    import numpy as np
    import torch
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    from genkit.components import inspect_model
    from genkit.datasets.config import Data
    from genkit.datasets.sources import read_examples

    accelerator = Accelerator(mixed_precision=a.precision.replace("fp32", "no"), cpu=a.device == "cpu")
    device = accelerator.device
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[a.precision]
    folder = inspect_model(a.model).folder
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).to(device).requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(device).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).train()
    ema = EMAModel(unet.parameters(), decay=0.999, model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    rates = get_scheduler("constant", optimizer=optimizer)
    examples = read_examples(Data.model_validate({"path": a.data}))
    side = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)

    class Dataset(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(examples)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            picture = Image.new("RGB", examples[index].size(), "white")
            found = examples[index].read()
            picture.paste(found, mask=found if found.mode == "RGBA" else None)
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
            if torch.rand(()) < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
            caption = "" if torch.rand(()) < 0.1 else examples[index].caption
            ids = tokenizer(caption, max_length=tokenizer.model_max_length, padding="max_length", truncation=True)
            return {"pixel_values": pixels, "input_ids": torch.tensor(ids.input_ids)}

    loader = torch.utils.data.DataLoader(
        Dataset(), shuffle=True, batch_size=a.batch, num_workers=a.workers, drop_last=True
    )
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    ema.to(device)

    def encoded() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            for batch in loader:
                latents = vae.encode(batch["pixel_values"].to(dtype)).latent_dist.sample() * vae.config.scaling_factor
                yield latents, text(batch["input_ids"], return_dict=False)[0]

    batches = encoded()
    if cached:
        kept = [next(batches) for _ in range(8)]
        batches = (kept[i % 8] for i in range(10**9))
    seconds = []
    for _ in range(a.steps):
        latents, told = next(batches)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        with accelerator.autocast():
            predicted = unet(noisy, timesteps, told, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="mean")
        accelerator.gather(loss.repeat(a.batch)).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.detach().item()  # what the example logs
        seconds.append(time.perf_counter())
    skip = a.steps // 4
    return {"rate": (a.steps - skip) * a.batch / (seconds[-1] - seconds[skip - 1]), "stall": float("nan")}


def peak() -> float:
    """Return the most memory this process has taken, in MiB: of the GPU where there is one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


CONTESTANTS: dict[str, tuple[Callable[[argparse.Namespace, bool], dict[str, float]], bool]] = {
    "diffusers, online": (diffusers, False), "genkit, online": (genkit, False),
    "diffusers, cached": (diffusers, True), "genkit, cached": (genkit, True),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.only:
        run, cached = CONTESTANTS[a.only]
        print(json.dumps({**run(a, cached), "peak": peak()}))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(a.runs):
        for name in CONTESTANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name].append(json.loads(out.splitlines()[-1]))
            print(f"{name:20} {found[name][-1]['rate']:9.2f} images/s", flush=True)
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{a.model}, batch {a.batch}, precision {a.precision}, {a.steps} steps, medians of {a.runs}; {where}")
    print(f"{'':20} {'images/s':>9} {'beside':>7} {'peak MiB':>9} {'stall':>7}")
    for name, runs in found.items():
        rate, most, stall = (statistics.median(r[key] for r in runs) for key in ("rate", "peak", "stall"))
        beside = rate / statistics.median(r["rate"] for r in found[name.replace("genkit", "diffusers")])
        print(f"{name:20} {rate:9.2f} {beside:6.2f}x {most:9.0f} {stall:7.1%}")


if __name__ == "__main__":
    main()
