"""The conditioning of a row at each network call: embeddings of one length for all of its prompts, and weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from genkit.components.chunks import Prompt
from genkit.errors import InputError
from genkit.rows.prompting import Script, scripted
from genkit.rows.request import Request
from genkit.rows.sdxl import texts_of

Pair = tuple[Prompt, Prompt]  # of the first and of the second text encoder; models with one read either
Texts = tuple[tuple[int, Pair], ...]  # (first call, text from that call on)
Embedded = tuple[torch.Tensor, torch.Tensor | None]  # (tokens, width), and SDXL's added conditioning
MOST = 64  # times the shortest embedding: the least common multiple of many lengths is large


def read_prompts(request: Request, steps: int, calls: int, skip: int) -> tuple[list[tuple[float, Texts]], Texts]:
    """Return (weight, texts) of each prompt of a row, and the texts of its negative prompt. skip: as in Prompt.

    steps: of the sampler; calls: of the network. Raises InputError for a prompt that cannot be read.
    """
    if request.syntax != "a1111":
        firsts, seconds = texts_of(request)
        with_prompt, without = (
            (Prompt(one, skip=skip), Prompt(two, skip=skip)) for one, two in zip(firsts, seconds, strict=True)
        )
        return [(1.0, ((0, with_prompt),))], ((0, without),)

    def pairs(texts: Any, name: str) -> Texts:
        return tuple((first, (Prompt(name, chunks, skip),) * 2) for first, chunks in texts)

    script: Script = scripted(request.prompt, request.negative_prompt, steps, calls)
    prompts = [(weight, pairs(texts, request.prompt)) for weight, texts in script.prompts]
    return prompts, pairs(script.negative, request.negative_prompt)


def distinct(prompts: Sequence[tuple[float, Texts]], negative: Texts) -> list[Pair]:
    """Return each text of a row once."""
    return list(dict.fromkeys(pair for texts in (*(texts for _, texts in prompts), negative) for _, pair in texts))


def sized(
    prompts: Sequence[tuple[float, Texts]], negative: Texts, found: Mapping[Pair, tuple[torch.Tensor, torch.Tensor]],
    ids: Sequence[Sequence[float]], empty: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return `conditioned` for SDXL. found: embedding and pooled embedding of each text; ids: time_ids with a prompt
    and without; empty: the negative prompt is zeros.
    """

    def embedded(pair: Pair, own: Sequence[float], blank: bool = False) -> Embedded:
        tokens, vector = (torch.zeros_like(part) if blank else part for part in found[pair])
        return tokens, torch.cat([vector, vector.new_tensor(own)])

    return conditioned(
        prompts, negative, lambda pair: embedded(pair, ids[0]), lambda pair: embedded(pair, ids[1], empty)
    )


def conditioned(
    prompts: Sequence[tuple[float, Texts]], negative: Texts, with_prompt: Callable[[Pair], Embedded],
    without: Callable[[Pair], Embedded],
) -> dict[str, Any]:  # fmt: skip
    """Return the conditioning fields of a Trajectory: cond, uncond, added_cond, added_uncond, weight, more, changes.

    with_prompt, without: return the embedding of a text as a prompt, and as a negative prompt. Shorter embeddings are
    repeated to the length common to all of the row, which does not change the output of attention. Raises InputError
    where the common length would be more than MOST times the shortest.
    """
    sides = [(with_prompt, texts) for _, texts in prompts] + [(without, negative)]
    embedded = [{pair: embed(pair) for _, pair in texts} for embed, texts in sides]
    lengths = {len(tokens) for side in embedded for tokens, _ in side.values()}
    common = math.lcm(*lengths)
    if common > MOST * min(lengths):
        raise InputError(f"prompt: its parts take {', '.join(map(str, sorted(lengths)))} tokens, too many lengths")
    if len(lengths) > 1:
        embedded = [
            {pair: (tokens.repeat(common // len(tokens), 1), added) for pair, (tokens, added) in side.items()}
            for side in embedded
        ]

    def at(call: int) -> dict[str, Any]:
        found = [
            side[next(pair for first, pair in reversed(texts) if first <= call)]
            for side, (_, texts) in zip(embedded, sides, strict=True)
        ]
        others = zip(prompts[1:], found[1:-1], strict=True)
        return {
            "cond": found[0][0], "added_cond": found[0][1], "uncond": found[-1][0], "added_uncond": found[-1][1],
            "weight": prompts[0][0], "more": tuple((weight, *one) for (weight, _), one in others),
        }  # fmt: skip

    begin, *later = sorted({first for _, texts in sides for first, _ in texts})
    return {**at(begin), "changes": {call: at(call) for call in later}}
