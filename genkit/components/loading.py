"""ModelInfo to Components: networks are built without weights, which are then read straight to their device."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.components.info import ModelInfo, Part
from genkit.components.registry import NETWORKS
from genkit.components.siglip import SiglipTokenizer
from genkit.components.weights import DTYPE_NAMES, ITEM_BYTES, Tensor, check_shapes
from genkit.device.devices import compute_dtype, usable_cores
from genkit.errors import HostError, InputError, shown
from genkit.files import place, read_json
from genkit.phases import phase

if TYPE_CHECKING:
    import torch

    from genkit.schedulers import Scheduler


@dataclasses.dataclass(frozen=True)
class Components:
    """The loaded components of a model, in eval mode and without gradients; None for those that it does not have.

    device: where the networks run; those that were loaded with `in_ram` are not on it yet.
    """

    info: ModelInfo
    device: torch.device
    unet: Any = None
    vae: Any = None
    text_encoder: Any = None
    clip: Any = None
    text_encoder_2: Any = None
    controlnet: Any = None  # of a model that one is trained for
    tokenizer: Any = None
    tokenizer_2: Any = None
    scheduler: Scheduler | None = None


def load_components(
    info: ModelInfo, *, device: torch.device | str, dtype: torch.dtype, in_ram: Collection[str] = ()
) -> Components:
    """Load the model that `inspect_model` checked; weights are equal to those that from_pretrained loads.

    dtype: torch.int8 stores the UNet's weights in 8 bits, and computes in the device's usual precision. in_ram: parts
    to keep in RAM, pinned if there is a GPU. Raises InputError for missing or additional weights and wrong shapes,
    before memory is allocated, and for weights that are all zero or not finite in `dtype`.
    """
    import torch

    from genkit.components.int8 import store_in_8_bits
    from genkit.schedulers import Scheduler

    target, cpu = torch.device(device), torch.device("cpu")
    networks = {}  # every one is checked before any weight is read
    for name, part in info.parts.items():
        with phase(f"{name}: import and build"):
            networks[name] = _build(part) if part.files else construct(part)
    for name, network in networks.items():
        if not info.parts[name].files:  # fresh weights, drawn by the constructor
            network.to(target).eval().requires_grad_(False)
            if dtype != torch.float32:
                network.to(dtype)
            continue
        stored = dtype == torch.int8 and name == "unet"
        home = cpu if name in in_ram or stored else target  # the device never holds the 16-bit weights
        pinned = name in in_ram and torch.cuda.is_available()
        with phase(f"{name}: read weights"):
            _fill(network, info.parts[name], home, compute_dtype(target, dtype), pinned=pinned and not stored)
        if stored:
            store_in_8_bits(network)
            network.to(cpu if name in in_ram else target)
            for tensor in (*network.parameters(), *network.buffers()) if pinned else ():
                tensor.data = tensor.data.pin_memory()
    return Components(
        info=info,
        device=target,
        tokenizer=_tokenizer_of(info),
        tokenizer_2=load_tokenizer(
            info.tokenizer_2, info.configs.get("text_encoder_2", {}), info.padding.get("tokenizer_2")
        ),
        scheduler=Scheduler.from_config(info.scheduler_config) if info.scheduler_config else None,
        **networks,
    )


def load_network(part: Part, *, device: torch.device, dtype: torch.dtype, in_ram: bool = False) -> Any:
    """Load a network that is given beside a model, as `load_components` loads those of one."""
    import torch

    network = _build(part)
    home = torch.device("cpu") if in_ram else device
    _fill(network, part, home, compute_dtype(device, dtype), pinned=in_ram and torch.cuda.is_available())
    return network


def _tokenizer_of(info: ModelInfo) -> Any:
    """Return the tokenizer of a model, or the first of SDXL's."""
    if "clip" in info.parts and info.parts["clip"].kind == "SiglipModel" and info.tokenizer is not None:
        return SiglipTokenizer(info.tokenizer, info.text_config)
    return load_tokenizer(info.tokenizer, info.text_config, info.padding.get("tokenizer"))


