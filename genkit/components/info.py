"""Part and ModelInfo: a checked model, before its weights are loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.components.geometry import Geometry
from genkit.components.weights import DTYPE_NAMES, Tensor, hash_once, sha256
from genkit.errors import shown
from genkit.files import place

SINGLE = "checkpoint"


@dataclasses.dataclass(frozen=True)
class Part:
    """A network of a model.

    name: component, such as "unet". kind: class. folder: where config.json lies. config: with all defaults filled in.
    files, tensors: weight files, and what their headers list under the names that the class uses; empty for a network
    that is to get fresh weights. left_out: the other keys of its config.json.
    """

    name: str
    kind: str
    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...] = ()
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: str | None = None

    @property
    def where(self) -> str:
        """Path of its config.json, for messages."""
        return self.origin or place(self.folder / "config.json")

    @property
    def parameters(self) -> int:
        """Number of elements of all weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """Names of the dtypes of the stored weights."""
        return ", ".join(sorted({DTYPE_NAMES[t.dtype] for t in self.tensors.values()}))


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A checked model of kind "text-to-image", "unconditional" or "clip".

    name: as the user gave it. tokenizer: its folder, or None; tokenizer_2: SDXL's second. zero_empty: use zeros, not
    the embedding of "", where no negative prompt is given. scheduler_config: for Scheduler.from_config; empty for
    "clip". preprocessor: from preprocessor_config.json of a CLIP model, else empty. defaults: num_inference_steps and
    guidance_scale for this model, if known; tuned_steps: the steps of the tuned plan that rows take which set neither
    scheduler nor steps. revision: commit on the hub, or None. notes: what of its files was left out, corrected or
    assumed, a line each. padding: the token that each tokenizer pads with, if not its own. family: of a single file,
    whose path `folder` is then: "SD 1", "SDXL", …; metadata: of that file.
    """

    name: str
    folder: Path
    kind: str
    parts: Mapping[str, Part]
    tokenizer: Path | None = None
    tokenizer_2: Path | None = None
    zero_empty: bool = False
    scheduler_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessor: dict[str, Any] = dataclasses.field(default_factory=dict)
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    variant: str | None = None
    revision: str | None = None
    notes: tuple[str, ...] = ()
    padding: Mapping[str, str] = dataclasses.field(default_factory=dict)
    family: str | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The config of each network by its name: "unet", "vae", "text_encoder", "clip"."""
        return {name: part.config for name, part in self.parts.items()}

    @property
    def refines(self) -> bool:
        """Whether it is SDXL's refiner: of its two text encoders it has the second alone."""
        return "text_encoder_2" in self.parts and "text_encoder" not in self.parts

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the text encoder, or of a CLIP model's text part; empty for others."""
        return self.configs.get("text_encoder", self.configs.get("clip", {}).get("text_config", {}))

    @property
    def embedding_width(self) -> int:
        """The width of the embeddings of a scorer. Raises KeyError for other models."""
        config = self.configs["clip"]
        return int(config["projection_dim"] if "projection_dim" in config else config["vision_config"]["hidden_size"])

    @property
    def geometry(self) -> Geometry | None:
        """Its picture sizes; None for "clip"."""
        if "unet" not in self.parts:
            return None
        return Geometry.of(self.configs["unet"], self.configs.get("vae"), self.refines)

    def describe(self) -> dict[str, Any]:
        """Return what `genkit inspect` prints, as JSON values."""
        found: dict[str, Any] = {"model": self.name, "kind": self.kind, "folder": str(self.folder)}
        found |= {key: value for key in ("family", "variant", "revision") if (value := getattr(self, key)) is not None}
        if self.geometry is not None:
            g = self.geometry
            found |= {"size": f"{g.width}x{g.height}", "size_multiple": g.multiple, "latent_channels": g.channels}
            found |= {"scheduler": self.scheduler_config["_class_name"], **self.defaults}
        found["parameters"] = sum(part.parameters for part in self.parts.values())
        found["components"] = {
            name: {"class": part.kind, "parameters": part.parameters, "dtype": part.dtype}
            for name, part in self.parts.items()
        }
        return {**found, "notes": list(self.notes)} if self.notes else found


def weight_hashes(info: ModelInfo) -> dict[str, str]:
    """Return the SHA-256 of each weight file by its path in the model's folder, or by part/name if it is outside.

    A single file is SINGLE, whatever its name.
    """
    found: dict[str, str] = {}
    for part in info.parts.values():
        for file in part.files:
            inside = file.is_relative_to(info.folder)
            name = file.relative_to(info.folder).as_posix() if inside else f"{part.name}/{file.name}"
            name = SINGLE if file == info.folder else name
            found[name] = found.get(name) or hash_once(file) or sha256(file)
    return found


def file_facts(info: ModelInfo) -> dict[str, Any]:
    """Return the hashes of a single file, as model sites print them, and its metadata; nothing for a folder."""
    if info.family is None:
        return {}
    whole = sha256(info.folder)
    hashes = {"SHA256": whole, "AutoV2": whole[:10], "AutoV3": sha256(info.folder, weights_only=True)[:12]}
    found = {"prediction_type": info.scheduler_config["prediction_type"], "hashes": hashes}
    told = {key: shown(value, 200).strip("'") for key, value in info.metadata.items()}
    return {**found, "metadata": told} if told else found
