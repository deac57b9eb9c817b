"""Weight files: the safetensors header of every shard, read and checked without reading the weights.

Format: 8 bytes little-endian N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, which the offsets
must tile without gap or overlap (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from genkit.components.shapes import Shapes
from genkit.errors import InputError, nearest, shown
from genkit.files import file_size, parse_json, place, read_json

HEADER_LIMIT = 2**24  # bytes; the header of a UNet of 2,600 million parameters has 0.2 million
TENSOR_LIMIT = 2**16
RANK_LIMIT = 8
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
CONVERT = "weights that unpickle can run code: load them once where you trust them, then save_pretrained(folder)"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ENTRY = {"dtype", "shape", "data_offsets"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One weight as a header describes it: its name in `file`, dtype ("F16") and shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


def wanted_weights(folder: Path, stem: str, variant: str | None) -> tuple[Path, ...]:
    """Return the safetensors files that a component is made of: one, or the shards that its index names.

    Raises InputError when both are there, or when the index names anything but files beside it.
    """
    single = folder / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
    index = folder / (f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json")
    if not os.path.lexists(index):
        return (single,)
    if os.path.lexists(single):
        raise InputError(f"{place(index)}: and {single.name} are both there: remove the one that is not meant")
    return tuple(index.parent / name for name in sorted(set(_weight_map(index).values())))


def find_weights(folder: Path, stem: str, variant: str | None) -> tuple[Path, ...]:
    """Return `wanted_weights`, which are there; shards hold what their index says.

    Raises InputError when they are absent, naming the pickle or the other variant that is there instead.
    """
    files = wanted_weights(folder, stem, variant)
    for file in files:
        if not os.path.lexists(file):
            raise InputError(f"{place(file)}: is absent{_instead(folder, stem, variant)}")
    index = folder / (f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json")
    if os.path.lexists(index):
        _check_shards(index, files)
    return files


def _instead(folder: Path, stem: str, variant: str | None) -> str:
    """Return what else a folder without the wanted weights has, as the end of the message."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    pickle = next((name for name in names if name.endswith(PICKLES)), None)
    if pickle:
        return f", and {shown(pickle)} is refused: {CONVERT}"
    others = [name for name in names if name.startswith(stem + ".") and ".safetensors" in name]
    if variant and others:
        return f": no variant {variant!r} here, only {shown(others[0])}"
    return f": to take {shown(others[0])}, name its variant" if others else ""


def _weight_map(index: Path) -> dict[str, str]:
    """Return {weight: file name} of a shard index."""
    content = read_json(index, HEADER_LIMIT)
    weight_map = content.get("weight_map")
    unknown = next((key for key in content if key not in ("metadata", "weight_map")), None)
    if unknown is not None:
        raise InputError(f"{place(index)}: {shown(unknown)}: unknown key{nearest(unknown, ['metadata', 'weight_map'])}")
    if not isinstance(weight_map, dict) or not 0 < len(weight_map) <= TENSOR_LIMIT:
        raise InputError(f"{place(index)}: weight_map: {shown(weight_map)} is not an object of names and files")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors", name):
            raise InputError(
                f"{place(index)}: {shown(key)}: {shown(name)} is not the name of a .safetensors file beside it"
            )
    return weight_map


def _check_shards(index: Path, shards: Iterable[Path]) -> None:
    weight_map = _weight_map(index)
    held = {tensor.key: tensor.file.name for shard in shards for tensor in read_header(shard)}
    for key, name in weight_map.items():
        if held.get(key) != name:
            raise InputError(f"{place(index)}: {shown(key)}: is not in {name}")
    extra = next((key for key in held if key not in weight_map), None)
    if extra is not None:
        raise InputError(f"{place(index)}: {shown(extra)}: is in {held[extra]}, but not in weight_map")


