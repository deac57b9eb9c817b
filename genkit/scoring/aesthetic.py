"""A linear head over CLIP embeddings, e.g. an aesthetic predictor trained on ratings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from genkit.components.weights import read_header
from genkit.errors import InputError, shown

DTYPES = ("F16", "F32", "F64")


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear head: score = weight . embedding + bias, for a unit embedding."""

    weight: np.ndarray  # (width,) float64
    bias: float

    @classmethod
    def load(cls, path: Path) -> Head:
        """Read a file that `check_head` accepts. Raises InputError if it contains NaN or infinity."""
        from safetensors.numpy import load_file

        tensors = {name: value.astype(np.float64) for name, value in load_file(path).items()}
        if not all(np.isfinite(value).all() for value in tensors.values()):
            raise InputError(f"--aesthetic: {path}: holds numbers that are not finite")
        return cls(tensors["weight"][0], float(tensors["bias"][0]))

    def __call__(self, image: np.ndarray) -> float:
        """Return the score of a unit embedding (width,)."""
        return round(float(self.weight @ image) + self.bias, 6)


def check_head(path: Path, width: int) -> None:
    """Raise InputError, by the header only, unless the file has exactly weight [1, width] and bias [1]."""
    if not path.is_file():
        raise InputError(f"--aesthetic: {shown(str(path))}: no such file")
    try:
        found = {tensor.key: tensor for tensor in read_header(path)}
    except InputError as error:
        raise InputError(f"--aesthetic: {error}") from None
    expected = {"weight": (1, width), "bias": (1,)}
    for name in sorted({*found, *expected}):
        if name not in found or name not in expected:
            said = "is absent" if name in expected else "does not belong there"
            raise InputError(
                f"--aesthetic: {path}: {shown(name)} {said}; a head holds weight [1, {width}] and bias [1]"
            )
        if found[name].shape != expected[name]:
            raise InputError(
                f"--aesthetic: {path}: {name} has shape {list(found[name].shape)}, not {list(expected[name])}: "
                f"the embeddings of the CLIP model are {width} wide"
            )
        if found[name].dtype not in DTYPES:
            raise InputError(f"--aesthetic: {path}: {name} is {found[name].dtype}, not one of {', '.join(DTYPES)}")
