"""ModelInfo -> Components: networks built empty, their weights read once, straight to where they will be used."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.components.info import ModelInfo, Part
from genkit.components.registry import NETWORKS
from genkit.components.weights import Tensor, check_shapes
from genkit.device.devices import compute_dtype, usable_cores
from genkit.errors import HostError, InputError, shown
from genkit.files import place

if TYPE_CHECKING:
    import torch

    from genkit.schedulers import Scheduler


@dataclasses.dataclass(frozen=True)
class Components:
    """The loaded parts of a model, in eval mode and without gradients; None is a part that it does not have.

    device: where they are to work; those that were asked for in RAM are not there yet.
    """

    info: ModelInfo
    device: torch.device
    unet: Any = None
    vae: Any = None
    text_encoder: Any = None
    clip: Any = None
    text_encoder_2: Any = None
    tokenizer: Any = None
    tokenizer_2: Any = None
    scheduler: Scheduler | None = None


def load_components(
    info: ModelInfo, *, device: torch.device | str, dtype: torch.dtype, in_ram: Collection[str] = ()
) -> Components:
    """Load what `inspect_model` found, on `device` and in `dtype`: the same numbers as from_pretrained reads.

    dtype: torch.int8 stores the UNet's weights in 8 bits, and everything computes in the device's usual precision.
    in_ram: parts that are to wait in RAM, pinned where a GPU will fetch them. Raises InputError, before memory is
    taken, for a weight that the network lacks, has not, or has in another shape; and afterwards for weights that are
    all zero, or not finite in `dtype`.
    """
    import torch

    from genkit.components.int8 import store_in_8_bits
    from genkit.schedulers import Scheduler

    target, cpu = torch.device(device), torch.device("cpu")
    # All are checked before any is read.
    networks = {name: _build(part) if part.files else construct(part) for name, part in info.parts.items()}
    for name, network in networks.items():
        if not info.parts[name].files:  # fresh weights, as its constructor draws them
            network.to(target).eval().requires_grad_(False)
            if dtype != torch.float32:
                network.to(dtype)
            continue
        stored = dtype == torch.int8 and name == "unet"
        home = cpu if name in in_ram or stored else target  # what is stored in 8 bits need never be there in 16
        pinned = name in in_ram and torch.cuda.is_available()
        _fill(network, info.parts[name], home, compute_dtype(target, dtype), pinned=pinned and not stored)
        if stored:
            store_in_8_bits(network)
            network.to(cpu if name in in_ram else target)
            for tensor in (*network.parameters(), *network.buffers()) if pinned else ():
                tensor.data = tensor.data.pin_memory()
    return Components(
        info=info,
        device=target,
        tokenizer=load_tokenizer(info.tokenizer, text_config(info)),
        tokenizer_2=load_tokenizer(info.tokenizer_2, info.configs.get("text_encoder_2", {})),
        scheduler=Scheduler.from_config(info.scheduler_config) if info.scheduler_config else None,
        **networks,
    )


def _build(part: Part) -> Any:
    """Return the network on the meta device, having compared every name and shape of its weights with the files."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        network = construct(part)
    expected = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    check_shapes(part.tensors, expected, place(part.folder / "config.json"), complete=True)
    return network


def construct(part: Part) -> Any:
    library = NETWORKS[part.kind].library
    cls = getattr(importlib.import_module(library), part.kind)  # both names are the registry's, not the folder's
    try:
        return _CONSTRUCT[library](cls, part.config)
    except Exception as error:  # whatever the library says of keys that the tables let pass
        where = place(part.folder / "config.json")
        raise InputError(f"{where}: {part.kind} cannot be built: {shown(str(error), 300)}") from None


