"""Options of the command line: those that commands share, and dataclasses spread out into options of their own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from genkit.errors import InputError, nearest
from genkit.options import Options


def _help(field: str) -> str:
    return typing.get_type_hints(Options, include_extras=True)[field].__metadata__[0]


Out = Annotated[Path, typer.Option("-o", "--out", help="The run folder; an existing run is continued.")]
Workers = Annotated[
    str | None,
    typer.Option(help="Number of worker processes, each with its own GPU or share of the cores: 4, or 4:64 to scale."),
]
NewRun = Annotated[bool, typer.Option("--new-run", help="Start a new run beside RUN: RUN-2, RUN-3, …")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; draw nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")]
Clip = Annotated[str, typer.Option(help="emoji-clip, a folder with a CLIPModel or SiglipModel, or a hub id.")]
Labels = Annotated[str | None, typer.Option(help="a,b,c: texts for zero-shot classification.")]
Device = Annotated[str, typer.Option(help=_help("device"))]
Dtype = Annotated[str, typer.Option(help=_help("dtype"))]
Variant = Annotated[str | None, typer.Option(help=_help("variant"))]
Vae = Annotated[str | None, typer.Option(help=_help("vae"))]
TextEncoder = Annotated[str | None, typer.Option(help=_help("text_encoder"))]
Prediction = Annotated[str, typer.Option(help=_help("prediction"))]
Aesthetic = Annotated[str | None, typer.Option(help=_help("aesthetic"))]
Embeddings = Annotated[list[str] | None, typer.Option("--embedding", help=_help("embeddings"))]
Scorers = Annotated[list[str] | None, typer.Option("--scorer", help=_help("scorers"))]


def _slots(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 4096 and len(text) < 9):
        raise InputError(f"--batch-size: {text!r} is not auto or a number from 1 to 4096{nearest(text, ['auto'])}")
    return int(text)


# Sections of the help; options that are not listed are in the last one.
_SECTIONS = {
    "What is drawn": (
        "model vae text_encoder prediction embeddings embedding_dir refiner refiner_start variant"
        " negative_prompt prompt_2 negative_prompt_2 syntax wildcards lora_dir expansions clip_skip scheduler"
        " num_inference_steps guidance_scale guidance_interval width height original_size crop target_size image"
        " strength mask_image mask mask_threshold mask_grow mask_invert segmenter loras controls"
        " control_image control_preprocess control_dir num_images seed from_images"
    ),
    "Which pictures are kept": (
        "keep gate rank_by max_images labels detect ask clip detector classifier captioner aesthetic scorers diverse"
        " dedupe reference"
    ),
    "How it runs": "",
}


def _section(field: str) -> str:
    return next(title for title, fields in _SECTIONS.items() if field in fields.split() or not fields)


# Fields that the command line writes in another form: its annotation and default, and how it is read.
_WRITTEN: dict[str, tuple[Any, Any, Callable[[Any], Any]]] = {
    "batch_size": (Annotated[str, typer.Option(help=_help("batch_size"))], "auto", _slots),
    "scorers": (Scorers, None, lambda names: tuple(names or ())),
    "embeddings": (Embeddings, None, lambda files: tuple(files or ())),
}


def spread(command: Callable[..., int] | None = None, *, without: Collection[str] = ()) -> Any:
    """Turn each parameter whose type is a dataclass into one option a field, and build the dataclass from them.

    A field's annotation is a typer.Option, or the text of its help; a field without either, and one named in `without`,
    is left at its default.
    """
    if command is None:
        return functools.partial(spread, without=without)
    signature, hints = inspect.signature(command), typing.get_type_hints(command, include_extras=True)
    options: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            options += _fields(hints[name], without)
        else:
            options.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(command)
    def called(**values: Any) -> int:
        given = {name: _build(kind, values, without) for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
        return command(**values, **given)

    called.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    called.__annotations__ = {option.name: option.annotation for option in options}
    return called


def _fields(kind: Any, without: Collection[str]) -> list[inspect.Parameter]:
    found: list[inspect.Parameter] = []
    for field, hint in _options_of(kind, without):
        if dataclasses.is_dataclass(hint):
            found += _fields(hint, without)
            continue
        default = field.default
        if field.name in _WRITTEN:
            hint, default, _ = _WRITTEN[field.name]
        elif isinstance(hint.__metadata__[0], str):
            flags = [f"--{field.name.replace('_', '-')}"] if hint.__origin__ is bool else []  # and no --no-… beside it
            hint = Annotated[hint.__origin__, typer.Option(*flags, help=hint.__metadata__[0])]
        hint.__metadata__[0].rich_help_panel = _section(field.name)
        found.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    return found


def _build(kind: Any, values: dict[str, Any], without: Collection[str]) -> Any:
    """Return the dataclass, its fields taken out of `values`."""
    found = {}
    for field, hint in _options_of(kind, without):
        if dataclasses.is_dataclass(hint):
            found[field.name] = _build(hint, values, without)
        else:
            value = values.pop(field.name)
            found[field.name] = _WRITTEN[field.name][2](value) if field.name in _WRITTEN else value
    return kind(**found)


def _options_of(kind: Any, without: Collection[str]) -> list[tuple[Any, Any]]:
    """Return (field, its type with annotation) of the fields that are options, or dataclasses of such."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = [(field, hints[field.name]) for field in dataclasses.fields(kind) if field.name not in without]
    return [(field, hint) for field, hint in fields if hasattr(hint, "__metadata__") or dataclasses.is_dataclass(hint)]


def stated(ctx: Any, name: str) -> bool:
    """Whether a parameter was given on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_idle(ctx: Any, needed: str, *names: str) -> None:
    """Raise InputError for an option that was given without the option `needed`, and has no effect without it."""
    for name in names:
        if stated(ctx, name):
            raise InputError(f"--{name}: has no effect without --{needed}")


def given_model(ctx: Any, options: Options) -> str | None:
    """Return --model if it was given, else None: the model is then the one that pictures name."""
    return options.model if stated(ctx, "model") else None
