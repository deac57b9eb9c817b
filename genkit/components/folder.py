"""A model's name -> ModelInfo: find the folder, check every file of it, load nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.components.hub import fetch_configs, fetch_weights, is_hub_id
from genkit.components.info import ModelInfo, Part
from genkit.components.preprocessor import read_preprocessor
from genkit.components.registry import COMPONENTS, EXTRAS, INDEX_OPTIONS, NETWORKS, PIPELINES, REQUIRED, SECOND
from genkit.components.rules import check_config, refuse_code
from genkit.components.tokenizer import check_tokenizer
from genkit.components.weights import CONVERT, PICKLES, canonical_tensors, check_shapes, find_weights, wanted_weights
from genkit.errors import InputError, nearest, shown
from genkit.files import place, read_json

EMBEDDED = Path(__file__).parent / "embedded"
# Steps and guidance that suit an embedded model; others go by the field's habits (genkit.rows.settings).
DEFAULTS: dict[str, dict[str, Any]] = {
    "emoji": {"num_inference_steps": 20, "guidance_scale": 5.0, "tuned_steps": 12},
    "emoji-clip": {},
}


def inspect_model(name: str | Path, *, variant: str | None = None) -> ModelInfo:
    """Check a model without loading it: "emoji", "emoji-clip", a folder, or a hub id "owner/name".

    A folder is laid out as diffusers saves a pipeline, or as transformers saves a CLIPModel. variant: take
    `*.fp16.safetensors` and the like. Weights are judged by their headers. Raises InputError, naming file, key and
    value, for whatever is not as it should be, HostError where the hub cannot be read.
    """
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", variant):
        raise InputError(f"variant: {shown(variant)} is not like 'fp16'")
    folder, on_hub = _locate(name)
    index = folder / "model_index.json"
    if _there(index) or _there(folder / "unet"):
        found = _read_pipeline(folder)
    elif _there(folder / "config.json"):
        found = _read_clip(folder)
    else:
        raise InputError(f"{place(folder)}: holds no model: neither model_index.json nor config.json is there")
    kind, networks, others = found
    if on_hub:
        wanted = (wanted_weights(part, NETWORKS[cls].stem, variant) for part, cls, _ in networks.values())
        fetch_weights(str(name), folder, (path.relative_to(folder).as_posix() for paths in wanted for path in paths))
    return ModelInfo(
        name=str(name),
        folder=folder,
        kind=kind,
        parts={part: _check_weights(part, *network, variant) for part, network in networks.items()},
        defaults={**others.pop("defaults", {}), **(DEFAULTS.get(name, {}) if isinstance(name, str) else {})},
        variant=variant,
        revision=folder.name if on_hub else None,
        **others,
    )


def inspect_network(folder: Path, name: str) -> Part:
    """Check a folder that holds one network alone, as save_pretrained writes it; `name` says which part it is to be.

    Raises InputError as `inspect_model` does.
    """
    stated = read_json(folder / "config.json")
    classes = COMPONENTS[name][1]
    kind = stated.get("_class_name") or (stated.get("architectures") or [classes[0]])[0]
    if kind not in classes:
        raise InputError(f"{place(folder / 'config.json')}: class {shown(kind)} is no {name}: {' or '.join(classes)}")
    return _check_weights(name, folder, kind, _read_config(folder / "config.json", kind), None)


# A network as found: its folder, its class, its checked config.
_Networks = dict[str, tuple[Path, str, dict[str, Any]]]


def _locate(name: str | Path) -> tuple[Path, bool]:
    """Return the folder that `name` means, and whether it came from the hub."""
    text = str(name)
    if isinstance(name, str) and name in DEFAULTS:
        return EMBEDDED / name, False
    if not text or "\0" in text:
        raise InputError(f"model: {shown(text)} is no name: give emoji, a folder, or a hub id")
    path = Path(name)
    if os.path.lexists(path):
        if path.is_dir() and os.access(path, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            return path, False
        if path.suffix in PICKLES:
            raise InputError(f"{place(path)}: is refused: {CONVERT}")
        what = "cannot be read" if path.is_dir() else "is a broken link" if not _exists(path) else "is a file"
        raise InputError(f"{place(path)}: {what}: a model is a folder in diffusers layout")
    if isinstance(name, str) and is_hub_id(name):
        return fetch_configs(name), True
    hint = nearest(text, DEFAULTS)
    raise InputError(f"{place(path)}: there is no such folder, and no model of that name is built in{hint}")


def _read_pipeline(folder: Path) -> tuple[str, _Networks, dict[str, Any]]:
    """Read and cross-check the configs of a diffusers-layout folder."""
    kind, parts, scheduler, options = _read_index(folder)
    networks: _Networks = {}
    for part, cls in parts.items():
        if cls in NETWORKS:
            at = _part_folder(folder, part, "config.json")
            networks[part] = (at, cls, _read_config(at / "config.json", cls))
    check_together(kind, networks)
    others: dict[str, Any] = {"scheduler_config": _read_scheduler(folder, scheduler)}
    if "tokenizer" in parts:
        at, _, text = networks["text_encoder"]
        others["tokenizer"] = folder / "tokenizer"
        checked = check_tokenizer(folder / "tokenizer", text["vocab_size"], place(at / "config.json"))
        length = min(checked["model_max_length"], text["max_position_embeddings"])
    if "tokenizer_2" in parts:
        at, _, text = networks["text_encoder_2"]
        others |= {"tokenizer_2": folder / "tokenizer_2", "zero_empty": options["force_zeros_for_empty_prompt"]}
        others["defaults"] = {"guidance_scale": 5.0}  # SDXL's own
        checked = check_tokenizer(folder / "tokenizer_2", text["vocab_size"], place(at / "config.json"))
        other = min(checked["model_max_length"], text["max_position_embeddings"])
        if other != length:
            raise InputError(f"{place(folder / 'tokenizer_2')}: reads {other} tokens, but tokenizer reads {length}")
    return kind, networks, others


def _read_clip(folder: Path) -> tuple[str, _Networks, dict[str, Any]]:
    path = folder / "config.json"
    config = _read_config(path, "CLIPModel")
    check_tokenizer(folder, config["text_config"]["vocab_size"], f"{place(path)}: text_config")
    preprocessor = read_preprocessor(folder / "preprocessor_config.json", config["vision_config"]["image_size"])
    return "clip", {"clip": (folder, "CLIPModel", config)}, {"tokenizer": folder, "preprocessor": preprocessor}


def _read_index(folder: Path) -> tuple[str, dict[str, str], str | None, dict[str, Any]]:
    """Return (kind, {component: class}, scheduler class, options), by model_index.json or by the folders there are."""
    path = folder / "model_index.json"
    if not _there(path):
        return _guess_index(folder)
    where = place(path)
    index = read_json(path)
    refuse_code(index, where)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise InputError(
            f"{where}: _class_name: class {shown(pipeline)} is not supported; supported: {', '.join(PIPELINES)}"
        )
    kind = PIPELINES[pipeline]
    options = {key: value for key, value in index.items() if key in INDEX_OPTIONS or not isinstance(value, list)}
    known = [*COMPONENTS, "scheduler", *EXTRAS, *INDEX_OPTIONS]
    for key in index.keys() - options.keys() - set(known):
        raise InputError(f"{where}: {shown(key)}: unknown component{nearest(key, known)}")
    checked = check_config(options, INDEX_OPTIONS, where)
    parts = {}
    for key, value in index.items():
        if key in options or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise InputError(f"{where}: {key}: {shown(value)} is not a pair of library and class")
        if key == "scheduler":
            continue  # its class is looked up by genkit.schedulers
        library, classes = (COMPONENTS | EXTRAS)[key]
        if value[0] != library or value[1] not in classes:
            names = ", ".join(classes)
            raise InputError(f"{where}: {key}: class {shown('.'.join(value))} is not supported; supported: {names}")
        if key in COMPONENTS:
            parts[key] = value[1]
    second = SECOND if "XL" in pipeline else ()
    for key in (*REQUIRED[kind], *second):
        if key not in parts:
            raise InputError(f"{where}: {key}: is missing, which a {pipeline} needs")
    for key in SECOND:
        if key in parts and key not in second:
            raise InputError(f"{where}: {key}: does not belong in a {pipeline}")
    return kind, parts, (index.get("scheduler") or [None, None])[1], checked


def _guess_index(folder: Path) -> tuple[str, dict[str, str], str | None, dict[str, Any]]:
    """Return what model_index.json would say of a folder without one."""
    path = folder / "unet" / "config.json"
    cls = read_json(path).get("_class_name")
    if cls not in COMPONENTS["unet"][1]:
        known = ", ".join(COMPONENTS["unet"][1])
        raise InputError(f"{place(path)}: _class_name: class {shown(cls)} is not supported; supported: {known}")
    kind = "unconditional" if cls == "UNet2DModel" else "text-to-image"
    optional = ("vae", *SECOND)
    there = [key for key in COMPONENTS if key in REQUIRED[kind] or (key in optional and _there(folder / key))]
    for one, other in (SECOND, SECOND[::-1]):
        if one in there and other not in there:
            raise InputError(f"{place(folder / other)}: is absent, which {one} needs")
    options = {key: option.default for key, option in INDEX_OPTIONS.items()}
    return kind, {key: cls if key == "unet" else COMPONENTS[key][1][0] for key in there}, None, options


def _part_folder(folder: Path, part: str, file: str) -> Path:
    """Return where a component's files are: in its own folder, or, as in the first DDPM models, beside the index."""
    own = folder / part
    return folder if not _there(own) and _there(folder / file) else own