def read_header(path: Path) -> list[Tensor]:
    """Return the tensors of a safetensors file, having read no more than its header.

    Raises InputError for a header that is no such, is too large, or does not describe the file to the last byte.
    """
    size = file_size(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            what = (
                "a pickle or archive"
                if start[:2] in (b"\x80\x02", b"\x80\x04", b"PK")
                else "cut short or no safetensors"
            )
            raise InputError(f"{place(path)}: is {what}: its {size} bytes hold no header of {length} bytes")
        if length > HEADER_LIMIT:
            raise InputError(f"{place(path)}: header has {length} bytes, more than {HEADER_LIMIT}")
        raw = file.read(length)
    try:
        header = parse_json(raw.decode("utf-8"), f"{place(path)}: header")
    except UnicodeDecodeError:
        raise InputError(f"{place(path)}: header is not UTF-8") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{place(path)}: __metadata__: is not an object of texts")
    if not 0 < len(header) <= TENSOR_LIMIT:
        raise InputError(f"{place(path)}: header has {len(header)} tensors, not 1 to {TENSOR_LIMIT}")
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise InputError(
                f"{place(path)}: {shown(name)}: starts at byte {begin}, where byte {end} is next: gap or overlap"
            )
        end = stop
    if end != size - 8 - length:
        raise InputError(f"{place(path)}: has {size - 8 - length} bytes of weights, but its header describes {end}")
    return [Tensor(path, name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()]


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Return (first byte, end, name) of a header's entry, which must agree with its dtype and shape."""
    where = f"{place(path)}: {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != _ENTRY:
        raise InputError(f"{where}: {shown(entry)} is not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InputError(f"{where}: dtype: {shown(dtype)} is not one of {', '.join(ITEM_BYTES)}")
    if (
        not isinstance(shape, list)
        or len(shape) > RANK_LIMIT
        or not all(type(n) is int and 0 <= n < 2**31 for n in shape)
    ):
        raise InputError(f"{where}: shape: {shown(shape)} is not a list of at most {RANK_LIMIT} sizes below 2^31")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise InputError(f"{where}: data_offsets: {shown(offsets)} is not a pair of byte positions")
    begin, end = offsets
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed:
        raise InputError(f"{where}: takes {end - begin} bytes, but {dtype} of shape {shown(shape)} takes {needed}")
    return begin, end, name


def canonical_tensors(files: Iterable[Path], renames: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the tensors of some files under the names that today's networks use.

    renames: (pattern, replacement); a name that becomes empty is dropped. Raises InputError for a name given twice.
    """
    found: dict[str, Tensor] = {}
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in renames]
    for tensor in (tensor for file in files for tensor in read_header(file)):
        name = tensor.key
        for pattern, replacement in patterns:
            name = pattern.sub(replacement, name)
        if name in found:
            raise InputError(
                f"{place(tensor.file)}: {shown(tensor.key)}: is given twice, also in {found[name].file.name}"
            )
        if name:
            found[name] = tensor
    return found


def check_shapes(tensors: Mapping[str, Tensor], expected: Shapes, where: str, complete: bool) -> None:
    """Raise InputError for a weight that `expected` lacks, has not, or has in another shape.

    where: names the config. complete: whether `expected` lists every weight, so that others are one too many.
    """
    file = next(iter(tensors.values())).file
    if complete:
        for name, tensor in tensors.items():
            if name not in expected:
                hint = nearest(name, expected.keys() - tensors.keys())
                raise InputError(
                    f"{place(tensor.file)}: {shown(tensor.key)}: has no place in the network of {where}{hint}"
                )
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{place(file)}: {name}: is missing, of shape {_text(shape)} by {where}")
        tensor = tensors[name]
        if tensor.shape != shape:
            turned = " (transposed)" if tensor.shape == shape[::-1] else ""
            raise InputError(
                f"{place(tensor.file)}: {tensor.key}: has shape {_text(tensor.shape)}{turned}, "
                f"but {where} asks for {_text(shape)}"
            )


def _text(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
