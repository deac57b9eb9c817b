"""Prompts to embeddings, cached by prompt."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from genkit.components.chunks import Prompt, emphasised, tokenized
from genkit.components.words import as_word
from genkit.device.memory import CLIP_BATCH
from genkit.device.outofmemory import in_parts
from genkit.device.residency import Hold
from genkit.errors import InputError

Weights = tuple[float, ...]
Adapted = Callable[[Weights], contextlib.AbstractContextManager[Any]]
CACHED_PROMPTS = 4096  # 77 x 768 in half precision is 118 kB: half a gigabyte at most


def expand_tokens(tokenizer: Any, prompts: Iterable[str]) -> list[str]:
    """Expand each learned word of several vectors (textual inversion) to all of its tokens, as diffusers does.

    The tokens are <cat>, <cat>_1, <cat>_2, …; a prompt that lists them all already is not changed. Words of files
    become the tokens that stand for their vectors (`add_embeddings`).
    """
    texts, added = list(prompts), tokenizer.get_added_vocab()
    if (words := getattr(tokenizer, "words", None)) is not None:
        texts = [words.expanded(text) for text in texts]
    for word in added:
        if f"{word}_1" in added:
            others = (f"{word}_{i}" for i in itertools.count(1))
            whole = " ".join([word, *itertools.takewhile(added.__contains__, others)])
            alone = re.compile(as_word(word) + rf"(?!_\d|\s+{re.escape(word)}_1)")
            texts = [alone.sub(lambda _, whole=whole: whole, text) for text in texts]  # type: ignore[misc]
    return texts


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
        self._seen: OrderedDict[tuple[str | Prompt, Weights], torch.Tensor] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, texts: Iterable[str | Prompt], adapters: Weights = ()) -> list[torch.Tensor]:
        """Return an embedding (tokens, width) for each prompt; in RAM if the model does not stay on the device.

        adapters: the weight of each LoRA; trailing zeros may be left out.
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
            guest = (
                self.hold is not contextlib.nullcontext
            )  # a model that leaves the device: its embeddings leave it too
            rows = (row.cpu() if guest else row for part in parts for row in part)
            found |= dict(zip(new, rows, strict=True))
        for prompt in found:
            self._seen[prompt] = found[prompt]
            self._seen.move_to_end(prompt)
        while len(self._seen) > CACHED_PROMPTS:
            self._seen.popitem(last=False)
        return [found[p] for p in prompts]

    def forget(self) -> None:
        """Drop the cached embeddings."""
        self._seen.clear()

    def knows(self, prompts: Iterable[str | Prompt]) -> bool:
        """Whether the embeddings of all these prompts, without LoRAs, are cached."""
        return all((p, ()) in self._seen for p in prompts)

    def _encode(self, prompts: list[str | Prompt]) -> list[torch.Tensor]:
        asked = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
        cut_short = iter(self._cut_short([p.text for p in asked if p.chunks is None]))
        rows: list[tuple[list[int], list[int], list[float]]] = []
        spans = []
        for prompt in asked:
            new = [next(cut_short)] if prompt.chunks is None else tokenized(self.tokenizer, prompt, expand_tokens)
            spans.append(range(len(rows), len(rows) + len(new)))
            rows += new
        ids, mask, weights = (torch.tensor([row[k] for row in rows], device=self.model.device) for k in range(3))
        layers: dict[int, torch.Tensor] = {}
        for skip in dict.fromkeys(p.skip for p in asked):
            at = [i for p, span in zip(asked, spans, strict=True) if p.skip == skip for i in span]
            layers |= dict(zip(at, self._layer(ids[at], mask[at], skip), strict=True))
        return [
            layers[span[0]]
            if prompt.chunks is None
            else self._joined(torch.stack([layers[i] for i in span]), weights[list(span)])
            for prompt, span in zip(asked, spans, strict=True)
        ]

    def _cut_short(self, prompts: list[str]) -> list[tuple[list[int], list[int], list[float]]]:
        """Return (ids, mask, weights of 1) of plain prompts, without what is longer than the model reads."""
        if not prompts:
            return []
        length = self.tokenizer.model_max_length
        texts = expand_tokens(self.tokenizer, prompts)
        found = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True)
        full = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        self.truncated.update(p for p, tokens in zip(prompts, full, strict=True) if len(tokens) > length)
        pairs = zip(found["input_ids"], found["attention_mask"], strict=True)
        return [(ids, mask, [1.0] * length) for ids, mask in pairs]

    def _layer(self, ids: torch.Tensor, mask: torch.Tensor, skip: int) -> torch.Tensor:
        """Return the hidden states, (B, tokens, width), for token ids (B, tokens); skip: the layer, as in `Prompt`."""
        # Without a mask, as Stable Diffusion was trained, unless the text encoder's config asks for one.
        masked = mask if getattr(self.model.config, "use_attention_mask", False) else None
        if not skip:
            return self.model(ids, attention_mask=masked)[0]
        if isinstance(self.model, Penultimate):
            return self.model(ids, attention_mask=masked, skip=skip)[0]
        layer = self.model(ids, attention_mask=masked, output_hidden_states=True).hidden_states[-skip]
        return getattr(self.model, "text_model", self.model).final_layer_norm(layer)

    def _joined(self, chunks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted embeddings of chunks one after the other; of pooled embeddings the first chunk's."""
        if not getattr(self.model, "pooled", False):
            return emphasised(chunks, weights).flatten(0, 1)
        tokens = weights.shape[1] * self.model.config.hidden_size
        layers, pooled = chunks[:, :tokens].view(*weights.shape, -1), chunks[0, tokens:]
        return torch.cat([emphasised(layers, weights).flatten(), pooled])


class TextEncoderPair:
    """SDXL's two text encoders: their penultimate layers side by side, and the pooled embedding of the second.

    Podell et al. 2023 (SDXL), section 2.1.
    """

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        self.first, self.second = first, second
        lengths = [encoder.tokenizer.model_max_length for encoder in (first, second)]
        if lengths[0] != lengths[1]:
            raise InputError(f"tokenizer_2: reads {lengths[1]} tokens, but tokenizer reads {lengths[0]}")

    def knows(self, prompts: Iterable[str | Prompt], others: Iterable[str | Prompt] | None = None) -> bool:
        """Whether the embeddings of all these prompts, without LoRAs, are cached. others: as in `__call__`."""
        return self.first.knows(prompts) and self.second.knows(prompts if others is None else others)

    @property
    def truncated(self) -> set[str]:
        """The prompts that had more tokens than the models read."""
        return self.first.truncated | self.second.truncated

    def __call__(
        self, prompts: Iterable[str | Prompt], adapters: Weights = (), others: Iterable[str | Prompt] | None = None
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


class SecondEncoder:
    """SDXL's second text encoder alone, as its refiner has it: its penultimate layer and its pooled embedding.

    encoder: of a `Penultimate` with `pooled`.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder

    def knows(self, prompts: Iterable[str]) -> bool:
        """Whether the embeddings of all these prompts, without LoRAs, are cached."""
        return self.encoder.knows(prompts)

    @property
    def truncated(self) -> set[str]:
        """The prompts that had more tokens than the model reads."""
        return self.encoder.truncated

    def __call__(self, prompts: Iterable[str], adapters: Weights = ()) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return for each prompt an embedding (tokens, width) and the pooled embedding (projection,)."""
        config = self.encoder.model.config
        width, projection = config.hidden_size, config.projection_dim
        found = self.encoder(prompts, adapters)
        return [(packed[:-projection].view(-1, width), packed[-projection:]) for packed in found]


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

    def __call__(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None, skip: int = 2
    ) -> tuple[torch.Tensor]:
        """skip: which layer to take in place of the penultimate one, counted from the last, which is 1."""
        out = self.model(ids, attention_mask=attention_mask, output_hidden_states=True)
        layer = out.hidden_states[-skip]
        return (torch.cat([layer.flatten(1), out.text_embeds], dim=1) if self.pooled else layer,)
