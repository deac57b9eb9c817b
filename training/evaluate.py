"""Evaluation: validation loss with fixed noise, samples with fixed seeds, and their metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit.device.memory import CONTROL
from genkit.durable import disk, write_whole
from genkit.errors import InputError
from genkit.rows.request import Request
from genkit.scoring.distances import DISTANCES, halved, interval
from genkit.scoring.plugins import find_features
from genkit.training.control import drawing_control
from genkit.training.data import Batch, Pictures
from genkit.training.recipe import Recipe
from genkit.training.state import fold

log = logging.getLogger("genkit")
LOWER_IS_BETTER = {"loss", *DISTANCES}
TIMES = 10  # ranges of noise levels for which the validation loss is reported
COLUMNS = 8  # of the grid of samples
BATCH = 16


class Evaluation:
    """The evaluation of a run: the same pictures, noise and seeds every time."""

    def __init__(self, recipe: Recipe, task: Any, validation: Pictures | None, trained: Pictures, out: Path) -> None:
        self.recipe, self.task, self.validation, self.out = recipe, task, validation, out
        self.plan = recipe.evaluate
        self.trained = trained
        self.scorer: Any = None
        self.warned = False  # about a FID of few pictures
        if self.plan.metrics and recipe.task in ("autoencoder", "clip", "detector"):
            raise InputError(f"evaluate.metrics: task {recipe.task} draws no pictures to measure")
        if set(self.plan.metrics) & {"clip"} and not self.plan.prompts:
            raise InputError("evaluate.prompts: are missing, which metric clip needs")
        if set(self.plan.metrics) & set(DISTANCES) and (validation is None or len(validation) < 2):
            raise InputError("data.validation: leaves too few pictures to measure a distance to")
        if set(self.plan.metrics) & set(DISTANCES) and self.plan.num_images * max(1, len(self.plan.prompts)) < 2:
            raise InputError("evaluate.num_images: a distance needs 2 pictures or more, of all prompts")
        if validation is None and recipe.task == "controlnet" and self.plan.prompts:
            raise InputError("data.validation: holds nothing out, and evaluate.prompts are drawn by its conditioning")
        if validation is None and isinstance(recipe.networks.get("vae"), dict):
            raise InputError("data.validation: holds nothing out, and a new autoencoder's latents are measured on it")
        if self.plan.features != "clip":
            self.features = find_features(self.plan.features, "evaluate.features", task.device)
        if self.plan.best == "loss" and validation is None and self.plan.patience:
            raise InputError("evaluate.patience: needs data.validation, or another metric as evaluate.best")

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, Any]:
        """Return the metrics of the current networks, and write a grid of samples to samples/<step>.png."""
        for network in self.task.networks.values():
            network.eval()
        found: dict[str, Any] = {}
        if self.validation is not None:
            found |= _MEASURES.get(self.recipe.task, _noise_loss)(self)
        if hasattr(self.task, "noising"):
            found |= self._samples(step)
        for network in self.task.networks.values():
            network.train()
        return found

    def batches(self, pictures: Pictures | None = None) -> Iterator[Batch]:
        """Yield batches of the validation set, or of other pictures: at most evaluate.pictures, no captions dropped."""
        pictures = self.validation if pictures is None else pictures
        assert pictures is not None
        left = self.plan.pictures
        for _, members in sorted(pictures.buckets.items()):
            for at in range(0, min(len(members), left), BATCH):
                batch = pictures.batch(members[at : min(at + BATCH, left)], 0)
                batch.dropped[:] = False
                yield batch
            left -= min(len(members), left)

    def generator(self, *what: int | str) -> torch.Generator:
        """Return a generator seeded by the recipe's seed and `what`."""
        return torch.Generator(self.task.device).manual_seed(fold(self.recipe.seed, "evaluate", *what))

    def _samples(self, step: int) -> dict[str, Any]:
        """Draw samples of the recipe's prompts, or unconditional ones, and compute their metrics."""
        from genkit.sampling.generators import Generator

        parts = self.task.parts
        words = self.plan.prompts if self.task.encoders else [""]
        if not words or not self.plan.num_images:
            return {}
        drawer = Generator(
            unet=parts.unet, scheduler=self.task.scheduler, vae=parts.vae, text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer, text_encoder_2=parts.text_encoder_2, tokenizer_2=parts.tokenizer_2,
            force_zeros_for_empty_prompt=parts.info.zero_empty, defaults=parts.info.defaults,
        )  # fmt: skip
        width, height = self.task.sample_size
        settings: dict[str, Any] = {"num_inference_steps": self.plan.num_inference_steps, "width": width}
        settings |= {"height": height, "num_images": self.plan.num_images}
        if words != [""]:
            settings["guidance_scale"] = self.plan.guidance_scale
        if parts.controlnet is not None:
            drawer.controls.networks[CONTROL] = drawing_control(parts)
        rows = [
            Request(id=f"{i:06d}", prompt=word, seed=fold(self.recipe.seed, i) % 2**32, controls=controls, **settings)
            for i, (word, controls) in enumerate(zip(words, self._controls(len(words)), strict=True))
        ]
        results = sorted(drawer.stream(rows), key=lambda r: (r.id, r.index))
        good = [r for r in results if r.pixels is not None]
        if not good:
            return {}
        _sheet([r.image for r in good], self.out / "samples" / f"{step:06d}.png")
        pictures = torch.stack([torch.as_tensor(r.pixels).permute(2, 0, 1) for r in good])
        return self._scores(pictures, [r.prompt for r in good])

    def _controls(self, count: int) -> list[list[dict[str, Any]] | None]:
        """Return the ControlNet of each prompt, with the conditioning of a validation picture, the first of them."""
        if self.task.parts.controlnet is None:
            return [None] * count
        found: list[Any] = []
        for batch in self.batches():
            found += batch.conditioning if batch.conditioning is not None else ()
            if len(found) >= count:
                break
        pictures = [found[i % len(found)].permute(1, 2, 0).numpy() for i in range(count)]
        return [[{"file": CONTROL, "image": picture}] for picture in pictures]

    def _scores(self, pictures: torch.Tensor, prompts: list[str]) -> dict[str, Any]:
        if not self.plan.metrics:
            return {}
        found: dict[str, Any] = {}
        if "clip" in self.plan.metrics:
            cosines = (self._embedded(pictures) * self.scorer.embed_texts(prompts).cpu()).sum(dim=1).tolist()
            found |= {"clip": float(np.mean(cosines)), "clip_interval": interval(cosines)}
        wanted = [name for name in self.plan.metrics if name in DISTANCES]
        if wanted:
            names = [f"sample {k}" for k in range(len(pictures))]
            drawn = torch.cat(
                [self._read(part, names[k * BATCH :][:BATCH]) for k, part in enumerate(pictures.split(BATCH))]
            )
            held = (((batch.pixels * 127.5 + 127.5).round().byte(), batch.keys) for batch in self.batches())
            real = torch.cat([self._read(part, keys) for part, keys in held])
            fewest = min(len(drawn), len(real))
            if "fid" in wanted and fewest <= drawn.shape[1] and not self.warned:
                self.warned = True
                more = f"more than {drawn.shape[1]} are needed, as many as there are features"
                log.warning("fid of %d pictures means nothing: %s; kid and cmmd do with fewer", fewest, more)
            for name in wanted:
                value, error = DISTANCES[name](drawn, real), halved(DISTANCES[name], drawn, real)
                found |= {name: value, f"{name}_interval": (value - 1.96 * error, value + 1.96 * error)}
        return found

    def _read(self, pictures: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Return the features of uint8 pictures (B, 3, H, W) for distances, (B, D) on the CPU."""
        pictures = pictures.to(self.task.device)
        return self._embedded(pictures) if self.plan.features == "clip" else self.features(pictures, names)

    def _embedded(self, pictures: torch.Tensor) -> torch.Tensor:
        from genkit.scoring.clip import ClipScorer

        self.scorer = self.scorer or ClipScorer.from_pretrained(self.plan.clip, device=self.task.device.type)
        return self.scorer.embed_images(pictures / 255).cpu()


def _noise_loss(e: Evaluation) -> dict[str, Any]:
    """The unweighted loss at stratified noise levels, and for each tenth of them."""
    count = e.task.noising.count
    losses, times, seen = [], [], 0
    for number, batch in enumerate(e.batches()):
        generator = e.generator("noise", number)
        share = (
            torch.arange(seen, seen + len(batch.keys), device=e.task.device) * 0.6180339887 % 1
        )  # golden-ratio sequence: evenly spread
        timesteps = (share * count).long()
        seen += len(batch.keys)
        tensors = {name: t.to(e.task.device) for name, t in e.task.encode(batch).items()}
        losses += e.task.loss(tensors, generator, timesteps, plain=True).tolist()
        times += (timesteps * TIMES // count).tolist()
    by_time = [
        float(np.mean([x for x, t in zip(losses, times, strict=True) if t == k] or [np.nan])) for k in range(TIMES)
    ]
    return {"loss": float(np.mean(losses)), "loss_interval": interval(losses), "loss_by_time": by_time}


def _reconstruction(e: Evaluation) -> dict[str, Any]:
    """The squared error of reconstructions, their PSNR in dB, and the standard deviation of the latents."""
    losses, latents = [], []
    for batch in e.batches():
        tensors = e.task.encode(batch)
        losses += e.task.loss(tensors, e.generator("noise"), plain=True).tolist()
        latents.append(e.task.vae.encode(tensors["pixels"]).latent_dist.mean.float().cpu())
    psnr = [10 * np.log10(4 / max(x, 1e-12)) for x in losses]  # the range is 2, from -1 to 1
    std = float(torch.cat([x.flatten() for x in latents]).std())
    mean = float(np.mean(losses))
    return {
        "loss": mean, "loss_interval": interval(losses), "psnr": float(np.mean(psnr)), "psnr_interval": interval(psnr),
        "latent_std": std,
    }  # fmt: skip


def _zero_shot(e: Evaluation) -> dict[str, Any]:
    """The contrastive loss, and top-1 and top-5 accuracy of matching validation pictures to captions."""
    losses, images, captions = [], [], []
    for batch in e.batches():
        losses += e.task.loss(e.task.encode(batch), e.generator("noise"), plain=True).tolist()
        images.append(e.task.scorer.embed_images(batch.pixels / 2 + 0.5))
        captions += batch.captions
    names = sorted({*captions, *e.trained.names()})
    e.task.scorer.texts.forget()  # embeddings of the earlier weights
    cosines = torch.cat(images) @ e.task.scorer.embed_texts(names).T
    own = cosines[torch.arange(len(captions)), [names.index(c) for c in captions]]
    rank = (cosines > own[:, None]).sum(dim=1)
    return {
        "loss": float(np.mean(losses)), "loss_interval": interval(losses), "names": len(names),
        "top1": float((rank < 1).float().mean()), "top5": float((rank < 5).float().mean()),
    }  # fmt: skip


def _boxes(e: Evaluation) -> dict[str, Any]:
    """The loss on scenes of things held out, and how well they are counted and found (counting.py)."""
    from genkit.training.counting import measures, threshold_of, verdicts

    def seen(batches: Iterable[Batch], losses: list[float]) -> list[Any]:
        found = []
        for batch in batches:
            tensors = e.task.encode(batch)
            losses += e.task.loss(tensors, e.generator("noise"), plain=True).tolist()
            logits, _, boxes = e.task(tensors["pixel_values"], tensors["queries"])
            found += verdicts(logits, boxes, batch.scenes or [])
        return found

    losses: list[float] = []
    held = seen(e.batches(), losses)
    threshold = threshold_of(seen(e.batches(e.trained), []))
    e.task.threshold = threshold
    return {"loss": float(np.mean(losses)), "loss_interval": interval(losses), **measures(held, threshold)}


_MEASURES: dict[str, Callable[[Evaluation], dict[str, Any]]] = {
    "autoencoder": _reconstruction, "clip": _zero_shot, "detector": _boxes,
}  # fmt: skip


def overfit_since(scores: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return the step of the lowest validation loss if two later losses are above its interval, else None."""
    losses = {step: s["loss"] for step, s in sorted(scores.items()) if s.get("loss") is not None}
    if not losses:
        return None
    best = min(losses, key=lambda step: losses[step])
    above = scores[best].get("loss_interval", [0, losses[best]])[1]
    worse = [step for step, loss in losses.items() if step > best and loss > above]
    return best if len(worse) > 1 else None


def _sheet(pictures: list[Any], path: Path) -> None:
    """Write a grid of pictures as a PNG."""
    import io

    from PIL import Image

    width, height = pictures[0].size
    columns = min(COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    with disk(path):
        path.parent.mkdir(exist_ok=True)
        write_whole(path, data.getvalue())