def _read_config(path: Path, cls: str) -> dict[str, Any]:
    """Return the checked config of a network of class `cls`, defaults filled in."""
    network, where = NETWORKS[cls], place(path)
    raw = read_json(path)
    stated = raw.get("_class_name", cls)
    if stated != cls:
        raise InputError(f"{where}: _class_name: {shown(stated)} is not {cls}, which belongs here")
    config = check_config(raw, network.table, where, network.unused)
    for key, (table, unused) in network.nested.items():
        # Where both spellings are given, transformers goes by the old one.
        given = {
            name: check_config(config[name] or {}, table, f"{where}: {name}", unused) for name in (key, f"{key}_dict")
        }
        config[key] = given[key] if config.pop(f"{key}_dict") is None else given[f"{key}_dict"]
    network.check(config, where)
    return config


def _read_scheduler(folder: Path, cls: str | None) -> dict[str, Any]:
    """Return the scheduler's config with its class in it, once genkit.schedulers has made sense of it."""
    from genkit.schedulers import Scheduler

    path = _part_folder(folder, "scheduler", "scheduler_config.json") / "scheduler_config.json"
    config = read_json(path, infinite=True)  # diffusers writes lambda_min_clipped as -Infinity
    stated = config.setdefault("_class_name", cls)
    if cls is not None and stated != cls:
        raise InputError(f"{place(path)}: _class_name: {shown(stated)}, but model_index.json says {shown(cls)}")
    try:
        Scheduler.from_config(config)
    except InputError as error:
        raise InputError(f"{place(path)}: {error}") from None
    return config


