"""Textual inversion files (Gal et al. 2022) of every layout to their vectors; without torch, and nothing is unpickled.

Layouts: emb_params (AUTOMATIC1111 and kohya, one text encoder), clip_l and clip_g (SDXL's two), text_encoders_0 and
text_encoders_1 (diffusers' scripts for SDXL), one key that is the word (learned_embeds.safetensors of diffusers), and
string_to_param.* (an original file, flattened).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.components.weights import DTYPE_NAMES, ITEM_BYTES, PICKLES, Tensor, read_file, sha256, shape_text
from genkit.errors import InputError, shown
from genkit.files import file_size, place

if TYPE_CHECKING:
    import numpy as np

PICTURE_MARK = b"sd-ti-embedding"  # the text chunk of AUTOMATIC1111's pictures that hold an embedding
ENCODERS = ("text_encoder", "text_encoder_2")
# Keys with a meaning of their own, and the text encoder that their vectors belong to
KEYS = {
    "emb_params": "text_encoder", "*": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2",
}  # fmt: skip
ORIGINAL = "string_to_param."
LEFT_OUT = re.compile(r"string_to_token\..*|step|sd_checkpoint.*|name|requires_grad_params")  # beside string_to_param
_MODULE = re.compile(r"weight|bias|\w+(\.\w+)*\.[A-Za-z_]\w*")  # a weight of a network, and no word
FAMILIES = {(768,): "SD 1", (1024,): "SD 2", (768, 1280): "SDXL"}  # by the widths of their vectors
MOST_VECTORS = 1024  # of a file; a prompt has room for far fewer
UNPICKLE = (
    "is refused: a pickle can run code: save its vectors as .safetensors where you trust it (docs/other-tools.md)"
)


@dataclasses.dataclass(frozen=True)
class EmbeddingFile:
    """A textual inversion file: its tensor for each text encoder, (vectors, width) or (width,).

    layout: how the file names them; name: the word that the file itself gives, if any.
    """

    path: Path
    layout: str
    tensors: Mapping[str, Tensor]
    name: str | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def vectors(self) -> int:
        """How many tokens of a prompt its word takes."""
        shape = next(iter(self.tensors.values())).shape
        return shape[0] if len(shape) == 2 else 1

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of the vectors for each text encoder."""
        return tuple(tensor.shape[-1] for tensor in self.tensors.values())

    @property
    def family(self) -> str | None:
        """The family of models whose text encoders have these widths; None for others."""
        return FAMILIES.get(self.widths)

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of the whole file, in hex."""
        return sha256(self.path)

    @functools.cached_property
    def values(self) -> dict[str, np.ndarray]:
        """The vectors for each text encoder, (vectors, width), in their precision; bfloat16 as float32.

        Raises InputError for a NaN or an infinity.
        """
        import numpy as np

        found = {}
        for encoder, tensor in self.tensors.items():
            values = _array(tensor).reshape(-1, tensor.shape[-1])
            if not np.isfinite(values).all():
                raise InputError(f"{place(self.path)}: {shown(tensor.key)}: holds a NaN or an infinity")
            found[encoder] = values
        return found

    def facts(self) -> dict[str, Any]:
        """Return what `genkit inspect` prints, as JSON values."""
        told = {key: shown(value, 200).strip("'") for key, value in self.metadata.items()}
        _ = self.values  # raises if they are not finite
        return {
            "file": str(self.path),
            "kind": "textual inversion",
            "word": self.name or self.path.stem,
            "vectors": self.vectors,
            "width": " and ".join(map(str, self.widths)),
            **({"family": self.family} if self.family else {}),
            "layout": self.layout,
            "dtype": ", ".join(sorted({DTYPE_NAMES[tensor.dtype] for tensor in self.tensors.values()})),
            "hashes": {"SHA256": self.sha256, "AutoV2": self.sha256[:10], "TI hash": self.sha256[:12]},
            **({"metadata": told} if told else {}),
        }


def is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file of these tensors, by key, is a textual inversion."""
    if any(key in KEYS or key.startswith(ORIGINAL) for key in tensors):
        return True
    words = len(tensors) == 1 or all(re.fullmatch("<.*>", key) for key in tensors)
    return words and all(_shaped(t) and not _MODULE.fullmatch(key) for key, t in tensors.items())


def read_embedding(path: Path, kind_of: Callable[[Mapping[str, Tensor]], str]) -> EmbeddingFile:
    """Return what a textual inversion file holds; of its tensors only the header is read.

    kind_of: says what a file of other tensors is. Raises InputError for pickles, for pictures that hold an embedding,
    for files of another kind, and for tensors that are no vectors.
    """
    where = place(path)
    if path.suffix.lower() in PICKLES:
        file_size(path)  # is it there?
        raise InputError(f"{where}: {UNPICKLE}")
    if path.suffix.lower() in (".png", ".webp", ".jxl", ".avif"):
        file_size(path)
        raise InputError(f"{where}: is a picture: embeddings in pictures are not read, only .safetensors")
    tensors, metadata = read_file(path)
    by_key = {tensor.key: tensor for tensor in tensors}
    if not is_embedding(by_key):
        raise InputError(f"{where}: is no textual inversion: it {kind_of(by_key)}")
    layout, name, found = _layout(by_key, where)
    for tensor in found.values():
        _check(tensor, where)
    if len({tensor.shape[0] if len(tensor.shape) == 2 else 1 for tensor in found.values()}) > 1:
        shapes = " and ".join(shape_text(tensor.shape) for tensor in found.values())
        raise InputError(f"{where}: has {shapes}: not the same number of vectors for both text encoders")
    return EmbeddingFile(path, layout, found, name, metadata)


