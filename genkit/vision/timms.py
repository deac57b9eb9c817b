"""Classifiers of timm: folders in its layout, which have `architecture` in config.json.

timm only builds the network: it reads no weights, downloads nothing and runs no code of a folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.components.rules import ANYTHING, FLAG, Key, Rule, check_config, choice, many, optional, real, whole
from genkit.errors import HostError, InputError, nearest, reason, shown
from genkit.vision.labels import MOST, check_problem, numbered
from genkit.vision.preprocess import IMAGENET_MEAN, IMAGENET_STD, RESAMPLES, Processor

KIND = "timm"  # the name in CLASSES, where others have a class of transformers
RENAMES = ((r"^timm_model\.", ""),)  # the prefix of transformers' wrapper
WRAPPER = ("timm_wrapper", "TimmWrapperForImageClassification")
INSTALL = "pip install 'genkit-diffusion[timm]'"
IMAGENETS = {1000: "imagenet", 11221: "imagenet21k_miil", 11821: "imagenet12k", 21841: "imagenet22k",
             21842: "imagenet22k_ms", 21843: "imagenet21k_goog"}  # fmt: skip  # number of labels: timm's file of them

_SIDE = whole(1, 8192)
_THREE = Rule("[3, height, width] in pixels", lambda v: isinstance(v, list) and len(v) == 3 and v[0] == 3
              and all(map(_SIDE.holds, v)))  # fmt: skip
_PREPARED = {  # with the defaults of timm's PretrainedCfg
    "input_size": Key(optional(_THREE), None),
    "fixed_input_size": Key(optional(FLAG), None),
    "interpolation": Key(optional(choice(*RESAMPLES.values())), None),
    "crop_pct": Key(optional(real(0, 1, above=True)), None),
    "crop_mode": Key(optional(choice("center", "squash")), None),
    "mean": Key(optional(many(real(-10, 10), 3, 3)), None),
    "std": Key(optional(many(real(0, 10, above=True), 3, 3)), None),
    "num_classes": Key(optional(whole(0, MOST)), None),
    "pool_size": Key(ANYTHING, None),
    "label_names": Key(ANYTHING, None),
    "labels": Key(ANYTHING, None),
}
_UNUSED = dict.fromkeys(  # provenance, settings of training, and evaluation at other sizes
    ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag", "custom_load",
     "test_input_size", "min_input_size", "test_crop_pct", "label_offset", "label_descriptions", "test_pool_size",
     "first_conv", "classifier", "license", "description", "origin_url", "paper_name", "paper_ids", "notes",
     "num_features", "global_pool", "model_args", "test_interpolation"),
    ANYTHING,
)  # fmt: skip
_REFUSED_ARGS = (  # of create_model: they read or download files, or build another kind of network
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_custom_load",
    "pretrained_filter_fn", "pretrained_model_args", "checkpoint_path", "cache_dir", "features_only", "feature_cfg",
    "feature_cls", "out_indices", "scriptable", "exportable", "no_jit", "device", "dtype", "use_naflex", "model_name",
)  # fmt: skip


def is_timm(config: Mapping[str, Any]) -> bool:
    """Return whether timm, or transformers' wrapper around it, wrote a config.json."""
    names = config.get("architectures")
    wrapped = config.get("model_type") == WRAPPER[0] or (isinstance(names, list) and WRAPPER[1] in names[:1])
    return wrapped or (
        "architecture" in config and ({"pretrained_cfg", "num_classes", "input_size"} & config.keys()) != set()
    )


