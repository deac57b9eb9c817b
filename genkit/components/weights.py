"""Weight files: safetensors headers and shard indices, read and checked without reading the weights.

Format: 8 bytes little-endian N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, which the offsets
must cover without gap or overlap (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from genkit.components.hashcache import shared
from genkit.components.shapes import Shapes
from genkit.errors import InputError, nearest, shown
from genkit.files import file_size, parse_json, place, read_json, refuse_pointer

HEADER_LIMIT = 2**24  # bytes; the header of SDXL's UNet, 2.6 billion parameters, has 0.2 million
TENSOR_LIMIT = 2**16
RANK_LIMIT = 8
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
CONVERT = "weights that unpickle can run code: load them once where you trust them, then save_pretrained(folder)"
DTYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A weight of `file`: key (its name there), dtype ("F16"), and the shape in which the network uses it.

    start: its first byte in the file. stored: how the file has it where that differs: "turned" (transposed), "flat" (a
    linear layer as a 1x1 convolution), or "0/3" (the first third of its rows).
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stored: str = ""

    @property
    def part(self) -> tuple[int, int]:
        """Which part of the stored rows it is, and of how many: (0, 1) is all of them."""
        index, slash, count = self.stored.partition("/")
        return (int(index), int(count)) if slash else (0, 1)

    def taken(self, weight: Any) -> Any:
        """Return the weight that the network takes, given the one in the file."""
        if self.stored == "turned":
            return weight.T.contiguous()
        index, count = self.part
        return weight.chunk(count)[index] if count > 1 else weight.reshape(self.shape)

    def as_taken(self, stored: str) -> Tensor:
        """Return this weight of a file as one that is `stored` in such a way. Raises InputError if it cannot be."""
        shape = self.shape
        if stored == "turned" and len(shape) == 2:
            shape = shape[::-1]
        elif stored == "flat" and len(shape) == 4 and shape[2:] == (1, 1):
            shape = shape[:2]
        elif "/" in stored and shape and shape[0] % int(stored[2:]) == 0:
            shape = (shape[0] // int(stored[2:]), *shape[1:])
        else:
            raise InputError(
                f"{place(self.file)}: {shown(self.key)}: has shape {shape_text(shape)}, which cannot be {stored}"
            )
        return dataclasses.replace(self, shape=shape, stored=stored)


def wanted_weights(folder: Path, stem: str, variant: str | None) -> tuple[Path, ...]:
    """Return the safetensors files of a network: a single file, or the shards that its index names.

    stem: the name before ".safetensors". The files need not exist. Raises InputError where there are both a single file
    and an index, and for an index that names anything but files beside it.
    """
    single, index = _names(folder, stem, variant)
    if not os.path.lexists(index):
        return (single,)
    if os.path.lexists(single):
        raise InputError(f"{place(index)}: and {single.name} are both there: remove the one that is not meant")
    return tuple(index.parent / name for name in sorted(set(_weight_map(index).values())))


def read_weights(
    folder: Path, stem: str, variant: str | None, renames: Iterable[tuple[str, str]]
) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """Return the weight files of a network, and their tensors under the names that its class uses.

    renames: (regular expression, replacement); a name that becomes empty is dropped. Raises InputError for a missing
    file, naming a pickle or another variant that is there instead, for shards that do not hold what their index says,
    and for two tensors of one name.
    """
    files = wanted_weights(folder, stem, variant)
    for file in files:
        if not os.path.lexists(file):
            raise InputError(f"{place(file)}: is absent{_instead(folder, stem, variant)}")
    tensors = [tensor for file in files for tensor in read_header(file)]
    _, index = _names(folder, stem, variant)
    if os.path.lexists(index):
        _check_shards(index, {tensor.key: tensor.file.name for tensor in tensors})
    found: dict[str, Tensor] = {}
    for tensor in tensors:
        name = tensor.key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise InputError(
                f"{place(tensor.file)}: {shown(tensor.key)}: is given twice, also in {found[name].file.name}"
            )
        if name:
            found[name] = tensor
    return files, found


def _names(folder: Path, stem: str, variant: str | None) -> tuple[Path, Path]:
    """Return the paths of a single weight file and of a shard index, as diffusers and transformers name them."""
    single = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    index = f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
    return folder / single, folder / index


def _instead(folder: Path, stem: str, variant: str | None) -> str:
    """Return the end of the message for a missing file: a pickle or another variant that the folder has instead."""
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


def _check_shards(index: Path, held: Mapping[str, str]) -> None:
    """Check {weight: file name} of the shards against their index."""
    weight_map = _weight_map(index)
    for key, name in weight_map.items():
        if held.get(key) != name:
            raise InputError(f"{place(index)}: {shown(key)}: is not in {name}")
    extra = next((key for key in held if key not in weight_map), None)
    if extra is not None:
        raise InputError(f"{place(index)}: {shown(extra)}: is in {held[extra]}, but not in weight_map")


def read_header(path: Path) -> list[Tensor]:
    """Return the tensors of a safetensors file; only its header is read. Raises InputError as `read_file` does."""
    return read_file(path)[0]


def read_file(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, by its header, and its metadata.

    Raises InputError for another kind of file, a header that is too large, and one that does not describe every byte.
    """
    size = file_size(path)
    with open(path, "rb") as file:
        start = file.read(64)
        refuse_pointer(start, path)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            pickled = start[:2] in (b"\x80\x02", b"\x80\x04", b"PK")
            what = "a pickle or archive" if pickled else "cut short or no safetensors"
            raise InputError(f"{place(path)}: is {what}: its {size} bytes hold no header of {length} bytes")
        if length > HEADER_LIMIT:
            raise InputError(f"{place(path)}: header has {length} bytes, more than {HEADER_LIMIT}")
        file.seek(8)
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
    first = 8 + length
    return [
        Tensor(path, name, entry["dtype"], tuple(entry["shape"]), first + entry["data_offsets"][0])
        for name, entry in header.items()
    ], metadata


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Return (first byte, end, name) of a header's entry. Raises InputError where they contradict dtype and shape."""
    where = f"{place(path)}: {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: {shown(entry)} is not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InputError(f"{where}: dtype: {shown(dtype)} is not one of {', '.join(ITEM_BYTES)}")
    sizes = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    if not sizes or len(shape) > RANK_LIMIT:
        raise InputError(f"{where}: shape: {shown(shape)} is not a list of at most {RANK_LIMIT} sizes below 2^31")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise InputError(f"{where}: data_offsets: {shown(offsets)} is not a pair of byte positions")
    begin, end = offsets
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed:
        raise InputError(f"{where}: takes {end - begin} bytes, but {dtype} of shape {shown(shape)} takes {needed}")
    return begin, end, name