def _build(part: Part) -> Any:
    """Return the network on the meta device, once names and shapes of its weights are those in the files."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        network = construct(part)
    check_stored(network.state_dict(), part.tensors, part.where)
    return network


def check_stored(state: Mapping[str, torch.Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise InputError unless files hold the weights of a network's state dict, in name, shape and kind of number."""
    check_shapes(tensors, {name: tuple(weight.shape) for name, weight in state.items()}, where, complete=True)
    for name, weight in state.items():
        tensor = tensors[name]
        if weight.is_floating_point() and "float" not in DTYPE_NAMES[tensor.dtype]:
            kind = DTYPE_NAMES[tensor.dtype]
            raise InputError(f"{place(tensor.file)}: {shown(tensor.key)}: is of {kind}, not of floating-point numbers")


def construct(part: Part) -> Any:
    """Return a new network of the part's class and config, with random weights. Raises InputError."""
    library = NETWORKS[part.kind].library
    cls = getattr(importlib.import_module(library), part.kind)  # names from the registry, never from a folder
    taken = inspect.signature(cls.__init__).parameters  # a newer library may know more than the tables of keys.py
    for key, value in part.left_out.items():
        if key in taken and value != taken[key].default and library == "diffusers":
            raise InputError(f"{part.where}: {key}: {shown(value)}: the installed {library} knows it, genkit does not")
    try:
        return _CONSTRUCT[library](cls, part.config)
    except Exception as error:  # the library refuses a combination of values that the tables allow
        raise InputError(f"{part.where}: {part.kind} cannot be built: {shown(str(error), 300)}") from None


def _fill(network: Any, part: Part, device: torch.device, dtype: torch.dtype, *, pinned: bool) -> None:
    """Read the weights of `part` into `network`. Raises HostError when memory runs out."""
    network.load_state_dict(read_network(part, device, dtype, pinned=pinned), strict=True, assign=True)
    network.to(device).eval().requires_grad_(False)


def read_network(part: Part, device: torch.device, dtype: torch.dtype, *, pinned: bool = False) -> dict[str, Any]:
    """Return the weights of `part` on `device`, the floats among them as `dtype`.

    Raises InputError for weights that are all zero or not finite, HostError when memory runs out.
    """
    import torch
    from safetensors import SafetensorError

    from genkit.device.outofmemory import attempt

    def convert(weight: torch.Tensor) -> torch.Tensor:
        kind = dtype if weight.is_floating_point() else weight.dtype
        return torch.empty(weight.shape, dtype=kind, pin_memory=True).copy_(weight) if pinned else weight.to(kind)

    weights: dict[str, Any] = {}
    for file in part.files:
        try:
            found = attempt(lambda file=file: _read(file, part.tensors, device, convert))  # type: ignore[misc]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{place(file)}: {shown(str(error), 200)}") from None
        if found is None:
            raise HostError(f"{place(file)}: out of memory on {device} as its weights were read")
        weights |= found
    _check_values(weights, part.tensors, dtype)
    return weights


def stored_weights(part: Part) -> dict[str, torch.Tensor]:
    """Return the weights of a network in RAM, as its files hold them; none for fresh weights."""
    import torch

    found: dict[str, Any] = {}
    for file in part.files:
        found |= _read(file, part.tensors, torch.device("cpu"), lambda weight: weight)
    return found


