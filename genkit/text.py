"""Prompts to embeddings, each distinct prompt once."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch

from genkit.memory import CLIP_BATCH
from genkit.outofmemory import in_parts
from genkit.residency import Hold

CACHED_PROMPTS = 4096  # 77 x 768 in half precision is 118 kB: half a gigabyte at the very most


class TextEncoder:
    """A tokenizer and a CLIP text model, with the embeddings of the prompts it has seen.

    `truncated` holds the prompts that were longer than the model reads: their ends had no say in the picture. hold:
    what the model is to be held with while it works (genkit.residency). batch: prompts a call; halves when memory runs
    out.
    """

    def __init__(self, tokenizer: Any, model: Any, hold: Hold = contextlib.nullcontext) -> None:
        self.tokenizer, self.model, self.hold = tokenizer, model, hold
        self.batch = CLIP_BATCH
        self.truncated: set[str] = set()
        self._seen: OrderedDict[str, torch.Tensor] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, prompts: Iterable[str]) -> list[torch.Tensor]:
        """Return an embedding of shape (tokens, width) for each prompt; in RAM where the model is a guest."""
        prompts = list(prompts)
        new = [p for p in dict.fromkeys(prompts) if p not in self._seen]
        found = {p: self._seen[p] for p in prompts if p in self._seen}
        if new:
            with self.hold():
                parts, self.batch = in_parts(len(new), self.batch, lambda part: self._encode(new[part]), "prompts")
            guest = self.hold is not contextlib.nullcontext  # what it made is to leave room as well
            found |= dict(zip(new, (row for part in parts for row in (part.cpu() if guest else part)), strict=True))
        for prompt in found:
            self._seen[prompt] = found[prompt]
            self._seen.move_to_end(prompt)
        while len(self._seen) > CACHED_PROMPTS:
            self._seen.popitem(last=False)
        return [found[p] for p in prompts]

    def knows(self, prompts: Iterable[str]) -> bool:
        """Whether the embeddings of all these prompts are at hand."""
        return all(p in self._seen for p in prompts)

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        full = self.tokenizer(prompts, truncation=False)["input_ids"]
        self.truncated.update(p for p, tokens in zip(prompts, full, strict=True) if len(tokens) > length)
        # As Stable Diffusion was trained: padding takes part, unless the model's config asks for the mask.
        mask = (
            ids.attention_mask.to(self.model.device)
            if getattr(self.model.config, "use_attention_mask", False)
            else None
        )
        return self.model(ids.input_ids.to(self.model.device), attention_mask=mask)[0]
