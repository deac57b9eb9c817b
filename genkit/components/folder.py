"""A model's name to its ModelInfo: find the folder and check every file in it, without loading weights."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from os.path import lexists
from pathlib import Path
from typing import Any

from genkit.components.checks import check_network, check_together
from genkit.components.families import FAMILIES
from genkit.components.hub import fetch_configs, fetch_weights, is_hub_id
from genkit.components.info import ModelInfo, Part
from genkit.components.preprocessor import read_preprocessor
from genkit.components.registry import (
    BESIDE,
    COMPONENTS,
    CORRECTED,
    EXTRAS,
    INDEX_OPTIONS,
    NETWORKS,
    OLD_SIZES,
    PIPELINES,
    REQUIRED,
    SCORERS,
    SECOND,
)
from genkit.components.rules import check_config, refuse_code
from genkit.components.siglip import check_siglip_tokenizer
from genkit.components.single import STEERS, UNET, read_single, read_text_encoder, read_vae
from genkit.components.tokenizer import check_tokenizer
from genkit.components.weights import CONVERT, PICKLES, check_shapes, read_file, read_weights, wanted_weights
from genkit.device.memory import CONTROL, TEXTS
from genkit.errors import InputError, nearest, shown
from genkit.files import place, read_json, read_text, user_path

PREDICTIONS = ("auto", "epsilon", "v_prediction", "sample")
EMBEDDED = Path(__file__).parent / "embedded"
# Steps and guidance of the embedded models; genkit.rows.settings has those of other models.
DEFAULTS: dict[str, dict[str, Any]] = {
    "emoji": {"num_inference_steps": 20, "guidance_scale": 5.0, "tuned_steps": 12},
    "emoji-clip": {},
}


def inspect_model(
    name: str | Path, *, variant: str | None = None, vae: str | None = None, text_encoder: str | None = None,
    prediction: str = "auto",
) -> ModelInfo:  # fmt: skip
    """Check a model without loading it: "emoji", "emoji-clip", a folder, a hub id "owner/name", or a single file.

    A folder has the layout of a diffusers pipeline, or is a CLIPModel as transformers saves it; a file is a checkpoint
    in the original layout of Stable Diffusion. Of weights, only headers are read. variant: "fp16" takes
    `*.fp16.safetensors`. vae, text_encoder: models to take these networks from. prediction: what the UNet predicts,
    where its scheduler's config or file says otherwise or nothing. Raises InputError, naming file, key and value, for
    anything that is missing, malformed or not supported; HostError where the hub cannot be read.
    """
    if prediction not in PREDICTIONS:
        raise InputError(
            f"--prediction: {shown(prediction)} is not {', '.join(PREDICTIONS)}{nearest(prediction, PREDICTIONS)}"
        )
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", variant):
        raise InputError(f"--variant: {shown(variant)} is not like 'fp16'")
    others = functools.partial(_others, vae, text_encoder, variant)
    path = user_path(name) if name and "\0" not in str(name) and name not in DEFAULTS else None
    if path is not None and path.is_file() and path.suffix not in PICKLES:
        notes: list[str] = []
        model = read_single(path, prediction, notes, others)
        return dataclasses.replace(model, name=str(name), variant=variant, notes=tuple(notes))
    model = _inspect_folder(name, variant)
    if prediction != "auto" and model.scheduler_config:
        config = {**model.scheduler_config, "prediction_type": prediction}
        model = dataclasses.replace(model, scheduler_config=config)
    width = model.parts["unet"].config.get("cross_attention_dim") if "unet" in model.parts else None
    replaced = others("SDXL" if "text_encoder_2" in model.parts else FAMILIES.get(width or 0, "SD 1"))
    if replaced:
        model = dataclasses.replace(model, parts={**model.parts, **replaced})
        check_together(model.kind, model.parts)
    return model


def _others(vae: str | None, text_encoder: str | None, variant: str | None, family: str) -> dict[str, Part]:
    """Return the networks to use in place of a model's own: its VAE, and its text encoders.

    family: of the model; a VAE's file does not show the scale of its latents.
    """
    found = {}
    for option, value, names in (("vae", vae, ("vae",)), ("text_encoder", text_encoder, TEXTS)):
        if value is None:
            continue
        path = user_path(value)
        if option == "vae" and path.is_file():
            found["vae"] = read_vae(path, family)
            continue
        files = [user_path(file) for file in str(value).split(",")]
        if option == "text_encoder" and all(file.is_file() for file in files) and not _is_whole(files[0]):
            found |= {part.name: part for part in (read_text_encoder(file, family) for file in files)}
            continue
        if (path / "config.json").is_file() and not lexists(path / "unet"):
            found[option] = inspect_network(path, option)
            continue
        parts = inspect_model(value, variant=variant).parts
        if option not in parts:
            raise InputError(f"--{option.replace('_', '-')}: {shown(value)} has no {option}; it has {', '.join(parts)}")
        found |= {name: parts[name] for name in names if name in parts}
    return found


def _is_whole(file: Path) -> bool:
    """Whether a file is a whole checkpoint; its text encoders are then taken as those of any model."""
    return any(tensor.key.startswith(UNET) for tensor in read_file(file)[0])


def _inspect_folder(name: str | Path, variant: str | None) -> ModelInfo:
    """Return the model of a folder or of the hub, or one that is built in."""
    notes: list[str] = []
    folder, on_hub = locate(name, notes)
    if lexists(folder / "model_index.json") or lexists(folder / "unet"):
        model = _read_pipeline(folder, notes)
    elif lexists(folder / "config.json"):
        model = _read_clip(folder, notes)
    else:
        raise InputError(f"{place(folder)}: holds no model: neither model_index.json nor config.json is there")
    if on_hub:
        wanted = (wanted_weights(part.folder, NETWORKS[part.kind].stem, variant) for part in model.parts.values())
        fetch_weights(str(name), folder, (path.relative_to(folder).as_posix() for paths in wanted for path in paths))
    return dataclasses.replace(
        model,
        name=str(name),
        parts={key: _add_weights(part, variant) for key, part in model.parts.items()},
        defaults={**model.defaults, **(DEFAULTS.get(name, {}) if isinstance(name, str) else {})},
        variant=variant,
        revision=folder.name if on_hub else None,
        notes=tuple(dict.fromkeys(notes)),
    )


def inspect_network(folder: Path, name: str, variant: str | None = None) -> Part:
    """Check a folder that holds a single network, as save_pretrained writes it, to be the component `name`.

    Raises InputError as `inspect_model` does.
    """
    path = folder / "config.json"
    stated = read_json(path)
    classes = (COMPONENTS | BESIDE)[name][1]
    cls = stated.get("_class_name") or (stated.get("architectures") or [classes[0]])[0]
    if cls not in classes:
        raise InputError(f"{place(path)}: class {shown(cls)} is no {name}: {' or '.join(classes)}")
    return _add_weights(_read_part(name, cls, folder, []), variant)


def locate(name: str | Path, notes: list[str]) -> tuple[Path, bool]:
    """Return the folder of the model called `name`, and whether it came from the hub."""
    text = str(name)
    if isinstance(name, str) and name in DEFAULTS:
        return EMBEDDED / name, False
    if not text or "\0" in text:
        raise InputError(f"model: {shown(text)} is no name: give emoji, a folder, or a hub id")
    path = user_path(name)
    if lexists(path):
        path = _snapshot(path, notes)
        if path.is_dir() and os.access(path, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            return path, False
        if path.suffix in PICKLES:
            raise InputError(f"{place(path)}: is refused: {CONVERT}")
        what = "cannot be read" if path.is_dir() else "is a broken link" if not os.path.exists(path) else "is a file"
        raise InputError(f"{place(path)}: {what}: a model is a folder in diffusers layout, or a .safetensors file")
    if isinstance(name, str) and is_hub_id(name):
        return fetch_configs(name), True
    hint = nearest(text, DEFAULTS)
    raise InputError(f"{place(path)}: there is no such folder, and no model of that name is built in{hint}")


def _snapshot(path: Path, notes: list[str]) -> Path:
    """Return the newest snapshot of a model's folder in the hub cache (`models--owner--name`), else the path."""
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or not snapshots.is_dir():
        return path
    newest = path / "refs" / "main"
    names = [read_text(newest).strip()] if newest.is_file() else sorted(p.name for p in snapshots.iterdir())
    if len(names) != 1 or not re.fullmatch(r"[0-9a-f]{1,64}", names[0]):
        raise InputError(
            f"{place(path)}: holds {len(names)} snapshots and no refs/main: name one of those in snapshots/"
        )
    notes.append(f"{place(path)}: is a folder of the hub cache: snapshot {names[0][:12]} of it is used")
    return snapshots / names[0]