def check_timm(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for an architecture that the installed timm does not have, and for what is not a classifier.

    Raises HostError if timm, or torchvision, which it needs, is not installed. Does not import timm, which takes
    seconds.
    """
    for name in ("timm", "torchvision"):
        if "timm" not in sys.modules and importlib.util.find_spec(name) is None:
            raise HostError(f"{where}: a model of timm needs {name}, which is not installed: {INSTALL}")
    stated = config.get("architecture")
    source = "\n".join(file.read_text("utf-8") for file in sorted((_package() / "models").glob("*.py")))
    known = re.findall(r"^@register_model\s+def (\w+)\(", source, re.MULTILINE)
    if not isinstance(stated, str) or not re.fullmatch(r"\w+(\.[\w.-]+)?", stated):
        raise InputError(f"{where}: architecture: {shown(stated)} is no name of a network of timm")
    base = stated.partition(".")[0]
    if base not in known and not re.search(rf"['\"]{base}['\"]\s*:\s*['\"]", source):  # deprecated names
        raise InputError(f"{where}: architecture: {shown(stated)} is none that timm has{nearest(base, known)}")
    _arguments(config, where)
    prepared(config, where, [])


def prepared(config: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """Return the preprocessing settings and `num_classes` of a config, with timm's defaults.

    Raises InputError for a value that is not supported.
    """
    inner = config.get("pretrained_cfg")
    if inner is None and "input_size" in config:  # the layout of older versions of timm
        inner = {name: value for name, value in config.items() if name in _PREPARED}
    if not isinstance(inner, Mapping):
        raise InputError(
            f"{where}: pretrained_cfg: {shown(inner)} is not an object that says how pictures are prepared"
        )
    found = check_config(inner, _PREPARED, f"{where}: pretrained_cfg", _UNUSED, notes)
    arguments = _arguments(config, where)
    size = found["input_size"] or [3, 224, 224]
    free = arguments.get("dynamic_img_size") or arguments.get("strict_img_size") is False
    found["fixed_input_size"] = bool(found["fixed_input_size"]) and not free
    side = arguments.get("img_size")
    if side is not None and found["fixed_input_size"]:
        size = [3, *(side if isinstance(side, list) else (side, side))]
    if not _THREE.holds(size):
        raise InputError(f"{where}: model_args: img_size: {shown(side)} is not a number of pixels")
    count = config.get("num_classes", found["num_classes"])
    count = 1000 if count is None else count
    if type(count) is not int or not 1 <= count <= MOST:
        only = ": it has no classifier, only features" if count == 0 else f", a number from 1 to {MOST}"
        raise InputError(f"{where}: num_classes: {shown(count)} is no number of labels{only}")
    return {**found, "input_size": size, "num_classes": count}


def _arguments(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    stated = config.get("model_args") or {}
    if not isinstance(stated, Mapping):
        raise InputError(f"{where}: model_args: {shown(stated)} is not an object")
    for name, value in stated.items():
        if name in _REFUSED_ARGS and value not in (None, False):
            raise InputError(f"{where}: model_args: {name}: {shown(value)}: genkit builds networks without it")
        if name == "in_chans" and value not in (None, 3):
            raise InputError(f"{where}: model_args: in_chans: {shown(value)} is not 3, the channels of a picture")
    return {name: value for name, value in stated.items() if value is not None and name not in _REFUSED_ARGS}


def timm_labels(config: Mapping[str, Any], where: str, notes: list[str]) -> tuple[str, ...]:
    """Return the labels in the order of the logits: label_names, or those of ImageNet as timm has them.

    Duplicates get their index appended, with a note. Raises InputError unless there are num_classes of them.
    """
    check_problem(config, where)
    found = prepared(config, where, [])
    count = found["num_classes"]
    stated = config.get("label_names") or found["label_names"] or config.get("labels") or found["labels"]
    if stated is None and count in IMAGENETS:
        return numbered(_imagenet(count), f"{where}: num_classes: of ImageNet's {count} labels", notes)
    if stated is None:
        notes.append(f"{where}: label_names: is absent: labels are called LABEL_0 to LABEL_{count - 1}")
        return tuple(f"LABEL_{n}" for n in range(count))
    if isinstance(stated, Mapping):
        stated = [stated.get(str(n)) for n in range(len(stated))]
    if not isinstance(stated, list) or len(stated) != count:
        size = len(stated) if isinstance(stated, list) else shown(stated)
        raise InputError(f"{where}: label_names: {size} labels, and num_classes is {count}")
    return numbered(stated, f"{where}: label_names", notes)


def _imagenet(count: int) -> list[str]:
    """Return the names of ImageNet's labels, as in timm and in transformers' pipeline."""
    folder = _package() / "data" / "_info"
    words = (folder / "imagenet_synset_to_lemma.txt").read_text("utf-8").splitlines()
    lemmas = dict(line.split("\t", 1) for line in words)
    return [lemmas[synset] for synset in (folder / f"{IMAGENETS[count]}_synsets.txt").read_text("utf-8").split()]


def timm_processor(config: Mapping[str, Any], where: str, notes: list[str]) -> Processor:
    """Return the preprocessing of timm's `create_transform` for evaluation."""
    found = prepared(config, where, notes)
    height, width = found["input_size"][1:]
    share = found["crop_pct"] or 0.875
    down, across = math.floor(height / share), math.floor(width / share)
    size = {"height": down, "width": across} if found["crop_mode"] == "squash" else {"shortest_edge": down}
    if height != width and "height" not in size:
        raise InputError(f"{where}: input_size: {height}x{width} is no square, which crop_mode center needs here")
    return Processor(
        size, found["interpolation"] or "bicubic", tuple(found["mean"] or IMAGENET_MEAN),
        tuple(found["std"] or IMAGENET_STD), crop=(height, width), rounded=True,
    )  # fmt: skip


def build_timm(config: Mapping[str, Any], where: str) -> Any:
    """Return timm's network, whose weights are still to be loaded; on the meta device if it can be built there.

    Raises InputError for what timm refuses, HostError without timm.
    """
    from accelerate import init_empty_weights

    try:
        import timm
    except Exception as error:  # torchvision that does not fit torch raises RuntimeError
        raise HostError(f"{where}: timm cannot be imported: {reason(error)}: {INSTALL}") from None
    found = prepared(config, where, [])
    shape = {name: found[name] for name in ("input_size", "fixed_input_size", "num_classes", "pool_size")}
    arguments = {**_arguments(config, where), "num_classes": found["num_classes"]}
    name = str(config["architecture"]).partition(".")[0]
    failure: Exception | None = None
    for empty in (init_empty_weights(include_buffers=False), contextlib.nullcontext()):
        try:
            with empty, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of deprecated names
                model = timm.create_model(name, pretrained=False, pretrained_cfg=shape, **arguments)
        except Exception as error:  # timm may raise anything for a bad value or argument
            failure = error
            continue
        own = model.state_dict().keys()
        if not any(b.device.type == "meta" and key not in own for key, b in model.named_buffers()):
            return model  # else a buffer that no file holds has no values: Swin computes its masks when it is built
    raise InputError(f"{where}: {name} of timm cannot be built: {shown(str(failure), 300)}")


def _package() -> Path:
    """Return the folder of the installed timm."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
