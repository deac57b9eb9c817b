"""CLIP: how well a picture fits its prompt, and which of some labels it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import interpolate, normalize

from genkit.device import pick_device
from genkit.errors import InputError
from genkit.outofmemory import in_parts
from genkit.text import TextEncoder

if TYPE_CHECKING:
    from PIL import Image

    from genkit.components import Components

# A label's direction is the mean over these (prompt ensembling, Radford et al. 2021, section 3.1.4).
TEMPLATES = ("{}", "a picture of {}", "a photo of {}", "an emoji of {}")

Pictures = "torch.Tensor | Sequence[Image.Image]"


class ClipScorer:
    """A CLIP model as a scorer of pictures.

    Pictures are PIL images of any size, or a tensor (B, 3, H, W) of values 0 to 1 on any device, which is resized there
    (antialiased bicubic, as the model's own preprocessor asks). Embeddings of texts are kept.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocessor: dict[str, Any], name: str = "custom") -> None:
        self.model, self.name = model, name
        self.texts = TextEncoder(tokenizer, _TextHead(model))
        self.batch = self.texts.batch  # pictures a call; halves when memory runs out
        size, crop = preprocessor.get("size", 224), preprocessor.get("crop_size", 224)
        self.shortest = size if isinstance(size, int) else size.get("shortest_edge")
        self.exact = None if self.shortest else (size["height"], size["width"])
        crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        self.crop = crop if preprocessor.get("do_center_crop", True) else None
        self.mean, self.std = (torch.tensor(preprocessor[k]).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))

    @classmethod
    def from_pretrained(
        cls, name: str | Path = "emoji-clip", *, device: str = "auto", dtype: str = "auto", variant: str | None = None
    ) -> ClipScorer:
        """Load `emoji-clip`, a folder with a CLIPModel, or a hub id. Raises InputError naming what is wrong with it."""
        from genkit.components import inspect_model, load_components

        info = inspect_model(name, variant=variant)
        if info.kind != "clip":
            raise InputError(f"{name}: is a model of kind {info.kind}, not a CLIP model")
        target, precision = pick_device(device, dtype)
        return cls.from_components(load_components(info, device=target, dtype=precision))

    @classmethod
    def from_components(cls, parts: Components) -> ClipScorer:
        """Build a scorer around loaded components."""
        return cls(parts.clip, parts.tokenizer, parts.info.preprocessor, name=parts.info.name)

    def score(self, images: Any, prompts: str | Sequence[str]) -> list[float]:
        """Return the cosine of each picture's and its prompt's embedding, -1 to 1. One prompt serves all pictures.

        Comparable between pictures of one prompt, not between prompts.
        """
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(images):
            raise InputError(f"prompts: {len(prompts)} for {len(images)} images; give one for each, or one for all")
        embedded = self.embed_images(images)
        return (embedded * self.embed_texts(prompts).to(embedded.device)).sum(dim=1).tolist()

    def classify(
        self, images: Any, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> list[dict[str, float]]:
        """Return for each picture the probability of each label: softmax of logit_scale * cosine over the labels."""
        return [
            dict(zip(labels, row, strict=True))
            for row in self._probabilities(self.embed_images(images), labels, templates)
        ]

    def scores(
        self, images: Any, prompts: Sequence[str], labels: Sequence[Sequence[str] | None]
    ) -> list[dict[str, Any]]:
        """Return {"clip": cosine with the prompt, "p": {label: probability}} for each picture, from one embedding.

        A picture without a prompt has no "clip", one without labels no "p".
        """
        embedded = self.embed_images(images)
        texts = self.embed_texts(prompts).to(embedded.device)
        found: list[dict[str, Any]] = []
        for image, text, prompt, names in zip(embedded, texts, prompts, labels, strict=True):
            scores: dict[str, Any] = {"clip": round(float(image @ text), 6)} if prompt else {}
            if names:
                row = self._probabilities(image[None], names, TEMPLATES)[0]
                scores["p"] = {name: round(p, 6) for name, p in zip(names, row, strict=True)}
            found.append(scores)
        return found

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

    def _probabilities(
        self, embedded: torch.Tensor, labels: Sequence[str], templates: Sequence[str]
    ) -> list[list[float]]:
        each = self.embed_texts([t.format(label) for label in labels for t in templates])
        directions = normalize(each.view(len(labels), len(templates), -1).mean(dim=1), dim=-1).to(embedded.device)
        scale = float(self.model.logit_scale.exp())
        return (scale * embedded @ directions.T).softmax(dim=-1).tolist()

    def _embed(self, images: Any) -> torch.Tensor:
        if isinstance(images, torch.Tensor):
            pixels = self.preprocess(images)
        else:
            pixels = torch.cat([self.preprocess(_tensor(image)) for image in images])
        vision = self.model.vision_model(pixel_values=pixels.to(self.model.dtype))
        return normalize(self.model.visual_projection(vision.pooler_output).float(), dim=-1)

    def preprocess(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return (B, 3, H, W) of 0 to 1 as the model reads them: resized, centre-cropped, normalised, on its device."""
        x = pictures.to(self.model.device, torch.float32)
        height, width = x.shape[-2:]
        if self.shortest is None:
            size = self.exact
        elif height <= width:
            size = self.shortest, int(self.shortest * width / height)
        else:
            size = int(self.shortest * height / width), self.shortest
        if size != (height, width):
            x = interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        if self.crop is not None:
            top, left = (max(0, (a - b) // 2) for a, b in zip(x.shape[-2:], self.crop, strict=True))
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (x - self.mean.to(x.device)) / self.std.to(x.device)


class _TextHead:
    """The text half of a CLIPModel, called as a text model is; its output is the projected embedding."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config.text_config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        pooled = self.model.text_model(input_ids=ids, attention_mask=attention_mask).pooler_output
        return (self.model.text_projection(pooled),)


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None]