def _read_pipeline(folder: Path, notes: list[str]) -> ModelInfo:
    """Read a folder in diffusers layout and check that its components fit together; without weights and name."""
    pipeline, classes, scheduler, options = _read_index(folder, notes)
    kind = PIPELINES[pipeline]
    networks = {name: cls for name, cls in classes.items() if cls in NETWORKS}
    parts = {
        name: _read_part(name, cls, _part_folder(folder, name, "config.json"), notes) for name, cls in networks.items()
    }
    parts["unet"] = _corrected_size(pipeline, parts["unet"], notes)
    check_together(kind, parts)
    scheduler_config = _read_scheduler(folder, scheduler, pipeline, notes)
    lengths = [
        check_tokenizer(folder / tokenizer, parts[encoder].config, parts[encoder].where, notes)
        for encoder, tokenizer in (("text_encoder", "tokenizer"), SECOND)
        if tokenizer in classes
    ]
    sdxl = SECOND[0] in parts
    if len(lengths) == 2 and lengths[0] != lengths[1]:
        raise InputError(
            f"{place(folder / 'tokenizer_2')}: reads {lengths[1]} tokens, but tokenizer reads {lengths[0]}"
        )
    return ModelInfo(
        name="", folder=folder, kind=kind, parts=parts, scheduler_config=scheduler_config,
        tokenizer=folder / "tokenizer" if "tokenizer" in classes else None,
        tokenizer_2=folder / "tokenizer_2" if sdxl else None,
        zero_empty=sdxl and options["force_zeros_for_empty_prompt"],
        defaults=usual_settings(parts["unet"].config, str(scheduler_config["_class_name"]), sdxl),
    )  # fmt: skip


