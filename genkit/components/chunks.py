"""Weighted prompts of any length as tokens: chunks of the length that a text encoder reads, as AUTOMATIC1111 cuts them.

What is between BREAKs begins a chunk of its own. A chunk that is full ends at its last comma, if that is near, so that
a phrase is not torn apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from genkit.errors import InputError

BACKTRACK = 20  # tokens from the end of a chunk within which a comma ends it
MAX_CHUNKS = 16

Chunks = tuple[tuple[tuple[str, float], ...], ...]  # (text, weight) pieces of each part between BREAKs


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text as a text encoder reads it: cut at the model's length, or, with `chunks`, weighted and of any length.

    skip: the layer that is read, counted from the last, which is 1; 0 is the model's own.
    """

    text: str
    chunks: Chunks | None = None
    skip: int = 0


def tokenized(
    tokenizer: Any, prompt: Prompt, expand: Callable[[Any, Iterable[str]], list[str]]
) -> list[tuple[list[int], list[int], list[float]]]:
    """Return (ids, mask, weights) of each chunk of a weighted prompt, each as long as the model reads.

    expand: writes out learned words. Raises InputError for more than MAX_CHUNKS.
    """
    assert prompt.chunks is not None
    length = tokenizer.model_max_length
    ids = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    parts = []
    for pieces in prompt.chunks:
        texts = expand(tokenizer, [text for text, _ in pieces])
        parts.append(
            [(token, weight) for text, (_, weight) in zip(texts, pieces, strict=True) if text for token in ids(text)]
        )
    chunks = cut(parts, length - 2, ids(",")[-1])
    if len(chunks) > MAX_CHUNKS:
        raise InputError(f"prompt: takes {len(chunks)} chunks of {length - 2} tokens, more than {MAX_CHUNKS}")
    first, last, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    found = []
    for chunk in chunks:
        rest = length - 2 - len(chunk)
        tokens = [first, *(token for token, _ in chunk), last, *[padding] * rest]
        mask = [1] * (len(chunk) + 2) + [0] * rest
        found.append((tokens, mask, [1.0, *(weight for _, weight in chunk), *[1.0] * (rest + 1)]))
    return found


def cut(parts: Sequence[Sequence[tuple[int, float]]], room: int, comma: int) -> list[list[tuple[int, float]]]:
    """Return the (token, weight) pairs of parts in chunks of at most `room`, each part from a chunk of its own."""
    chunks: list[list[tuple[int, float]]] = []
    for number, part in enumerate(parts, 1):
        chunk: list[tuple[int, float]] = []
        after = 0  # tokens up to the last comma
        for token, weight in part:
            if len(chunk) == room:
                near = after and room - after < BACKTRACK and token != comma
                end = after if near else room
                chunks.append(chunk[:end])
                chunk, after = chunk[end:], 0
            chunk.append((token, weight))
            if token == comma:
                after = len(chunk)
        if chunk or number < len(parts) or not chunks:
            chunks.append(chunk)
    return chunks


def emphasised(layer: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return embeddings (chunks, tokens, width) times their weights (chunks, tokens), each chunk of the same mean.

    AUTOMATIC1111's "Original" emphasis. The mean is that of all values of a chunk; one of 0 is left alone.
    """
    if bool((weights == 1).all()):
        return layer
    wide = layer.float()
    weighted = wide * weights.to(wide)[:, :, None]
    before, after = (values.mean(dim=(1, 2), keepdim=True) for values in (wide, weighted))
    return (weighted * torch.where(after == 0, 1.0, before / after)).to(layer.dtype)
