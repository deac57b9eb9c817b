"""How good the embedded model is, or one trained by its recipes, on pictures that the recipes hold out.

    python benchmarks/embedded_model.py emoji-train.tar [--model emoji] [--clip emoji-clip] [--pictures 256]
                                         [--sheet S.png]

On what `training/recipes/emoji-*.yaml` hold out: PSNR of the autoencoder, how often CLIP finds a picture's own name
first, or among five, of all names, and the UNet's validation loss, each as `genkit train` measures it. Then pictures of
some of the names, drawn with the model's own steps and guidance: how often that CLIP finds their name first, or among
five. The embedded weights may have seen some of the held-out pictures.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "training" / "recipes"


def held_out(stage: str, data: Path, networks: list[str], pictures: int) -> dict[str, Any]:
    """Return the evaluation of a stage's recipe with stored networks in place of its fresh ones."""
    import torch

    from genkit.components import load_components
    from genkit.components.compose import compose_model
    from genkit.datasets.sources import read_examples, split
    from genkit.device.devices import pick_device
    from genkit.training.data import Pictures
    from genkit.training.evaluate import Evaluation
    from genkit.training.recipe import read_recipe
    from genkit.training.tasks import KINDS, make_task

    given = [f"data.path={data}", f"evaluate.pictures={pictures}", "data.cache=0", "evaluate.prompts=[]", *networks]
    quiet = ["evaluate.metrics=[]", "evaluate.best=loss"]
    recipe = read_recipe(RECIPES / f"emoji-{stage}.yaml", [*given, *quiet])
    info = compose_model(KINDS.get(recipe.task, recipe.task), recipe.model, recipe.networks, recipe.scheduler)
    examples, held = split(read_examples(recipe.data), recipe.data)
    device, _ = pick_device("auto", "float32")
    task = make_task(recipe, load_components(info, device=device, dtype=torch.float32), torch.float32)
    trained = Pictures(examples, recipe.data, task.resolution, task.multiple, recipe.seed)
    return Evaluation(recipe, task, trained.plain(held), trained.plain(examples), Path(tempfile.gettempdir()))(0)


def recognised(data: Path, model: str, clip: str, pictures: int, sheet: Path | None) -> tuple[float, float, int]:
    """Return how often pictures of names are the name's best, or one of its best five, and how many names there are."""
    import torch
    from PIL import Image

    from genkit import ClipScorer, Request, TextToImage
    from genkit.datasets.config import Data
    from genkit.datasets.sources import read_examples

    names = sorted({str(e.caption) for e in read_examples(Data(path=str(data)))})
    asked = random.Random(0).sample(names, pictures)
    rows = [Request(id=str(k), prompt=name, seed=k) for k, name in enumerate(asked)]
    found = sorted(TextToImage.from_pretrained(model).stream(rows), key=lambda r: int(r.id))
    images = [r.image for r in found]
    scorer = ClipScorer.from_pretrained(clip)
    cosines = torch.cat([scorer.embed_images(images[i : i + 64]) for i in range(0, len(images), 64)])
    cosines = (cosines @ scorer.embed_texts(names).to(cosines.device).T).cpu()
    own = cosines[torch.arange(len(asked)), [names.index(name) for name in asked]]
    rank = (cosines > own[:, None]).sum(dim=1)
    if sheet is not None:
        page = Image.new("RGB", (16 * 128, -(-len(images) // 16) * 128))
        for k, image in enumerate(images):
            page.paste(image.resize((128, 128)), (k % 16 * 128, k // 16 * 128))
        page.save(sheet)
    return float((rank < 1).float().mean()), float((rank < 5).float().mean()), len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="emoji-train.tar")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clip", default="emoji-clip")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--sheet", type=Path, help="write the pictures that were drawn into one PNG")
    a = parser.parse_args()
    began, data = time.monotonic(), a.data.resolve()
    print(f"{a.model}, {a.clip}; {a.pictures} pictures; {platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    vae = held_out("autoencoder", data, [f"networks.vae={a.model}"], a.pictures)
    print("autoencoder, held out      PSNR {:.1f} dB ({:.1f} to {:.1f})".format(vae["psnr"], *vae["psnr_interval"]))
    clip = held_out("clip", data, [f"networks.clip={a.clip}"], a.pictures)
    print(f"CLIP, held out             {clip['top1']:.0%} first, {clip['top5']:.0%} in five of {clip['names']} names")
    parts = [f"networks.{name}={a.model}" for name in ("unet", "vae", "text_encoder")]
    unet = held_out("text-to-image", data, parts, a.pictures)
    print("UNet, held out             loss {:.4f} ({:.4f} to {:.4f})".format(unet["loss"], *unet["loss_interval"]))
    first, five, names = recognised(data, a.model, a.clip, a.pictures, a.sheet)
    print(f"drawn, found by that CLIP  {first:.0%} first, {five:.0%} in five of {names} names")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
