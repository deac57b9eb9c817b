"""Check and load vision models: folders in transformers' layout or hub ids, of the classes in classes.py."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from genkit.components.folder import locate
from genkit.components.hub import fetch_weights
from genkit.components.info import Part
from genkit.components.loading import check_stored, load_tokenizer, read_network
from genkit.components.rules import refuse_code
from genkit.components.tokenizer import check_tokenizer
from genkit.components.weights import Tensor, hash_once, read_weights, wanted_weights
from genkit.errors import HostError, InputError, nearest, shown
from genkit.files import place, read_json
from genkit.pictures.images import check_resized
from genkit.vision.classes import CLASSES, Kind
from genkit.vision.generation import read_generation
from genkit.vision.labels import read_labels
from genkit.vision.preprocess import Processor, read_processor, read_size
from genkit.vision.processors import read_classifier_processor
from genkit.vision.timms import KIND, build_timm, check_timm, is_timm, timm_labels, timm_processor

if TYPE_CHECKING:
    from typing import Self

    import torch

    from genkit.device.residency import Hold

T = TypeVar("T")
THRESHOLD = "detection_threshold"  # genkit's own key of config.json; transformers keeps but does not read it
MOST_LAYERS, MOST = 1000, 2**24  # limits of numbers in a config, so that its constructor cannot run for hours
# Keys that are read before the network is built. At the top level they may be null: a part has its own.
WHOLE = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "max_text_len", "decoder_intermediate_size")
BATCH = 8  # pictures a call; halved when memory runs out


@dataclasses.dataclass(frozen=True)
class VisionInfo:
    """A vision model whose folder was checked, without torch.

    part: its class (`kind`), config and weight files. processor: its image processor. revision: of the hub. labels: of
    a classifier, in the order of its logits. generation: for classes that generate text, the settings of
    generation_config.json; None without that file.
    """

    name: str
    folder: Path
    sense: str
    part: Part
    processor: Processor
    notes: tuple[str, ...] = ()
    revision: str | None = None
    labels: tuple[str, ...] = ()
    generation: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        """The name of its class."""
        return self.part.kind

    @property
    def threshold(self) -> float | None:
        """The score threshold in a detector's config, which `genkit train` chose as the best for counting; or None."""
        return self.part.config.get(THRESHOLD)

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each weight file by its name."""
        return {file.name: hash_once(file) or "" for file in self.part.files}

    def binding(self) -> dict[str, Any]:
        """Return its record in run.json. On resume its weights must be the same; name and folder may change."""
        local = {} if self.revision is not None else {"folder": str(self.folder.absolute())}
        said: dict[str, Any] = {"labels": list(self.labels)} if self.labels else {}
        problem = self.part.config.get("problem_type") if self.labels else None
        said |= {} if problem is None else {"problem_type": problem}
        return {"name": self.name, **local, "weights": self.hashes, **said}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A vision model on its device, in eval mode and without gradients. tokenizer: None for one without text input."""

    info: VisionInfo
    model: Any
    tokenizer: Any = None

    @property
    def kind(self) -> str:
        """The name of its class."""
        return self.info.kind

    @property
    def processor_config(self) -> Processor:
        """Its image processor."""
        return self.info.processor

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each weight file by its name."""
        return self.info.hashes

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines about what was ignored or assumed when its files were read."""
        return self.info.notes


