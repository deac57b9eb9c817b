"""Vision models by name: folders in transformers' layout, checked and loaded; classes are those of classes.py."""

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
from genkit.vision.classes import CLASSES, Kind
from genkit.vision.generation import read_generation
from genkit.vision.labels import read_labels
from genkit.vision.preprocess import Processor, read_processor
from genkit.vision.processors import read_classifier_processor
from genkit.vision.timms import KIND, build_timm, check_timm, is_timm, timm_labels, timm_processor

if TYPE_CHECKING:
    from typing import Self

    import torch

    from genkit.device.residency import Hold

T = TypeVar("T")
THRESHOLD = "detection_threshold"  # a key of genkit's own; transformers keeps it without reading it
MOST_LAYERS, MOST = 1000, 2**24  # of any network here: a config must not keep its constructor busy for hours
BATCH = 8  # pictures a call; halved when memory runs out


@dataclasses.dataclass(frozen=True)
class VisionInfo:
    """A vision model whose folder was checked, without torch.

    part: its class (`kind`), config and weight files. processor: how pictures are prepared. revision: of the hub.
    labels: of a classifier, in the order of its logits.
    generation: of classes that write text, what generation_config.json states; None without that file.
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
        """The threshold of a detector's scores that its config states: what `genkit train` found to count best."""
        return self.part.config.get(THRESHOLD)

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each weight file by its name."""
        return {file.name: hash_once(file) or "" for file in self.part.files}

    def binding(self) -> dict[str, Any]:
        """Return what a run records of it: its weights bind, its name and folder do not."""
        local = {} if self.revision is not None else {"folder": str(self.folder.absolute())}
        said: dict[str, Any] = {"labels": list(self.labels)} if self.labels else {}
        problem = self.part.config.get("problem_type") if self.labels else None
        said |= {} if problem is None else {"problem_type": problem}
        return {"name": self.name, **local, "weights": self.hashes, **said}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A vision model on its device, in eval mode and without gradients. tokenizer: None where it reads no words."""

    info: VisionInfo
    model: Any
    tokenizer: Any = None

    @property
    def kind(self) -> str:
        """The name of its class."""
        return self.info.kind

    @property
    def processor_config(self) -> Processor:
        """How pictures are prepared for it."""
        return self.info.processor

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each weight file by its name."""
        return self.info.hashes

    @property
    def notes(self) -> tuple[str, ...]:
        """What of its files was left out or assumed, a line each."""
        return self.info.notes


class Sense:
    """What all senses share: a loaded model, how many pictures it takes at once, and caches that can be dropped.

    sense: of the models that a class takes, as classes.py has it. name: of the model, as it was loaded. device: where
    it works. hold: context manager that keeps it there (device/residency.py).
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
        """What the model computes in."""
        return next(self.model.parameters()).dtype

    def no_numbers(self) -> HostError:
        """Return the error of a model whose scores are NaN in its dtype."""
        kind = str(self.dtype).removeprefix("torch.")
        return HostError(f"{self.name}: its scores are no numbers in {kind}: use --dtype float32")

    def in_batches(self, count: int, call: Callable[[slice], T], what: str = "pictures") -> list[T]:
        """Return call(part) for slices that cover range(count), at most `batch` long; it is halved out of memory."""
        import torch

        from genkit.device.outofmemory import in_parts

        with torch.inference_mode(), self.hold():
            found, self.batch = in_parts(count, self.batch, call, what)
        return found

    def pixels(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return uint8 pictures (B, 3, H, W) as the model reads them: on its device, in its dtype."""
        from genkit.vision.preprocess import prepare

        return prepare(pictures.to(self.device), self.loaded.processor_config).to(self.dtype)

    def forget(self) -> None:
        """Drop what is cached, such as embeddings of words."""


def inspect_vision(name: str | Path, senses: Collection[str], option: str = "model") -> VisionInfo:
    """Check a folder in transformers' layout, or a hub id, to be a model for one of `senses`; no weights are read.

    option: names it in messages. Raises InputError naming file, key and value; HostError where the hub cannot be read.
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
    """Return the labels, none for what is no classifier, and how pictures are prepared."""
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
    """Load a vision model for one of `senses`; its weights are equal to those that from_pretrained loads.

    It is built without weights from its class and config, every name and shape is compared with the files, and only
    then are they read. pinned: in RAM, from where they are copied to a GPU at once. Raises InputError as
    `inspect_vision` does, and for weights that are missing, too many, of another shape, all zero or not finite in
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
    except Exception as error:  # transformers refuses a value or a combination of them
        raise InputError(f"{part.where}: {part.kind} cannot be built: {shown(str(error), 300)}") from None


def _renamed(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names that transformers now has for what files of older versions call otherwise."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known = model.state_dict().keys()
    if not hasattr(model, "base_model_prefix"):  # no network of transformers
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
    """Return the weights without those that the class itself says files may have beyond its own."""
    own, beyond = model.state_dict().keys(), getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name in own or not any(re.search(pattern, name) for pattern in beyond)
    }


def _unneeded(model: Any, have: Collection[str]) -> dict[str, Any]:
    """Return ones and zeros for norms that files may lack, as the class itself says: it computes nothing there.

    And zeros for the counters of batch norms, which only training reads.
    """
    import torch

    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    found = {
        name: torch.ones(w.shape) if name.endswith("weight") else torch.zeros(w.shape)
        for name, w in model.state_dict().items()
        if name not in have and name.rpartition(".")[0] in norms and any(re.search(p, name) for p in patterns)
    }
    counters = [n for n in model.state_dict() if n.endswith(".num_batches_tracked") and n not in have]  # of training
    return found | {name: torch.zeros((), dtype=torch.long) for name in counters}


def read_tokenizer(info: VisionInfo) -> Any:
    """Return the tokenizer of a model, or None where it reads no words. Raises InputError."""
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
    """Return size of the vocabulary and length of the text part, with the class's defaults in transformers."""
    length = 77 if config.get("model_type") in ("clipseg", "xclip") else 16  # of the OWLs
    return {"vocab_size": 49408, "max_position_embeddings": length, **(config.get("text_config") or {})}


def _class_of(config: Mapping[str, Any], senses: Collection[str], option: str, where: str) -> str:
    """Return the class that a config names. Raises InputError for one that is not known, or is of another sense."""
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
    """Raise InputError for code, networks of other places, and numbers that no such network has."""
    refuse_code(config, where)
    for key in ("use_timm_backbone", "use_pretrained_backbone", "backbone"):
        if config.get(key):
            raise InputError(f"{where}: {key}: {shown(config[key])}: a backbone that lies elsewhere is never fetched")
    for name, types in kind.nested.items() if depth == 0 else ():
        stated = (config.get(name) or {}).get("model_type") if isinstance(config.get(name) or {}, dict) else None
        if stated is not None and stated not in types:
            raise InputError(f"{where}: {name}: model_type: {shown(stated)} is not {' or '.join(types)}")
    for key, value in config.items():
        if key in ("id2label", "label2id"):
            continue  # whose keys are labels, of any text
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