def usual_settings(unet: Mapping[str, Any], scheduler: str, sdxl: bool) -> dict[str, Any]:
    """Return steps and guidance of a model whose configs show them: a distilled one's, and SDXL's guidance.

    A network that reads the guidance scale, or whose own scheduler is that of a distillation, is drawn in few steps;
    a folder of SDXL-Turbo, Lightning or Hyper-SD shows nothing of the kind.
    """
    if unet.get("time_cond_proj_dim"):
        return {"num_inference_steps": 4, "guidance_scale": 8.5}  # of diffusers' LatentConsistencyModelPipeline
    if scheduler in ("LCMScheduler", "TCDScheduler"):
        return {"num_inference_steps": 4, "guidance_scale": 1.0}
    return {"guidance_scale": 5.0} if sdxl else {}


def _read_clip(folder: Path, notes: list[str]) -> ModelInfo:
    """Read the folder of a CLIPModel or a SiglipModel; without weights and name."""
    path = folder / "config.json"
    stated = read_json(path)
    if stated.get("_class_name") in BESIDE[CONTROL][1]:
        raise InputError(f"{place(path)}: is {STEERS}")
    kind = stated.get("model_type", "clip")
    if kind == "siglip2":
        raise InputError(
            f"{place(path)}: model_type: 'siglip2' is NaFlex, whose pictures have any shape, and not supported; those "
            "of fixed size, as google/siglip2-base-patch16-224, have model_type 'siglip'"
        )
    cls = SCORERS.get(kind, "CLIPModel") if isinstance(kind, str) else "CLIPModel"
    part = _read_part("clip", cls, folder, notes)
    check = check_tokenizer if cls == "CLIPModel" else check_siglip_tokenizer
    check(folder, part.config["text_config"], f"{part.where}: text_config", notes)
    preprocessor = read_preprocessor(folder, part.config["vision_config"]["image_size"], notes, cls)
    return ModelInfo("", folder, "clip", {"clip": part}, tokenizer=folder, preprocessor=preprocessor)