def _read(
    file: Path, tensors: Mapping[str, Tensor], device: torch.device, convert: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """Return the weights of one file, converted one after another, so that a GPU never holds all of them twice.

    Into RAM they are read by several threads, which share the time of page faults, and never mapped: mapped pages count
    as memory of the process too, and a mapped weight changes, or crashes the process, if the file changes.
    """
    from safetensors import safe_open

    wanted = {name: tensor for name, tensor in tensors.items() if tensor.file == file}
    if device.type == "cpu":
        with ThreadPoolExecutor(min(4, usable_cores()), "genkit-load") as threads:
            found = threads.map(lambda tensor: convert(_read_one(tensor)), wanted.values())
            return dict(zip(wanted, found, strict=True))
    with safe_open(file, framework="pt", device=str(device)) as weights:
        read = (tensor.taken(weights.get_tensor(tensor.key)) for tensor in wanted.values())
        return dict(zip(wanted, map(convert, read), strict=True))


def _read_one(tensor: Tensor) -> torch.Tensor:
    """Return a weight in RAM as the network takes it; of a part, only its rows are read. Raises OSError at the end."""
    import torch

    size = ITEM_BYTES[tensor.dtype] * math.prod(tensor.shape)
    found = torch.empty(size, dtype=torch.uint8)
    view, done = memoryview(found.numpy().data), 0
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.start + size * tensor.part[0])
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise OSError(f"{shown(tensor.key)}: the file ends within it")
            done += count
    weight = found.view(getattr(torch, DTYPE_NAMES[tensor.dtype]))
    return weight.view(tensor.shape[::-1]).T.contiguous() if tensor.stored == "turned" else weight.view(tensor.shape)


def _check_values(weights: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise InputError if all weights are zero or one is not finite; a single synchronisation with the device."""
    import torch

    names = [name for name, weight in weights.items() if weight.is_floating_point() and weight.numel()]
    extremes = [torch.stack(torch.aminmax(weights[name])) for name in names]  # aminmax propagates NaN
    peaks = torch.stack(extremes).float().abs().amax(dim=1).cpu()
    if float(peaks.max()) == 0:
        raise InputError(f"{place(tensors[names[0]].file)}: every weight is zero")
    for name, peak in zip(names, peaks.tolist(), strict=True):
        if not peak < float("inf"):
            tensor = tensors[name]
            kind = str(dtype).removeprefix("torch.")
            raise InputError(f"{place(tensor.file)}: {tensor.key}: holds a NaN or an infinity as {kind}")


def load_tokenizer(folder: Path | None, text: Mapping[str, Any], padding: str | None = None) -> Any:
    """Return the CLIPTokenizer of a folder, which truncates to what the text encoder with config `text` reads.

    padding: the token to pad with, if not its own.
    """
    from transformers import CLIPTokenizer

    if folder is None:
        return None
    try:
        with phase("read tokenizer"):
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **_as_tokens(folder))
    except Exception as error:  # the Rust tokenizers raise plain Exception
        raise InputError(f"{place(folder)}: the tokenizer cannot be read: {shown(str(error), 200)}") from None
    most = text["max_position_embeddings"]
    if padding is not None:
        tokenizer.pad_token = padding
    tokenizer.model_max_length = min(tokenizer.model_max_length or most, most)
    return tokenizer


def _as_tokens(folder: Path) -> dict[str, Any]:
    """Return additional_special_tokens where they are plain objects, which transformers writes but does not read."""
    from transformers import AddedToken

    path = folder / "tokenizer_config.json"
    stated = read_json(path).get("additional_special_tokens") if path.exists() else None
    if not any(isinstance(token, dict) and "__type" not in token for token in stated or ()):
        return {}
    fields = ("content", "lstrip", "rstrip", "normalized", "single_word")
    plain = [t if isinstance(t, str) else AddedToken(**{k: t[k] for k in fields if k in t}) for t in stated or ()]
    return {"additional_special_tokens": plain}


def _of_transformers(cls: Any, config: Mapping[str, Any]) -> Any:
    """Build a network. SigLIP reads no ids of special tokens, and transformers would warn of its own defaults."""
    if cls.__name__ == "SiglipModel":
        config = {**config, "text_config": {**config["text_config"], **dict.fromkeys(_IDS)}}
    return cls(cls.config_class(**config))


_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CONSTRUCT: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "diffusers": lambda cls, config: cls(**config),
    "transformers": _of_transformers,
}
