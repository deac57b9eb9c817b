"""A model put together of parts: some of other models, some with fresh weights; checked as one, without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.components import folder as folders
from genkit.components.info import ModelInfo, Part
from genkit.components.registry import COMPONENTS, NETWORKS, REQUIRED
from genkit.components.rules import check_config
from genkit.components.tokenizer import check_tokenizer
from genkit.errors import InputError, nearest, shown
from genkit.files import place

TEXT_HALF = "text_model."  # of a CLIPModel's weights: those of its CLIPTextModel


def compose_model(
    kind: str, base: str | None, networks: Mapping[Any, str | dict[str, Any]], scheduler: Mapping[str, Any] | None
) -> ModelInfo:
    """Return a model of `kind` (see ModelInfo, or "autoencoder") with `base`'s parts, and `networks` in their place.

    networks: name -> a folder that is such a network, a model that has one (of a CLIP model, its text half is a
    text_encoder), or a config: fresh weights, and keys that it does not state as in `base`. Parts with fresh weights
    have no files. Raises InputError as `inspect_model` does, and for parts that are missing or do not fit together.
    """
    start = None if base is None else folders.inspect_model(base)
    if start is not None and start.kind != kind and not (kind == "autoencoder" and "vae" in start.parts):
        raise InputError(f"model: {base} is a model of kind {start.kind}, not {kind}")
    parts = dict(start.parts) if start is not None else {}
    tokenizer = start.tokenizer if start is not None else None
    preprocessor = start.preprocessor if start is not None else {}
    for name, value in networks.items():
        where = f"networks.{name}"
        if name == "tokenizer":
            tokenizer = _tokenizer(value, where)
        elif isinstance(value, str):
            parts[name] = _stored(name, value, where)
            if name == "clip":
                preprocessor = folders.inspect_model(value).preprocessor
        else:
            parts[name] = _fresh(name, kind, value, parts.get(name), where)
    wanted = {**REQUIRED, "clip": ("clip",), "autoencoder": ("vae",)}[kind]
    for name in wanted:
        if name not in parts and name != "tokenizer":
            raise InputError(f"networks.{name}: is missing, which a model of kind {kind} needs")
    if kind in REQUIRED:
        folders.check_together(kind, {name: (p.folder, p.kind, dict(p.config)) for name, p in parts.items()})
        if scheduler is None and start is None:
            raise InputError("scheduler: is missing: a new model has none to go by")
    text = parts["text_encoder"].config if "text_encoder" in parts else None
    text = parts["clip"].config["text_config"] if kind == "clip" else text
    if text is not None and kind != "autoencoder":
        if tokenizer is None:
            raise InputError("networks.tokenizer: is missing: a folder, or the name of a model that has one")
        check_tokenizer(tokenizer, text["vocab_size"], "text_encoder")
    if kind == "clip" and not preprocessor:
        side = parts["clip"].config["vision_config"]["image_size"]
        preprocessor = {"size": {"height": side, "width": side}, "do_center_crop": False}
        preprocessor |= {key: [0.5, 0.5, 0.5] for key in ("image_mean", "image_std")}
    if kind == "autoencoder":
        parts, tokenizer = {"vae": parts["vae"]}, None
    made = start or ModelInfo(name="recipe", folder=Path("recipe"), kind=kind, parts={})
    config = dict(scheduler) if scheduler is not None else made.scheduler_config
    return dataclasses.replace(
        made, kind=kind, parts=parts, tokenizer=tokenizer, preprocessor=preprocessor, scheduler_config=config
    )


def _fresh(name: str, kind: str, config: Mapping[str, Any], old: Part | None, where: str) -> Part:
    """Return a part with the config given, over `old`'s, and no weights yet."""
    classes = ("CLIPModel",) if name == "clip" else COMPONENTS[name][1]
    usual = classes[-1] if name == "unet" and kind == "text-to-image" else classes[0]
    cls = config.get("_class_name", usual if old is None else old.kind)
    if cls not in classes:
        raise InputError(f"{where}: _class_name: {shown(cls)} is not {' or '.join(classes)}{nearest(cls, classes)}")
    merged = {**(old.config if old is not None and old.kind == cls else {}), **config}
    network = NETWORKS[cls]
    checked = check_config(merged, network.table, where, network.unused)
    for key, (table, unused) in network.nested.items():
        checked[key] = check_config(checked.get(key) or {}, table, f"{where}.{key}", unused)
        checked.pop(f"{key}_dict", None)
    network.check(checked, where)
    return Part(name, cls, Path(where), checked, (), {})


def _stored(name: str, value: str, where: str) -> Part:
    path = Path(value)
    if (path / "config.json").is_file() and not (path / "tokenizer.json").exists() and name != "clip":
        return folders.inspect_network(path, name)
    found = folders.inspect_model(value).parts
    if name in found:
        return found[name]
    if name != "text_encoder" or "clip" not in found:
        raise InputError(f"{where}: {shown(value)} has no {name}; it has {', '.join(found)}")
    clip = found["clip"]
    tensors = {key.removeprefix(TEXT_HALF): tensor for key, tensor in clip.tensors.items() if key.startswith(TEXT_HALF)}
    return Part(name, "CLIPTextModel", clip.folder, dict(clip.config["text_config"]), clip.files, tensors)


def _tokenizer(value: Any, where: str) -> Path:
    if not isinstance(value, str):
        raise InputError(f"{where}: {shown(value)} is not a folder, nor the name of a model")
    if any((Path(value) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return Path(value)
    found = folders.inspect_model(value).tokenizer
    if found is None:
        raise InputError(f"{where}: {place(value)} has no tokenizer")
    return found
