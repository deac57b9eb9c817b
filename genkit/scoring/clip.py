"""CLIP scores: similarity of a picture and its prompt, and zero-shot classification.

SigLIP (Zhai et al. 2023) is supported too; its probabilities are sigmoids, independent for each label.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import interpolate, normalize

from genkit.components.text import TextEncoder
from genkit.device.devices import pick_device
from genkit.device.outofmemory import in_parts
from genkit.errors import InputError
from genkit.pictures.images import check_resized, read_image

if TYPE_CHECKING:
    from genkit.components import Components

LABEL_SETS = 64  # lists of labels whose embeddings are cached
# The embedding of a label is the mean over these (prompt ensembling, Radford et al. 2021, section 3.1.4).
TEMPLATES = ("{}", "a picture of {}", "a photo of {}", "an emoji of {}")

Pictures = "torch.Tensor | Sequence[Image.Image]"


class ClipScorer:
    """A CLIPModel or a SiglipModel as a scorer of pictures.

    Pictures are PIL images of any size, or a tensor (B, 3, H, W) on any device, uint8 or float from 0 to 1. They are
    resized as the model's preprocessor config says, antialiased, on the model's device. Text embeddings are cached.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocessor: dict[str, Any], name: str = "custom") -> None:
        self.model, self.name = model, name
        self.texts = TextEncoder(tokenizer, _TextHead(model))
        self.batch = self.texts.batch  # pictures of a batch; halved when memory runs out
        size, crop = preprocessor.get("size", 224), preprocessor.get("crop_size", 224)
        self.shortest = size if isinstance(size, int) else size.get("shortest_edge")
        self.exact = None if self.shortest else (size["height"], size["width"])
        crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        self.filter = "bilinear" if preprocessor.get("resample") == 2 else "bicubic"
        self.crop = crop if preprocessor.get("do_center_crop", True) else None
        self._directions: dict[tuple[tuple[str, ...], tuple[str, ...]], torch.Tensor] = {}
        self.mean, self.std = (torch.tensor(preprocessor[k]).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))

    @classmethod
    def from_pretrained(
        cls, name: str | Path = "emoji-clip", *, device: str = "auto", dtype: str = "auto", variant: str | None = None
    ) -> ClipScorer:
        """Load `emoji-clip`, a folder with a CLIPModel or a SiglipModel, or a hub id.

        Raises InputError naming what is wrong with it.
        """
        from genkit.components import inspect_model, load_components

        info = inspect_model(name, variant=variant)
        if info.kind != "clip":
            raise InputError(f"{name}: is a model of kind {info.kind}, not a CLIP model")
        target, precision = pick_device(device, dtype)
        return cls.from_components(load_components(info, device=target, dtype=precision))

    @classmethod
    def from_components(cls, parts: Components) -> ClipScorer:
        """Build a scorer from loaded components."""
        return cls(parts.clip, parts.tokenizer, parts.info.preprocessor, name=parts.info.name)

    def score(self, images: Any, prompts: str | Sequence[str]) -> list[float]:
        """Return the cosine similarity of each picture and its prompt, -1 to 1. A single prompt is used for all.

        Comparable between pictures of the same prompt, not between prompts.
        """
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(images):
            raise InputError(f"prompts: {len(prompts)} for {len(images)} images; give one for each, or one for all")
        embedded = self.embed_images(images)
        return (embedded * self.embed_texts(prompts).to(embedded.device)).sum(dim=1).tolist()

    def classify(
        self, images: Any, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> list[dict[str, float]]:
        """Return {label: probability} for each picture; see `probabilities`."""
        embedded = self.embed_images(images)
        cosines = (embedded @ self.directions(labels, templates).to(embedded.device).T).cpu().numpy()
        return [dict(zip(labels, row, strict=True)) for row in probabilities(self, cosines).tolist()]

    @torch.inference_mode()
    def embed_images(self, images: Any) -> torch.Tensor:
        """Return unit embeddings, float32, of shape (B, width)."""
        if not len(images):
            return torch.empty(0, 0)
        with self.texts.hold():
            parts, self.batch = in_parts(len(images), self.batch, lambda part: self._embed(images[part]), "pictures")
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit embeddings, float32, of shape (len(texts), width)."""
        return normalize(torch.stack(self.texts(texts)).float(), dim=-1) if texts else torch.empty(0, 0)

    def directions(self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> torch.Tensor:
        """Return a unit embedding for each label, (len(labels), width): the mean over the templates."""
        key = tuple(labels), tuple(templates)
        if key not in self._directions:
            if len(self._directions) >= LABEL_SETS:
                self._directions.clear()
            each = self.embed_texts([t.format(label) for label in labels for t in templates])
            self._directions[key] = normalize(each.view(len(labels), len(templates), -1).mean(dim=1), dim=-1)
        return self._directions[key]

    @property
    def logit_scale(self) -> float:
        """The factor (inverse temperature) of cosines in the softmax or sigmoid of labels."""
        return float(self.model.logit_scale.exp())

    @property
    def logit_bias(self) -> float | None:
        """The bias that SigLIP adds to scaled cosines before the sigmoid; None for CLIP, which takes a softmax."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias)

    def _embed(self, images: Any) -> torch.Tensor:
        if isinstance(images, torch.Tensor):
            pixels = self.preprocess(images)
        else:
            pixels = torch.cat([self.preprocess(as_tensor(image)) for image in images])
        return self.embed_pixels(pixels)

    @torch.inference_mode()
    def embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the unit embeddings, (B, width) float32, of preprocessed pictures."""
        vision = self.model.vision_model(pixel_values=pixels.to(self.model.dtype))
        pooled = vision.pooler_output
        if hasattr(self.model, "visual_projection"):  # of CLIP; the output of SigLIP's pooling head is the embedding
            pooled = self.model.visual_projection(pooled)
        return normalize(pooled.float(), dim=-1)

    def preprocess(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return pictures (B, 3, H, W) resized, centre-cropped and normalised for the model, on its device.

        Raises InputError for pictures so narrow that they would be too large once their short side is resized.
        """
        x = pictures.to(self.model.device).float()
        if pictures.dtype == torch.uint8:
            x = x / 255
        height, width = x.shape[-2:]
        if self.exact is not None:
            size = self.exact
        elif height <= width:
            size = self.shortest, int(self.shortest * width / height)
        else:
            size = int(self.shortest * height / width), self.shortest
        check_resized((height, width), size, self.name)
        if size != (height, width):
            x = interpolate(x, size=size, mode=self.filter, antialias=True).clamp(0, 1)
        if self.crop is not None:
            top, left = (max(0, (a - b) // 2) for a, b in zip(x.shape[-2:], self.crop, strict=True))
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (x - self.mean.to(x.device)) / self.std.to(x.device)


class _TextHead:
    """The text tower of a CLIPModel or SiglipModel as a text model whose output is the projected embedding."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config.text_config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        pooled = self.model.text_model(input_ids=ids, attention_mask=attention_mask).pooler_output
        return (self.model.text_projection(pooled) if hasattr(self.model, "text_projection") else pooled,)


def probabilities(clip: ClipScorer, cosines: np.ndarray) -> np.ndarray:
    """Return the probabilities (…, labels) of labels from their cosine similarities with a picture.

    CLIP's are a softmax over the labels, and sum to 1; SigLIP's are a sigmoid of each, and may all be near 0.
    """
    bias = clip.logit_bias
    if bias is not None:
        return 1 / (1 + np.exp(-(clip.logit_scale * cosines + bias)))
    logits = clip.logit_scale * cosines
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def as_tensor(image: Any) -> torch.Tensor:
    """Return anything that `read_image` reads as a uint8 tensor (1, 3, H, W)."""
    return torch.from_numpy(np.array(read_image(image))).permute(2, 0, 1)[None].contiguous()
