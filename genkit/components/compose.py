"""A model of components from several models, or with fresh weights, checked as a whole without loading anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.components.checks import check_network, check_together
from genkit.components.folder import inspect_model, inspect_network
from genkit.components.geometry import Geometry
from genkit.components.info import ModelInfo, Part
from genkit.components.registry import COMPONENTS, REQUIRED
from genkit.components.tokenizer import check_tokenizer
from genkit.errors import InputError, nearest, shown
from genkit.files import place

TEXT_MODEL = "text_model."  # prefix, in a CLIPModel, of the weights of a CLIPTextModel


def compose_model(
    kind: str, base: str | None, networks: Mapping[Any, str | dict[str, Any]], scheduler: Mapping[str, Any] | None
) -> ModelInfo:
    """Return a model of `kind` (of ModelInfo, or "autoencoder"): the components of `base`, replaced by `networks`.

    networks: component -> the folder of a network, or the name of a model to take it from (text_encoder: also the text
    model of a CLIP model), or a config for fresh weights, whose missing keys are those of `base`. Parts with fresh
    weights have no files. Raises InputError as `inspect_model` does, and for components that are missing or do not fit.
    """
    start = None if base is None else inspect_model(base)
    if start is not None and start.kind != kind and not (kind == "autoencoder" and "vae" in start.parts):
        raise InputError(f"model: {base} is a model of kind {start.kind}, not {kind}")
    model = start or ModelInfo(name="recipe", folder=Path("recipe"), kind=kind, parts={})
    parts, tokenizer, preprocessor = dict(model.parts), model.tokenizer, model.preprocessor
    for name, value in networks.items():
        where = f"networks.{name}"
        if name == "tokenizer":
            tokenizer = _tokenizer(value, where)
        elif isinstance(value, str):
            parts[name] = _stored(name, value, where)
            if name == "clip":
                preprocessor = inspect_model(value).preprocessor
        else:
            parts[name] = _fresh(name, kind, value, parts.get(name), where)
    for name in {**REQUIRED, "clip": ("clip",), "autoencoder": ("vae",)}[kind]:
        if name not in parts and name != "tokenizer":
            raise InputError(f"networks.{name}: is missing, which a model of kind {kind} needs")
    if kind in REQUIRED:
        check_together(kind, parts)
        if Geometry.of(parts["unet"].config, parts["vae"].config if "vae" in parts else None).inpaints:
            raise InputError(f"{parts['unet'].where}: is made for inpainting, which cannot be trained")
        if scheduler is None and start is None:
            raise InputError("scheduler: is missing: a new model has none to go by")
    if kind == "autoencoder":
        parts, tokenizer = {"vae": parts["vae"]}, None
    if kind == "clip" and parts["clip"].kind != "CLIPModel":
        raise InputError(f"{parts['clip'].where}: {parts['clip'].kind} cannot be trained; a CLIPModel can")
    if kind == "clip" and not preprocessor:
        side = parts["clip"].config["vision_config"]["image_size"]
        preprocessor = {"size": {"height": side, "width": side}, "do_center_crop": False}
        preprocessor |= {key: [0.5, 0.5, 0.5] for key in ("image_mean", "image_std")}
    config = dict(scheduler) if scheduler is not None else model.scheduler_config
    model = dataclasses.replace(
        model, kind=kind, parts=parts, tokenizer=tokenizer, preprocessor=preprocessor, scheduler_config=config
    )
    if model.text_config:
        if tokenizer is None:
            raise InputError("networks.tokenizer: is missing: a folder, or the name of a model that has one")
        check_tokenizer(tokenizer, model.text_config, "text_encoder")
    return model


def _fresh(name: str, kind: str, config: Mapping[str, Any], old: Part | None, where: str) -> Part:
    """Return a part without files, whose config is that of `old` updated with `config`."""
    classes = ("CLIPModel",) if name == "clip" else COMPONENTS[name][1]
    usual = classes[-1] if name == "unet" and kind == "text-to-image" else classes[0]
    cls = config.get("_class_name", usual if old is None else old.kind)
    if cls not in classes:
        raise InputError(f"{where}: _class_name: {shown(cls)} is not {' or '.join(classes)}{nearest(cls, classes)}")
    merged = {**(old.config if old is not None and old.kind == cls else {}), **config}
    return Part(name, cls, Path(where), check_network(cls, merged, where, inner="."))


def _stored(name: str, value: str, where: str) -> Part:
    """Return the component `name` with stored weights from a folder or a model."""
    path = Path(value)
    if (path / "config.json").is_file() and not (path / "tokenizer.json").exists() and name != "clip":
        return inspect_network(path, name)
    found = inspect_model(value).parts
    if name in found:
        return found[name]
    if name != "text_encoder" or "clip" not in found or found["clip"].kind != "CLIPModel":
        raise InputError(f"{where}: {shown(value)} has no {name}; it has {', '.join(found)}")
    clip = found["clip"]
    tensors = {key.removeprefix(TEXT_MODEL): t for key, t in clip.tensors.items() if key.startswith(TEXT_MODEL)}
    return Part(name, "CLIPTextModel", clip.folder, dict(clip.config["text_config"]), clip.files, tensors)


def _tokenizer(value: Any, where: str) -> Path:
    """Return the folder of a tokenizer, itself or that of a model."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {shown(value)} is not a folder, nor the name of a model")
    if any((Path(value) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return Path(value)
    found = inspect_model(value).tokenizer
    if found is None:
        raise InputError(f"{where}: {place(value)} has no tokenizer")
    return found
