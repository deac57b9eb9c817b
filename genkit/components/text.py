"""Prompts to embeddings, cached by prompt."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from genkit.device.memory import CLIP_BATCH
from genkit.device.outofmemory import in_parts
from genkit.device.residency import Hold
from genkit.errors import InputError

Weights = tuple[float, ...]
Adapted = Callable[[Weights], contextlib.AbstractContextManager[Any]]
CACHED_PROMPTS = 4096  # 77 x 768 in half precision is 118 kB: half a gigabyte at most


def expand_tokens(tokenizer: Any, prompts: Iterable[str]) -> list[str]:
    """Expand each learned word of several vectors (textual inversion) to all of its tokens, as diffusers does.

    The tokens are <cat>, <cat>_1, <cat>_2, …; a prompt that lists them all already is not changed.
    """
    texts, added = list(prompts), tokenizer.get_added_vocab()
    for word in added:
        if f"{word}_1" in added:
            others = (f"{word}_{i}" for i in itertools.count(1))
            whole = " ".join([word, *itertools.takewhile(added.__contains__, others)])
            alone = re.compile(as_word(word) + rf"(?!_\d|\s+{re.escape(word)}_1)")
            texts = [alone.sub(lambda _, whole=whole: whole, text) for text in texts]  # type: ignore[misc]
    return texts


def as_word(word: str) -> str:
    """Return a regular expression for a learned word that stands alone: not the sks of "asks"."""
    before, after = (r"\b" if re.match(r"\w", character) else "" for character in (word[0], word[-1]))
    return f"{before}{re.escape(word)}{after}"


def _plain(weights: Weights) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


class TextEncoder:
    """A tokenizer and a CLIP text model, with the embeddings of the prompts it has seen.

    truncated: the prompts that had more tokens than the model reads. hold: context manager that keeps the model on the
    device (device/residency.py). batch: prompts a call; halved when memory runs out. adapted: context manager in which
    LoRAs of such weights are applied.
    """

    def __init__(
        self, tokenizer: Any, model: Any, hold: Hold = contextlib.nullcontext, adapted: Adapted = _plain
    ) -> None:
        self.tokenizer, self.model, self.hold = tokenizer, model, hold
        self.batch = CLIP_BATCH
        self.truncated: set[str] = set()
        self.adapted = adapted
        self._seen: OrderedDict[tuple[str, Weights], torch.Tensor] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, texts: Iterable[str], adapters: Weights = ()) -> list[torch.Tensor]:
        """Return an embedding (tokens, width) for each prompt; in RAM if the model does not stay on the device.

        adapters: the weight of each LoRA; zeros at the end say nothing.
        """
        while adapters and not adapters[-1]:
            adapters = adapters[:-1]
        prompts = [(text, adapters) for text in texts]
        new = [p for p in dict.fromkeys(prompts) if p not in self._seen]
        found = {p: self._seen[p] for p in prompts if p in self._seen}
        if new:
            with self.hold(), self.adapted(adapters):
                parts, self.batch = in_parts(
                    len(new), self.batch, lambda part: self._encode([p for p, _ in new[part]]), "prompts"
                )
            guest = self.hold is not contextlib.nullcontext  # not resident: its output makes room, too
            found |= dict(zip(new, (row for part in parts for row in (part.cpu() if guest else part)), strict=True))
        for prompt in found:
            self._seen[prompt] = found[prompt]
            self._seen.move_to_end(prompt)
        while len(self._seen) > CACHED_PROMPTS:
            self._seen.popitem(last=False)
        return [found[p] for p in prompts]

    def forget(self) -> None:
        """Drop the cached embeddings."""
        self._seen.clear()

    def knows(self, prompts: Iterable[str]) -> bool:
        """Whether the embeddings of all these prompts, without LoRAs, are cached."""
        return all((p, ()) in self._seen for p in prompts)

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        length = self.tokenizer.model_max_length
        texts = expand_tokens(self.tokenizer, prompts)
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        full = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        self.truncated.update(p for p, tokens in zip(prompts, full, strict=True) if len(tokens) > length)
        # Without a mask, as Stable Diffusion was trained, unless the text encoder's config asks for one.
        mask = (
            ids.attention_mask.to(self.model.device)
            if getattr(self.model.config, "use_attention_mask", False)
            else None
        )
        return self.model(ids.input_ids.to(self.model.device), attention_mask=mask)[0]


class TextEncoderPair:
    """SDXL's two text encoders: their penultimate layers side by side, and the pooled embedding of the second.

    Podell et al. 2023 (SDXL), section 2.1.
    """

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        self.first, self.second = first, second
        lengths = [encoder.tokenizer.model_max_length for encoder in (first, second)]
        if lengths[0] != lengths[1]:
            raise InputError(f"tokenizer_2: reads {lengths[1]} tokens, but tokenizer reads {lengths[0]}")

    def knows(self, prompts: Iterable[str], others: Iterable[str] | None = None) -> bool:
        """Whether the embeddings of all these prompts, without LoRAs, are cached. others: as in `__call__`."""
        return self.first.knows(prompts) and self.second.knows(prompts if others is None else others)

    @property
    def truncated(self) -> set[str]:
        """The prompts that had more tokens than the models read."""
        return self.first.truncated | self.second.truncated

    def __call__(
        self, prompts: Iterable[str], adapters: Weights = (), others: Iterable[str] | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return for each prompt an embedding (tokens, width) and the pooled embedding (projection,).

        others: the prompts of the second text encoder, if they are not the same.
        """
        prompts = list(prompts)
        others = prompts if others is None else list(others)
        width = self.second.model.config.hidden_size
        found = []
        for one, packed in zip(self.first(prompts, adapters), self.second(others, adapters), strict=True):
            tokens = len(one)
            other, vector = packed[: tokens * width].view(tokens, width), packed[tokens * width :]
            found.append((torch.cat([one, other], dim=-1), vector))
        return found


class Penultimate:
    """A CLIP text model whose output is its penultimate layer, (B, tokens, width).

    pooled: for a model with projection; the output is that layer and the pooled embedding, flattened side by side,
    (B, tokens * width + projection).
    """

    def __init__(self, model: Any, pooled: bool = False) -> None:
        self.model, self.config, self.pooled = model, model.config, pooled

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        out = self.model(ids, attention_mask=attention_mask, output_hidden_states=True)
        layer = out.hidden_states[-2]
        return (torch.cat([layer.flatten(1), out.text_embeds], dim=1) if self.pooled else layer,)