def check_shapes(tensors: Mapping[str, Tensor], expected: Shapes, where: str, complete: bool) -> None:
    """Raise InputError for a weight that is missing or has another shape than expected.

    where: the config that implies the shapes, for messages. complete: `expected` lists every weight of the network, so
    that any other one is an error too.
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
            raise InputError(f"{place(file)}: {name}: is missing, of shape {shape_text(shape)} by {where}")
        tensor = tensors[name]
        if tensor.shape != shape:
            turned = " (transposed)" if tensor.shape == shape[::-1] else ""
            raise InputError(
                f"{place(tensor.file)}: {tensor.key}: has shape {shape_text(tensor.shape)}{turned}, "
                f"but {where} asks for {shape_text(shape)}"
            )


def shape_text(shape: Iterable[int]) -> str:
    """Return a shape for messages, as in 320x4x3x3."""
    return "x".join(map(str, shape)) or "scalar"


def hash_once(path: str | Path, weights_only: bool = False) -> str | None:
    """Return `sha256` of a file, computed once as long as it does not change; None for one that is not there.

    Of a large file once for all processes of this machine: see hashcache.py.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return _hashed(Path(path), status.st_ino, status.st_size, status.st_mtime_ns, weights_only)


@functools.lru_cache(1024)
def _hashed(path: Path, _inode: int, _size: int, _changed: int, weights_only: bool) -> str:
    return shared(path, "weights" if weights_only else "whole", lambda: sha256(path, weights_only))


def sha256(path: Path, weights_only: bool = False) -> str:
    """Return the SHA-256 of a file in hex, or of what follows a safetensors file's header; it is read in pieces."""
    with open(path, "rb") as file:
        if weights_only:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()