def _read_index(folder: Path, notes: list[str]) -> tuple[str, dict[str, str], str | None, dict[str, Any]]:
    """Return (pipeline, {component: class}, scheduler class, options) of model_index.json, or guessed without one."""
    path = folder / "model_index.json"
    where = place(path)
    index = read_json(path) if lexists(path) else _guess_index(folder)
    refuse_code(index, where)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        plain = ", ".join(name for name in PIPELINES if "ControlNet" not in name)
        close = nearest(pipeline, PIPELINES)
        raise InputError(
            f"{where}: _class_name: class {shown(pipeline)} is not supported{close}; supported: {plain}, and those of "
            "ControlNets"
        )
    known = COMPONENTS | EXTRAS
    pairs = {key: value for key, value in index.items() if key in (*known, "scheduler") and value is not None}
    pairs |= {key: value for key, value in index.items() if _is_pair(value) and not key.startswith("_")}
    checked = check_config(
        {key: value for key, value in index.items() if key not in pairs and key not in (*known, "scheduler")},
        INDEX_OPTIONS, where, notes=notes,
    )  # fmt: skip
    parts = {}
    for key, value in pairs.items():
        if value == [None, None]:
            continue
        if key in EXTRAS and not _is_pair(value):  # which is never loaded
            notes.append(f"{where}: {key}: {shown(value)} is not a pair of library and class, and not used")
            continue
        if not _is_pair(value) or None in value:
            raise InputError(f"{where}: {key}: {shown(value)} is not a pair of library and class")
        if key == "scheduler":
            continue  # genkit.schedulers checks its class
        if key not in known:
            raise InputError(f"{where}: {shown(key)}: unknown component{nearest(key, known)}")
        library, classes = known[key]
        if value[0] != library or value[1] not in classes:
            names = ", ".join(classes)
            raise InputError(f"{where}: {key}: class {shown('.'.join(value))} is not supported; supported: {names}")
        if key in COMPONENTS:
            parts[key] = value[1]
        if key == CONTROL:
            notes.append(f"{where}: {key}: is used where rows name it: give it with --control")
    kind = PIPELINES[pipeline]
    required = (*REQUIRED[kind], *(SECOND if "XL" in pipeline else ()))
    if "XL" in pipeline and checked["requires_aesthetics_score"]:  # the refiner, which has the second encoder alone
        required = ("unet", "vae", *SECOND)
    for key in required:
        if key not in parts:
            raise InputError(f"{where}: {key}: is missing, which a {pipeline} needs")
    for key in parts:
        if key not in (*required, "vae"):
            raise InputError(f"{where}: {key}: does not belong in a {pipeline}")
    return pipeline, parts, (pairs.get("scheduler") or [None, None])[1], checked