def check_fit(file: EmbeddingFile, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError unless the vectors fit a model's text encoders, by width, and a prompt, by number.

    configs: of each network of the model.
    """
    where = place(file.path)
    encoders = [name for name in ENCODERS if name in configs]
    if not encoders:
        raise InputError(f"{where}: is a textual inversion, and this model reads no prompts")
    made = f", made for {file.family}" if file.family else ""
    own = tuple(configs[name]["hidden_size"] for name in encoders)
    this = f" ({FAMILIES[own]})" if own in FAMILIES else ""
    for name in ENCODERS:
        if name in encoders and name not in file.tensors:
            key = "clip_g" if name == "text_encoder_2" else "clip_l"
            raise InputError(
                f"{where}: has vectors of width {_widths(file.widths)}{made}, and none ({key}) for this model's "
                f"{name}, of width {configs[name]['hidden_size']}{this}"
            )
        if name in file.tensors and name not in encoders:
            raise InputError(
                f"{where}: has vectors for two text encoders (clip_l and clip_g){made or ', made for SDXL'}; "
                f"this model has one, of width {_widths(own)}{this}"
            )
    for name, width in zip(encoders, own, strict=True):
        if file.tensors[name].shape[-1] != width:
            raise InputError(
                f"{where}: has vectors of width {file.tensors[name].shape[-1]}{made}; "
                f"this model's {name} has width {width}{this}"
            )
    room = min(configs[name]["max_position_embeddings"] for name in encoders) - 2  # without start and end
    if file.vectors > room:
        raise InputError(f"{where}: has {file.vectors} vectors, and a prompt has room for {room} tokens")


def _widths(widths: tuple[int, ...]) -> str:
    return " and ".join(map(str, widths))


def _layout(by_key: Mapping[str, Tensor], where: str) -> tuple[str, str | None, dict[str, Tensor]]:
    """Return the layout's name, the file's own word or None, and the tensor of each text encoder, in their order."""
    original = [key for key in by_key if key.startswith(ORIGINAL)]
    named = [key for key in by_key if key in KEYS]
    if original:
        chosen, layout = {key: "text_encoder" for key in original}, "string_to_param"
    elif named:
        chosen, layout = {key: KEYS[key] for key in named}, " and ".join(sorted(named))
    else:
        chosen, layout = dict.fromkeys(by_key, "text_encoder"), "diffusers"
    extra = next((key for key in by_key if key not in chosen and not LEFT_OUT.fullmatch(key)), None)
    if extra is not None or len(set(chosen.values())) < len(chosen):
        keys = ", ".join(map(shown, list(by_key)[:4]))
        raise InputError(f"{where}: has the keys {keys}: more than one word, and a textual inversion has one")
    found = {encoder: by_key[key] for encoder in ENCODERS for key, name in chosen.items() if name == encoder}
    return layout, next(iter(chosen)) if layout == "diffusers" else None, found


def _shaped(tensor: Tensor) -> bool:
    return tensor.dtype in ("F64", "F32", "F16", "BF16") and len(tensor.shape) in (1, 2)


def _check(tensor: Tensor, where: str) -> None:
    if not _shaped(tensor):
        what = f"{DTYPE_NAMES[tensor.dtype]} of shape {shape_text(tensor.shape)}"
        raise InputError(f"{where}: {shown(tensor.key)}: is {what}, not vectors x width of floats")
    if 0 in tensor.shape:
        raise InputError(f"{where}: {shown(tensor.key)}: holds no vectors: its shape is {shape_text(tensor.shape)}")
    if len(tensor.shape) == 2 and tensor.shape[0] > MOST_VECTORS:
        raise InputError(f"{where}: {shown(tensor.key)}: has {tensor.shape[0]} vectors, more than any prompt reads")


def _array(tensor: Tensor) -> np.ndarray:
    """Return a tensor of a file, flat; bfloat16, which numpy has not, as the float32 of the same value."""
    import numpy as np

    count = int(np.prod(tensor.shape))
    with open(tensor.file, "rb") as file:
        file.seek(tensor.start)
        data = file.read(count * ITEM_BYTES[tensor.dtype])
    if len(data) < count * ITEM_BYTES[tensor.dtype]:
        raise InputError(f"{place(tensor.file)}: {shown(tensor.key)}: the file ends within it")
    if tensor.dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor.dtype])
