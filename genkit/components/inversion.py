"""Vectors of textual inversion files as tokens of loaded text encoders and tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from genkit.components.embeddingfile import ENCODERS
from genkit.components.words import Embedding, Words
from genkit.errors import InputError
from genkit.files import place

if TYPE_CHECKING:
    from genkit.components.loading import Components

LEGACY_END = 2  # eos_token_id in the configs of the first CLIP models, which is not the id of the end token


def add_embeddings(
    parts: Components, embeddings: Sequence[Embedding], refused: Mapping[str, str] | None = None
) -> None:
    """Add a token to each tokenizer and a row to each token embedding for every vector; other prompts are unaffected.

    For components that nobody else uses: to be called before a generator is made of them. refused: of Words. Raises
    InputError for a vector that is not finite in the text encoder's precision.
    """
    if not embeddings and not refused:
        return
    words = Words({one.word: one.file.vectors for one in embeddings}, refused)
    for encoder, tokenizer in zip(ENCODERS, ("tokenizer", "tokenizer_2"), strict=True):
        if getattr(parts, encoder) is not None:
            _add(getattr(parts, encoder), getattr(parts, tokenizer), encoder, embeddings, words)


def _add(network: Any, tokenizer: Any, encoder: str, embeddings: Sequence[Embedding], words: Words) -> None:
    from transformers import AddedToken

    tokens = [token for one in embeddings for token in words.tokens[one.word]]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    tokenizer.words = words
    if not tokens:
        return
    table = network.get_input_embeddings().weight
    rows = []
    for one in embeddings:
        row = torch.from_numpy(one.file.values[encoder].copy()).to(table.dtype)
        if not bool(torch.isfinite(row).all()):
            kind = str(table.dtype).removeprefix("torch.")
            raise InputError(
                f"{place(one.file.path)}: holds values that {kind} does not have: --dtype float32 has them"
            )
        rows.append(row)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    longer = table.new_zeros(max(len(table), max(ids) + 1), table.shape[1])
    longer[: len(table)] = table
    longer[ids] = torch.cat(rows).to(table.device)
    longer = longer.pin_memory() if table.is_pinned() else longer
    network.set_input_embeddings(torch.nn.Embedding.from_pretrained(longer, freeze=True))
    network.config.vocab_size = len(longer)
    inner = getattr(network, "text_model", network)
    if getattr(inner, "eos_token_id", None) == LEGACY_END:
        # With it transformers takes the highest id of a prompt as the end token, and new tokens have higher ids
        inner.eos_token_id = tokenizer.eos_token_id