class Sense:
    """Base class of detectors, captioners and other uses of a vision model.

    sense: the kind of model that a subclass takes, as in classes.py. name: of the model. batch: pictures of a call.
    hold: a context manager that keeps the weights on the device (device/residency.py).
    """

    sense = ""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.model, self.name = loaded, loaded.model, loaded.info.name
        self.batch = BATCH
        self.device: torch.device = next(self.model.parameters()).device
        self.hold: Hold = contextlib.nullcontext

    @classmethod
    def from_pretrained(cls, name: str | Path | VisionInfo, *, device: str = "auto", dtype: str = "auto") -> Self:
        """Load a model by folder or hub id. Raises InputError and HostError as `load_model` does."""
        from genkit.device.devices import pick_device

        return cls(load_model(name, (cls.sense,), *pick_device(device, dtype)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return next(self.model.parameters()).dtype

    def nan_error(self) -> HostError:
        """Return the error for NaN in the model's output."""
        kind = str(self.dtype).removeprefix("torch.")
        return HostError(f"{self.name}: its scores are no numbers in {kind}: use --dtype float32")

    def in_batches(self, count: int, call: Callable[[slice], T], what: str = "pictures") -> list[T]:
        """Return call(part) for slices of range(count) of at most `batch`, which is halved when memory runs out."""
        import torch

        from genkit.device.outofmemory import in_parts

        with torch.inference_mode(), self.hold():
            found, self.batch = in_parts(count, self.batch, call, what)
        return found

    def pixels(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return uint8 pictures (B, 3, H, W) as the model reads them: on its device, in its dtype.

        Raises InputError for pictures so narrow that they would be too large once their short side is resized.
        """
        from genkit.vision.preprocess import prepare

        processor = self.loaded.processor_config
        height, width = pictures.shape[-2:]
        resized = read_size(height, width, dataclasses.replace(processor, crop=None))
        check_resized((height, width), resized, self.name)
        return prepare(pictures.to(self.device), processor).to(self.dtype)

    def forget(self) -> None:
        """Clear caches, such as embeddings of words."""


def inspect_vision(name: str | Path, senses: Collection[str], option: str = "model") -> VisionInfo:
    """Check that a folder in transformers' layout, or a hub id, is a model for one of `senses`; reads no weights.

    option: the option's name, for messages. Raises InputError naming file, key and value; HostError where the hub
    cannot be read.
    """
    notes: list[str] = []
    if name in ("", "emoji", "emoji-clip"):
        raise InputError(f"{option}: {shown(str(name))} is no {_either(senses)}: give a folder or a hub id")
    name = re.sub("^hf[-_]hub:", "", name) if isinstance(name, str) else name  # as timm writes hub ids
    try:
        folder, on_hub = locate(name, notes)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{option}: {place(path)}: is absent: a {_either(senses)} is a folder of transformers")
    config = read_json(path)
    kind = _class_of(config, senses, option, place(path))
    _check_config(config, CLASSES[kind], place(path))
    stated = config.get(THRESHOLD)
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, float | int) or not 0 < stated < 1):
        raise InputError(f"{place(path)}: {THRESHOLD}: {shown(stated)} is not a number above 0 and below 1")
    if kind == KIND:
        check_timm(config, place(path))
    if on_hub:
        wanted = wanted_weights(folder, "model", None)
        fetch_weights(str(name), folder, (file.relative_to(folder).as_posix() for file in wanted))
    files, tensors = read_weights(folder, "model", None, CLASSES[kind].renames)
    if CLASSES[kind].tokenizer == "CLIPTokenizer":
        check_tokenizer(folder, _text(config), f"{place(path)}: text_config", notes)
    labels, processor = _prepared(folder, config, kind, notes)
    part = Part(CLASSES[kind].sense, kind, folder, config, files, tensors)
    revision = folder.name if on_hub else None
    generation = read_generation(folder, notes) if CLASSES[kind].generates else None
    sense, said = CLASSES[kind].sense, tuple(notes)
    return VisionInfo(str(name), folder, sense, part, processor, said, revision, labels, generation)


def _prepared(
    folder: Path, config: Mapping[str, Any], kind: str, notes: list[str]
) -> tuple[tuple[str, ...], Processor]:  # fmt: skip
    """Return the labels, () for what is not a classifier, and the image processor."""
    where = place(folder / "config.json")
    if kind == KIND:
        return timm_labels(config, where, notes), timm_processor(config, where, notes)
    if CLASSES[kind].sense == "classifier":
        labels = read_labels(config, where, notes)
        return labels, read_classifier_processor(folder, CLASSES[kind].processor, notes)
    return (), read_processor(folder, CLASSES[kind].processor, notes)


def load_model(
    name: str | Path | VisionInfo, senses: Collection[str], device: torch.device | str, dtype: torch.dtype,
    pinned: bool = False,
) -> Loaded:  # fmt: skip
    """Load a vision model for one of `senses`; its weights equal those that from_pretrained loads.

    The network is built on the meta device, all names and shapes are compared with the files, and only then are the
    weights read. pinned: keep them in page-locked memory, for fast copies to a GPU. Raises InputError as
    `inspect_vision` does, and for weights that are missing, unexpected, of another shape, all zero or not finite in
    `dtype`; HostError if memory runs out.
    """
    import torch

    from genkit.device.devices import compute_dtype
    from genkit.vision.faster import quicken

    info = name if isinstance(name, VisionInfo) else inspect_vision(name, senses)
    if info.sense not in senses:
        raise InputError(f"{info.name}: is a {info.sense}, not a {_either(senses)}")
    target = torch.device(device)
    model = _build(info.part)
    tied = {k: v for k, v in dict(getattr(model, "all_tied_weights_keys", None) or {}).items() if k != v}
    have = _known(model, _renamed(model, info.part.tensors))
    part = dataclasses.replace(info.part, tensors=have)
    shared = {key: source for key, source in tied.items() if key not in have and source in have}
    shared |= {source: key for key, source in tied.items() if source not in have and key in have}
    fresh = _unneeded(model, have.keys() | shared.keys())
    stored = {key: weight for key, weight in model.state_dict().items() if key not in (*shared, *fresh)}
    check_stored(stored, have, part.where)
    weights = read_network(part, target, compute_dtype(target, dtype))
    weights |= {key: weights[source] for key, source in shared.items()}
    weights |= {
        key: value.to(target, compute_dtype(target, dtype) if value.is_floating_point() else value.dtype)
        for key, value in fresh.items()
    }
    model.load_state_dict(weights, strict=True, assign=True)
    model.to(device=target, dtype=compute_dtype(target, dtype)).eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()) if pinned and torch.cuda.is_available() else ():
        tensor.data = tensor.data.pin_memory()
    quicken(model)
    return Loaded(info, model, read_tokenizer(info))


def _build(part: Part) -> Any:
    """Return the network on the meta device: its class is one of CLASSES, its config that of the same class."""
    if part.kind == KIND:
        return build_timm(part.config, part.where)
    import transformers
    from accelerate import init_empty_weights

    cls = getattr(transformers, part.kind)
    try:
        config = cls.config_class.from_dict(dict(part.config))
        with init_empty_weights(include_buffers=False):
            return cls(config)
    except Exception as error:  # transformers may raise anything for a bad value
        raise InputError(f"{part.where}: {part.kind} cannot be built: {shown(str(error), 300)}") from None


def _renamed(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with names of older versions of transformers replaced by the current ones."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known = model.state_dict().keys()
    if not hasattr(model, "base_model_prefix"):  # a network of timm
        return dict(tensors)
    renames = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name if name in known else rename_source_key(name, renames, [])[0]
        if new in found:
            raise InputError(f"{place(tensor.file)}: {shown(tensor.key)}: is given twice, also as {shown(new)}")
        found[new] = tensor
    return found


def _known(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without those that the class lists in _keys_to_ignore_on_load_unexpected."""
    own, beyond = model.state_dict().keys(), getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name in own or not any(re.search(pattern, name) for pattern in beyond)
    }


def _unneeded(model: Any, have: Collection[str]) -> dict[str, Any]:
    """Return initial values for layer norms that files may lack (_keys_to_ignore_on_load_missing): they have no effect.

    Also zeros for the counters of batch norms, which only training reads.
    """
    import torch

    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    found = {
        name: torch.ones(w.shape) if name.endswith("weight") else torch.zeros(w.shape)
        for name, w in model.state_dict().items()
        if name not in have and name.rpartition(".")[0] in norms and any(re.search(p, name) for p in patterns)
    }
    counters = [n for n in model.state_dict() if n.endswith(".num_batches_tracked") and n not in have]
    return found | {name: torch.zeros((), dtype=torch.long) for name in counters}


def read_tokenizer(info: VisionInfo) -> Any:
    """Return the tokenizer of a model, or None for one without text input. Raises InputError."""
    name = CLASSES[info.kind].tokenizer
    if name is None:
        return None
    if name == "CLIPTokenizer":
        return load_tokenizer(info.folder, _text(info.part.config))
    cls = getattr(importlib.import_module("transformers"), name)
    try:
        found = cls.from_pretrained(info.folder, local_files_only=True)
        part, usual = CLASSES[info.kind].words
        known = (info.part.config.get(part) or {}).get("vocab_size", usual)
        size = max(found.get_vocab().values()) + 1
    except Exception as error:  # the Rust tokenizers raise plain Exception
        raise InputError(f"{place(info.folder)}: the tokenizer cannot be read: {shown(str(error), 200)}") from None
    if size > known:
        raise InputError(f"{place(info.folder)}: the tokenizer has {size} tokens, but {part} has vocab_size {known}")
    return found


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return text_config with the defaults of vocab_size and max_position_embeddings in transformers."""
    length = 77 if config.get("model_type") in ("clipseg", "xclip") else 16  # OWL-ViT and OWLv2
    return {"vocab_size": 49408, "max_position_embeddings": length, **(config.get("text_config") or {})}


def _class_of(config: Mapping[str, Any], senses: Collection[str], option: str, where: str) -> str:
    """Return the class that a config names. Raises InputError for one that is unknown or of another sense."""
    names = config.get("architectures")
    stated = KIND if is_timm(config) else names[0] if isinstance(names, list) and names else None
    if stated is None:  # some tools leave it out
        stated = next((c for c, kind in CLASSES.items() if kind.model_type == config.get("model_type")), None)
    known = [c for c, kind in CLASSES.items() if kind.sense in senses]
    if not isinstance(stated, str) or stated not in CLASSES:
        what = shown(stated if stated is not None else config.get("model_type"))
        raise InputError(
            f"{option}: {where}: architectures: {what} is no {_either(senses)}{nearest(what, known)}; "
            f"supported: {', '.join(known)}"
        )
    if stated not in known:
        raise InputError(f"{option}: {where}: {stated} is a {CLASSES[stated].sense}, not a {_either(senses)}")
    if stated != KIND and config.get("model_type") not in (None, CLASSES[stated].model_type):
        raise InputError(
            f"{where}: model_type: {shown(config['model_type'])} is not {CLASSES[stated].model_type!r}, of {stated}"
        )
    return stated


def _check_config(config: Mapping[str, Any], kind: Kind, where: str, depth: int = 0) -> None:
    """Raise InputError for code, for backbones that would be downloaded, and for numbers that are not plausible."""
    refuse_code(config, where)
    for key in ("use_timm_backbone", "use_pretrained_backbone", "backbone"):
        if config.get(key):
            raise InputError(f"{where}: {key}: {shown(config[key])}: a backbone that lies elsewhere is never fetched")
    for name in {*kind.nested, "text_config"} if depth == 0 else ():
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"{where}: {name}: {shown(config[name])} is not an object")
    for name, types in kind.nested.items() if depth == 0 else ():
        stated = (config.get(name) or {}).get("model_type")
        if stated is not None and stated not in types:
            raise InputError(f"{where}: {name}: model_type: {shown(stated)} is not {' or '.join(types)}")
    for key, value in config.items():
        if key in ("id2label", "label2id"):
            continue  # their keys and values are labels, not settings
        if key in WHOLE and (value is not None or depth) and not (type(value) is int and value > 0):
            raise InputError(f"{where}: {key}: {shown(value)} is not a whole number above 0")
        most = MOST_LAYERS if "layers" in key or key in ("depths", "depth") else MOST
        numbers = value if isinstance(value, list) else [value]
        large = next((n for n in numbers if isinstance(n, int | float) and abs(n) > most), None)
        if large is not None:
            raise InputError(f"{where}: {key}: {shown(large)} is more than {most}")
        if isinstance(value, dict):
            if depth > 8:
                raise InputError(f"{where}: {key}: is nested too deeply")
            _check_config(value, kind, f"{where}: {key}", depth + 1)


def _either(senses: Collection[str]) -> str:
    return " or ".join(senses)