def _is_pair(value: Any) -> bool:
    """Whether this is how an index names a component's library and class."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(word, str | None) for word in value)


def _guess_index(folder: Path) -> dict[str, Any]:
    """Return what model_index.json would hold, from the components that the folder has."""
    path = folder / "unet" / "config.json"
    cls = read_json(path).get("_class_name")
    if cls not in COMPONENTS["unet"][1]:
        known = ", ".join(COMPONENTS["unet"][1])
        raise InputError(f"{place(path)}: _class_name: class {shown(cls)} is not supported; supported: {known}")
    for one, other in (SECOND, SECOND[::-1]):
        if lexists(folder / one) and not lexists(folder / other):
            raise InputError(f"{place(folder / other)}: is absent, which {one} needs")
    pipeline = "DDPMPipeline" if cls == "UNet2DModel" else "StableDiffusionPipeline"
    found = [key for key in ("vae", *SECOND) if lexists(folder / key)]
    names = {*REQUIRED[PIPELINES[pipeline]], *found}
    index = {name: [COMPONENTS[name][0], COMPONENTS[name][1][0]] for name in COMPONENTS if name in names}
    pipeline = "StableDiffusionXLPipeline" if SECOND[0] in found else pipeline
    found_index = {**index, "_class_name": pipeline, "unet": ["diffusers", cls]}
    if SECOND[0] in found and not lexists(folder / "text_encoder"):
        refiner = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
        without = {name: [None, None] for name in ("text_encoder", "tokenizer")}
        return {**found_index, **without, **refiner, "force_zeros_for_empty_prompt": False}
    return found_index


def _part_folder(folder: Path, part: str, file: str) -> Path:
    """Return the folder of a component: its own, or, as in the first DDPM models, that of model_index.json."""
    own = folder / part
    return folder if not lexists(own) and lexists(folder / file) else own


def _read_part(name: str, cls: str, folder: Path, notes: list[str]) -> Part:
    """Return a network of class `cls` with its checked config, without weights."""
    path = folder / "config.json"
    config = read_json(path)
    stated = config.get("_class_name") or cls
    if stated != cls:
        raise InputError(f"{place(path)}: _class_name: {shown(stated)} is not {cls}, which belongs here")
    if name in TEXTS and any(isinstance(config.get(key), dict) for key in ("text_config", "text_config_dict")):
        notes.append(f"{place(path)}: is of a whole CLIP: its text half is used")
        refuse_code(config, place(path))
        half = config.get("text_config_dict") or config["text_config"]
        config = {"projection_dim": config.get("projection_dim"), **half}
    known = NETWORKS[cls].table.keys() | NETWORKS[cls].unused.keys()
    left_out = {key: value for key, value in config.items() if key not in known and not key.startswith("_")}
    return Part(name, cls, folder, check_network(cls, config, place(path), notes=notes), left_out=left_out)


def _read_scheduler(folder: Path, cls: str | None, pipeline: str, notes: list[str]) -> dict[str, Any]:
    """Return the scheduler's config, which genkit.schedulers can read, with its class in `_class_name`.

    Corrected as by the constructor of diffusers' pipeline: the pictures of old folders depend on it.
    """
    from genkit.schedulers import Scheduler
    from genkit.schedulers.diffusers_config import CLASSES, FOREIGN, META

    path = _part_folder(folder, "scheduler", "scheduler_config.json") / "scheduler_config.json"
    config = read_json(path, infinite=True)  # diffusers writes lambda_min_clipped as -Infinity
    refuse_code(config, place(path))
    cls = cls or config.get("_class_name")
    corrected = {"_class_name": cls, **CORRECTED.get(pipeline, {})}
    known = CLASSES[corrected["_class_name"]]["keys"] if corrected["_class_name"] in CLASSES else {}
    for key, value in corrected.items():
        before = config.get(key, known.get(key, value))
        if before == value or (key == "skip_prk_steps" and before is not False):
            config.setdefault(key, value) if key == "_class_name" else None
            continue
        notes.append(f"{place(path)}: {key}: {before} is taken as {value}, as diffusers' {pipeline} does")
        config[key] = value
    unknown = {key: value for key, value in config.items() if not (key in (*known, *FOREIGN, *META) or key[0] == "_")}
    if known:
        check_config(unknown, {}, place(path), notes=notes)
        config = {key: value for key, value in config.items() if key not in unknown}
    try:
        Scheduler.from_config(config)
    except InputError as error:
        raise InputError(f"{place(path)}: {error}") from None
    return config


def _corrected_size(pipeline: str, unet: Part, notes: list[str]) -> Part:
    """Return the UNet with the picture size of Stable Diffusion, which its first converter wrote as half of it."""
    version = re.match(r"0\.(\d+)\.", str(read_json(unet.folder / "config.json").get("_diffusers_version")))
    side = unet.config["sample_size"]
    if pipeline not in OLD_SIZES or version is None or int(version[1]) >= 9 or type(side) is not int or side >= 64:
        return unet
    notes.append(f"{unet.where}: sample_size: {side} is taken as 64, as diffusers' {pipeline} does")
    return dataclasses.replace(unet, config={**unet.config, "sample_size": 64})


def _add_weights(part: Part, variant: str | None) -> Part:
    """Return the part with its weight files and tensors, whose landmarks fit its config."""
    network = NETWORKS[part.kind]
    files, tensors = read_weights(part.folder, network.stem, variant, network.renames)
    check_shapes(tensors, network.landmarks(part.config), part.where, complete=False)
    return dataclasses.replace(part, files=files, tensors=tensors)