def _fill(network: Any, part: Part, device: torch.device, dtype: torch.dtype, *, pinned: bool) -> None:
    """Read the weights of `part` into `network`. Raises HostError when there is no memory for them."""
    from safetensors import SafetensorError

    from genkit.device.outofmemory import attempt

    place_on = _placer(device, dtype, pinned)
    weights: dict[str, Any] = {}
    for file in part.files:
        wanted = {n: t for n, t in part.tensors.items() if t.file == file}
        try:
            found = attempt(lambda f=file, w=wanted: _read(f, w, device, place_on))  # type: ignore[misc]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{place(file)}: {shown(str(error), 200)}") from None
        if found is None:
            raise HostError(f"{place(file)}: out of memory on {device} as its weights were read")
        weights |= found
    _check_values(weights, part.tensors, dtype)
    network.load_state_dict(weights, strict=True, assign=True)
    network.to(device).eval().requires_grad_(False)


def stored_weights(part: Part) -> dict[str, torch.Tensor]:
    """Return the weights of a network as its files hold them, in RAM; none of one with fresh weights."""
    import torch

    found: dict[str, Any] = {}
    for file in part.files:
        wanted = {n: t for n, t in part.tensors.items() if t.file == file}
        found |= _read(file, wanted, torch.device("cpu"), lambda w: w)
    return found


def _read(
    file: Path, tensors: Mapping[str, Tensor], device: torch.device, place_on: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """Return the weights of one file, a few at a time: on a GPU nothing is there twice.

    A copy in RAM is mostly the system's work, page by page, and several threads share that.
    """
    from safetensors import safe_open

    threads = ThreadPoolExecutor(min(4, usable_cores()), "genkit-load") if device.type == "cpu" else None
    with safe_open(file, framework="pt", device=str(device)) as weights, threads or contextlib.nullcontext():
        read = (weights.get_tensor(tensor.key) for tensor in tensors.values())
        return dict(zip(tensors, map(place_on, read) if threads is None else threads.map(place_on, read), strict=True))


def _placer(device: torch.device, dtype: torch.dtype, pinned: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what turns a weight as read into one of `dtype` in memory of its own.

    On the CPU that is a copy, whatever the dtype: a view of the file would change, or crash, with the file.
    """
    import torch

    def wanted(weight: torch.Tensor) -> torch.dtype:
        return dtype if weight.is_floating_point() else weight.dtype

    if pinned:
        return lambda w: torch.empty(w.shape, dtype=wanted(w), pin_memory=True).copy_(w)
    return lambda w: w.to(dtype=wanted(w), copy=device.type == "cpu")


def _check_values(weights: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse weights that no picture can come of; one pass, and one wait for the device."""
    import torch

    names = [name for name, weight in weights.items() if weight.is_floating_point() and weight.numel()]
    extremes = [torch.stack(torch.aminmax(weights[name])) for name in names]  # NaN goes through aminmax
    peaks = torch.stack(extremes).float().abs().amax(dim=1).cpu()
    if float(peaks.max()) == 0:
        raise InputError(f"{place(tensors[names[0]].file)}: every weight is zero")
    for name, peak in zip(names, peaks.tolist(), strict=True):
        if not peak < float("inf"):
            tensor = tensors[name]
            kind = str(dtype).removeprefix("torch.")
            raise InputError(f"{place(tensor.file)}: {tensor.key}: holds a NaN or an infinity as {kind}")


def text_config(info: ModelInfo) -> Mapping[str, Any]:
    clip = info.configs.get("clip", {}).get("text_config", {})
    return info.configs.get("text_encoder", clip)


def load_tokenizer(folder: Path | None, text: Mapping[str, Any]) -> Any:
    """Return the CLIPTokenizer, which cuts prompts to what the text encoder reads, whatever its own config says."""
    from transformers import CLIPTokenizer

    if folder is None:
        return None
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust tokenizers raise plain Exception
        raise InputError(f"{place(folder)}: the tokenizer cannot be read: {shown(str(error), 200)}") from None
    tokenizer.model_max_length = min(tokenizer.model_max_length, text["max_position_embeddings"])
    return tokenizer


_CONSTRUCT: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "diffusers": lambda cls, config: cls(**config),
    "transformers": lambda cls, config: cls(cls.config_class(**config)),
}
