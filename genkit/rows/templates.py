"""Rows that templates stand for: wildcards and choices drawn, tags of LoRAs taken out of the prompt."""

from __future__ import annotations

import functools
import hashlib
import itertools
from pathlib import Path
from typing import Any

from genkit.errors import InputError
from genkit.rows.loras import find_lora
from genkit.rows.prompting import PROMPTS, within
from genkit.rows.request import Request
from genkit.rows.syntax import lora_tags
from genkit.rows.wildcards import combinations, expand

MAX_EXPANDED = 1_000_000  # rows of one template


def expanded(row: Request, seed: int, wildcards: Path | None = None, lora_dir: Path | None = None) -> list[Request]:
    """Return the rows that a row's template stands for; a row of plain text, or one expanded before, is its only one.

    Choices depend on the row's id and on its seed or that of the run, not on other rows. Several rows of a template
    have the ids id-1, id-2, …, and go on counting the seed where the row states one. Raises InputError.
    """
    if row.syntax != "a1111":
        if row.expansions is not None:
            raise InputError('expansions: texts of a template are drawn with syntax "a1111" only')
        return [row]
    if row.template is not None:
        return [row]
    for field in ("prompt_2", "negative_prompt_2"):
        if getattr(row, field):
            raise InputError(f'{field}: does not go with syntax "a1111", whose prompts are for both text encoders')
    written = {name: getattr(row, name) for name in PROMPTS if getattr(row, name)}
    choices = [
        within(name, functools.partial(combinations, getattr(row, name), wildcards, MAX_EXPANDED)) for name in PROMPTS
    ]
    count = len(choices[0]) * len(choices[1]) * (row.expansions or 1)
    if count > MAX_EXPANDED:
        raise InputError(f"prompt: its combinations and expansions are {count:,} rows, more than {MAX_EXPANDED:,}")
    rows, digits = [], len(str(count))
    pairs = [pair for pair in itertools.product(*choices) for _ in range(row.expansions or 1)]
    for number, texts in enumerate(pairs):
        base = f"{seed if row.seed is None else row.seed}/{row.id}/{number}"
        prompt, negative = (
            within(name, functools.partial(expand, text, _seed(f"{base}/{name}"), wildcards))
            for name, text in zip(PROMPTS, texts, strict=True)
        )
        fields = {name: getattr(row, name) for name in row.model_fields_set}
        fields |= _resolved(prompt, negative, row.loras, lora_dir) | {"expansions": None, "template": written}
        if count > 1:
            fields["id"] = f"{row.id}-{number + 1:0{digits}}"
            if isinstance(row.seed, int):
                fields["seed"] = (row.seed + number * (row.max_images or row.num_images)) % 2**32
        rows.append(Request(**fields))
        rows[-1]._source = row.source
    return rows


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _resolved(prompt: str, negative: str, loras: Any, lora_dir: Path | None) -> dict[str, Any]:
    """Return prompt, negative_prompt and loras with the prompt's tags taken out. Raises InputError."""
    prompt, tags = within("prompt", lambda: lora_tags(prompt))
    _, wrong = within("negative_prompt", lambda: lora_tags(negative))
    if wrong:
        raise InputError(
            f"negative_prompt: <lora:{wrong[0][0]}>: LoRAs are named in the prompt; a negative weight is one"
        )
    found = list(loras or ())
    for name, weight, text_weight in tags:
        file = within("prompt", functools.partial(find_lora, lora_dir, name))
        found.append({"file": str(file), "weight": weight, "text_weight": text_weight})
    return {"prompt": prompt.strip(), "negative_prompt": negative, "loras": found or None}
