"""How the prompts of a row are read: as plain text, or in the syntax of AUTOMATIC1111; the text of each call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, field_validator

from genkit.errors import InputError, nearest, shown
from genkit.rows.syntax import composed, scheduled, weighted

if TYPE_CHECKING:
    from genkit.components.chunks import Chunks

SYNTAXES = ("none", "a1111")
FIELDS = ("syntax", "clip_skip")  # of those below, what determines pixels
PROMPTS = ("prompt", "negative_prompt")


class Prompting(BaseModel):
    """The fields of a row that say how its prompts are read.

    template: the prompts as they were written, in a row whose wildcards and tags are resolved. clip_skip: the layer of
    the text encoder, counted from the last, which is 1. expansions: how many texts of a template are drawn, each a row.
    """

    syntax: str | None = None
    clip_skip: Annotated[int, Field(ge=1, le=100)] | None = None
    expansions: Annotated[int, Field(ge=1, le=100_000)] | None = None
    template: dict[str, str] | None = None

    @field_validator("syntax")
    @classmethod
    def _check_syntax(cls, value: str | None) -> str | None:
        if value is not None and value not in SYNTAXES:
            raise ValueError(f"is no syntax{nearest(value, SYNTAXES)}; there are {', '.join(SYNTAXES)}")
        return value

    @field_validator("template")
    @classmethod
    def _check_template(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name in value or ():
            if name not in PROMPTS:
                raise ValueError(f"has no {shown(name)}{nearest(name, PROMPTS)}; it holds prompts as they were written")
        return value


@dataclasses.dataclass(frozen=True)
class Script:
    """What the network reads: (weight, texts) of each prompt joined by AND, and the texts of the negative prompt.

    Texts are [(first call, chunks), …], the first at call 0.
    """

    prompts: tuple[tuple[float, tuple[tuple[int, Chunks], ...]], ...]
    negative: tuple[tuple[int, Chunks], ...]


def within(field: str, read: Callable[[], Any]) -> Any:
    """Return what `read` returns; an InputError of it names the field."""
    try:
        return read()
    except InputError as error:
        raise InputError(f"{field}: {error}") from None


@functools.lru_cache(256)
def scripted(prompt: str, negative: str, steps: int, calls: int) -> Script:
    """Return what each call of the network reads of two prompts. steps: of the sampler; calls: of the network.

    Raises InputError naming the prompt that cannot be read.
    """
    parts = within("prompt", lambda: composed(prompt))
    return Script(
        tuple((weight, within("prompt", functools.partial(_texts, text, steps, calls))) for text, weight in parts),
        within("negative_prompt", lambda: _texts(negative, steps, calls)),
    )


def _texts(text: str, steps: int, calls: int) -> tuple[tuple[int, Chunks], ...]:
    """Return [(first call, chunks), …] of a text with prompt editing; solvers that call twice a step edit by steps."""
    found: list[tuple[int, Chunks]] = []
    first = 0
    for last, current in scheduled(text, steps):
        after = -(-last * calls // steps)  # the first call that no longer belongs to step `last`
        if after > first:
            chunks = tuple(tuple(chunk) for chunk in weighted(current))
            if not found or found[-1][1] != chunks:
                found.append((first, chunks))
            first = after
    return tuple(found)


@functools.lru_cache(4096)
def plain(prompt: str) -> str:
    """Return a prompt without its syntax, as it reads at the end: what scores compare a picture with."""
    script = scripted(prompt, "", 1, 1)
    texts = (" ".join("".join(text for text, _ in chunk) for chunk in texts[-1][1]) for _, texts in script.prompts)
    return ", ".join(" ".join(text.split()) for text in texts)


def check_prompting(row: Any, layers: int | None) -> None:
    """Raise InputError for prompts that cannot be read, or a clip_skip beyond the text encoder's number of `layers`."""
    if row.syntax == "a1111":
        scripted(row.prompt, row.negative_prompt, row.num_inference_steps or 1, row.num_inference_steps or 1)
    if row.clip_skip is not None and (layers is None or row.clip_skip > layers):
        has = "this model has no text encoder" if layers is None else f"the model's text encoder has {layers} layers"
        raise InputError(f"clip_skip: {row.clip_skip}: {has}")