def check_together(kind: str, networks: _Networks) -> None:
    """Refuse networks of which one does not read what the other writes."""
    at, cls, unet = networks["unet"]
    where = place(at / "config.json")
    if (cls == "UNet2DConditionModel") != (kind == "text-to-image"):
        raise InputError(f"{where}: _class_name: {cls} does not belong in a model that is {kind}")
    if "text_encoder" in networks:
        _check_texts(where, unet, networks)
    if "vae" in networks:
        at, _, vae = networks["vae"]
        _same(where, unet, "in_channels", place(at / "config.json"), vae, "latent_channels")
    elif unet["in_channels"] not in (1, 3):
        raise InputError(f"{where}: in_channels: {unet['in_channels']} is not 1 or 3, and there is no vae to decode it")


def _check_texts(where: str, unet: Mapping[str, Any], networks: _Networks) -> None:
    """Refuse a UNet that does not read what its text encoder, or SDXL's two encoders side by side, write."""
    at, _, text = networks["text_encoder"]
    sizes = unet["addition_embed_type"] is not None
    if sizes != ("text_encoder_2" in networks):
        needs = "needs" if sizes else "has no use for"
        raise InputError(f"{where}: addition_embed_type: {unet['addition_embed_type']!r} {needs} a text_encoder_2")
    if not sizes:
        _same(where, unet, "cross_attention_dim", place(at / "config.json"), text, "hidden_size")
        return
    second_at, _, second = networks["text_encoder_2"]
    both = text["hidden_size"] + second["hidden_size"]
    if unet["cross_attention_dim"] != both:
        raise InputError(
            f"{where}: cross_attention_dim: {unet['cross_attention_dim']}, but {place(at / 'config.json')} and "
            f"{place(second_at / 'config.json')} have hidden_size {text['hidden_size']} and {second['hidden_size']}"
        )
    if second["projection_dim"] is None:
        raise InputError(f"{place(second_at / 'config.json')}: projection_dim: None is no width, which SDXL needs")
    added = 6 * unet["addition_time_embed_dim"] + second["projection_dim"]
    if unet["projection_class_embeddings_input_dim"] != added:
        raise InputError(
            f"{where}: projection_class_embeddings_input_dim: {unet['projection_class_embeddings_input_dim']}, but 6 "
            f"times addition_time_embed_dim and projection_dim of {place(second_at / 'config.json')} are {added}"
        )


def _same(
    where: str, one: Mapping[str, Any], key: str, other_where: str, other: Mapping[str, Any], other_key: str
) -> None:
    if one[key] != other[other_key]:
        raise InputError(f"{where}: {key}: {one[key]}, but {other_where} has {other_key} {other[other_key]}")


def _check_weights(name: str, folder: Path, cls: str, config: dict[str, Any], variant: str | None) -> Part:
    network = NETWORKS[cls]
    files = find_weights(folder, network.stem, variant)
    tensors = canonical_tensors(files, network.renames)
    check_shapes(tensors, network.landmarks(config), place(folder / "config.json"), complete=False)
    return Part(name, cls, folder, config, files, tensors)


def _there(path: Path) -> bool:
    return os.path.lexists(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
