"""LoRA files of every dialect to the modules that they adapt; headers alone are read.

Dialects: kohya (lora_unet_down_blocks_0_…, also with SDXL's original names), diffusers and PEFT
(unet.down_blocks.0.….lora_A.weight, ….processor.to_q_lora.down.weight), ComfyUI (diffusion_model.input_blocks.1.1.…).
Kinds: LoRA and LoCon (Hu et al. 2021), LoHa and LoKr (Yeh et al. 2023, LyCORIS), DoRA (Liu et al. 2024), and whole
differences of weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genkit.components.original import backward, original_name, unet_modules
from genkit.components.weights import PICKLES, Tensor, read_file, shape_text
from genkit.errors import InputError, shown
from genkit.files import place

Shape = tuple[int, ...]
ADAPTED = ("unet", "text_encoder", "text_encoder_2")  # components
MOST_RANK = 4096
# Endings of keys, and the roles that they give a tensor
ROLES = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha",
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora.down.weight": "down", "lora.up.weight": "up", "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up", "_lora.down.weight": "down", "_lora.up.weight": "up",
    "dora_scale": "dora", "lora_magnitude_vector": "dora", "lora_magnitude_vector.weight": "dora",
    "lora_magnitude_vector.default.weight": "dora", "diff": "diff", "diff_b": "diff_b",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}  # fmt: skip
_ENDS = sorted(ROLES, key=len, reverse=True)
_PREFIXES = (
    ("lora_unet_", "unet"), ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"), ("lycoris_", "unet"), ("unet.", "unet"), ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("base_model.model.", "unet"), ("diffusion_model.", "unet"), ("model.diffusion_model.", "unet"),
    ("text_encoders.clip_l.transformer.", "text_encoder"), ("text_encoders.clip_g.transformer.", "text_encoder_2"),
)  # fmt: skip
UNSUPPORTED = ("hada_t1", "hada_t2", "lokr_t2", "diff_b")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The tensors that a file holds for one module, by role.

    alpha: of the file's metadata; if None, that of a tensor "alpha", else the rank. The scale is alpha / rank.
    """

    tensors: Mapping[str, Tensor]
    alpha: float | None = None

    @property
    def low_rank(self) -> bool:
        """Whether it is a product of two small matrices, and so can be applied beside the weight."""
        return set(self.tensors) <= {"down", "up", "alpha"}

    @property
    def rank(self) -> int:
        """The rank of its matrices; 0 for a full difference of weights."""
        found = self.tensors.get("down") or self.tensors.get("hada_w1_b") or self.tensors.get("lokr_w2_b")
        return 0 if found is None else found.shape[0]


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA file that fits a model: {component: {module: Adapter}}, and the keys that found no place."""

    path: Path
    adapters: Mapping[str, Mapping[str, Adapter]]
    unmatched: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def rank(self) -> int:
        """The highest rank among its modules."""
        return max(adapter.rank for found in self.adapters.values() for adapter in found.values())

    def line(self) -> str:
        """Return the message for the user when a run begins."""
        count = {name: len(found) for name, found in self.adapters.items() if found}
        placed = " and ".join(f"{n} modules of {name}" for name, n in count.items())
        left = ", ".join(map(shown, self.unmatched[:3]))
        rest = f"; {len(self.unmatched)} keys have no place and are left out: {left}" if self.unmatched else ""
        return f"{place(self.path)}: adapts {placed}, rank {self.rank}{rest}"


def read_lora(path: Path, shapes: Mapping[str, Mapping[str, Shape]], unet: Mapping[str, Any]) -> LoraFile:
    """Return what a LoRA file adapts in a model.

    shapes: {component: {module: shape of its weight}}; unet: config. Raises InputError for a file without adapters, for
    one whose modules are none of the model's or have other widths (made for another base), and for kinds not supported.
    """
    where = place(path)
    if path.suffix in PICKLES:
        raise InputError(f"{where}: is refused: weights that unpickle can run code: save it as .safetensors first")
    tensors, metadata = read_file(path)
    flat = {
        component: _flattened(modules, unet if component == "unet" else None) for component, modules in shapes.items()
    }
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    unmatched, adapting = [], 0
    for tensor in tensors:
        split = _split(tensor.key)
        if split is None:
            unmatched.append(tensor.key)
            continue
        component, name, role = split
        adapting += 1
        module = flat.get(component, {}).get(_flat(name))
        if module is None:
            unmatched.append(tensor.key)
        elif role in found.setdefault((component, module), {}):
            raise InputError(f"{where}: {shown(tensor.key)}: is given twice")
        else:
            found[component, module][role] = tensor
    if not adapting:
        raise InputError(
            f"{where}: is no LoRA: of its {len(tensors)} keys, such as {shown(tensors[0].key)}, none is one's"
        )
    if not found:
        made = _base(metadata)
        raise InputError(
            f"{where}: none of its {adapting} keys, such as {shown(unmatched[0])}, has a place in this model{made}"
        )
    alphas = _alphas(metadata, where)
    adapters: dict[str, dict[str, Adapter]] = {component: {} for component in shapes}
    for (component, module), roles in found.items():
        adapter = Adapter(roles, alphas.get((component, module), alphas.get((component, ""))))
        _check(adapter, shapes[component][module], f"{where}: {component}.{module}", _base(metadata))
        adapters[component][module] = adapter
    return LoraFile(path, adapters, tuple(unmatched), metadata)


def module_shapes(tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return {module: shape of its weight} of linear layers and convolutions, given all weights' shapes."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in tensors.items()
        if name.endswith(".weight") and not name.endswith("embedding.weight") and len(shape) in (2, 4)
    }


def _split(key: str) -> tuple[str, str, str] | None:
    """Return (component, module, role) of a key, or None if it is not one of an adapter."""
    end = next((e for e in _ENDS if key.endswith(e if e[0] == "_" else f".{e}")), None)
    if end is None:
        return None
    name = key[: -len(end)].removesuffix(".")
    for prefix, component in _PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix).removeprefix("base_model.model.")
            return component, re.sub(r"\.processor(\.|$)", r"\1", name).rstrip("."), ROLES[end]
    return None


def _flat(name: str) -> str:
    """Return a module's name without dots, as kohya's scripts write it, without parts that differ among versions."""
    return name.replace(".", "_").removeprefix("text_model_").replace("to_out_lora", "to_out_0").removesuffix("_lora")


def _flattened(modules: Mapping[str, Shape], unet: Mapping[str, Any] | None) -> dict[str, str]:
    """Return {flat name: module}, of a UNet also under its original names."""
    found = {_flat(name): name for name in modules}
    found |= {_flat(name.removesuffix(".0")): name for name in modules if name.endswith("to_out.0")}
    if unet is not None and isinstance(unet["layers_per_block"], int):
        attention = ["Attn" in kind for kind in unet["down_block_types"]]
        back = backward(unet_modules(len(unet["block_out_channels"]), unet["layers_per_block"], attention))
        found |= {_flat(original): name for name in modules if (original := original_name(name, back))}
    return found


def _alphas(metadata: Mapping[str, str], where: str) -> dict[tuple[str, str], float]:
    """Return PEFT's alphas, which diffusers writes into the metadata: of a component, and of single modules.

    Raises InputError where they scale by another rule than alpha / rank.
    """
    found: dict[tuple[str, str], float] = {}
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return found
    for key, value in config.items() if isinstance(config, dict) else ():
        component, _, name = key.partition(".")
        if name == "use_rslora" and value:
            raise InputError(f"{where}: {key}: scales by alpha / sqrt(rank), which genkit does not have")
        if name == "lora_alpha" and isinstance(value, int | float):
            found[component, ""] = float(value)
        elif name == "alpha_pattern" and isinstance(value, dict):
            found |= {(component, str(m)): float(a) for m, a in value.items() if isinstance(a, int | float)}
    return found


def _base(metadata: Mapping[str, str]) -> str:
    """Return the end of a message: what base model the file says it was made for."""
    told = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    return f"; it was made for {shown(told)}" if told else "; it was made for another base"


def _check(adapter: Adapter, weight: Shape, where: str, base: str) -> None:
    """Raise InputError for an adapter that is incomplete, of a kind not supported, or of other widths."""
    roles = {role: tensor.shape for role, tensor in adapter.tensors.items()}
    unsupported = next((role for role in roles if role in UNSUPPORTED), None)
    if unsupported is not None:
        raise InputError(f"{where}: {unsupported}: is of a kind that genkit does not have")
    for role, shape in roles.items():
        if (math.prod(shape) != 1) if role == "alpha" else (len(shape) not in _RANKS.get(role, (2, 4))):
            raise InputError(f"{where}: {role}: has shape {shape_text(shape)}, which it cannot have")
    if not set(roles) - {"alpha"}:
        raise InputError(f"{where}: has an alpha and nothing that it scales")
    if any(0 in shape for shape in roles.values()) or adapter.rank > MOST_RANK:
        raise InputError(f"{where}: is of rank {adapter.rank}, not 1 to {MOST_RANK}")
    for begins, needed, misfit in _KINDS:
        if not any(role.startswith(begins) for role in roles):
            continue
        absent = next((role for role in needed if role not in roles), None)
        if absent is not None:
            raise InputError(f"{where}: has {', '.join(roles)}, but no {absent}")
        wrong = misfit(roles, weight)
        if wrong is not None:
            raise InputError(f"{where}: its {wrong} does not fit the weight of {shape_text(weight)}{base}")
    if "dora" in roles and (roles["dora"][0], math.prod(roles["dora"])) != (weight[0], weight[0]):
        raise InputError(f"{where}: its dora_scale has shape {shape_text(roles['dora'])}, not {weight[0]} numbers")


def _misfit_pair(roles: Mapping[str, Shape], weight: Shape) -> str | None:
    """Return None if up times down, or up times mid times down, has the shape of the weight; else the product."""
    down, up, mid = roles["down"], roles["up"], roles.get("mid")
    if mid is None:
        # The two matrices of a linear layer may be written as 1 x 1 convolutions
        kernel = down[2:] == weight[2:] or (len(weight) == 2 and math.prod(down[2:]) == 1)
        inner = down[0] == up[1]
    else:
        kernel = mid[2:] == weight[2:] and math.prod(down[2:]) == 1
        inner = mid[:2] == (up[1], down[0])
    if inner and kernel and (up[0], down[1]) == weight[:2] and math.prod(up[2:]) == 1:
        return None
    return " times ".join(shape_text(shape) for shape in (up, mid, down) if shape is not None)


def _misfit_loha(roles: Mapping[str, Shape], weight: Shape) -> str | None:
    """Return None if both of LoHa's products have the shape of the weight, flattened to a matrix; else its name."""
    pairs = [(roles[f"hada_{name}_a"], roles[f"hada_{name}_b"]) for name in ("w1", "w2")]
    flat = weight[0], math.prod(weight[1:])
    return None if all(len(a) == len(b) == 2 and a[1] == b[0] and (a[0], b[1]) == flat for a, b in pairs) else "LoHa"


def _misfit_lokr(roles: Mapping[str, Shape], weight: Shape) -> str | None:
    """Return None if the Kronecker product of LoKr's two matrices has the shape of the weight; else what is wrong.

    Each is whole, or a product of two.
    """
    found = []
    for name in ("w1", "w2"):
        a, b = (roles.get(f"lokr_{name}_{letter}") for letter in "ab")
        whole = roles.get(f"lokr_{name}") or (a and b and len(a) == 2 and a[1] == b[0] and (a[0], *b[1:]))
        if not whole:
            return f"LoKr, without a {name} whose parts fit each other,"
        found.append(whole)
    one, two = found
    fits = len(one) == 2 and one[0] * two[0] == weight[0] and math.prod(one) * math.prod(two) == math.prod(weight)
    return None if fits else f"LoKr of {shape_text(one)} and {shape_text(two)}"


def _misfit_difference(roles: Mapping[str, Shape], weight: Shape) -> str | None:
    return None if roles["diff"] == weight else "difference"


_RANKS = {"dora": (1, 2, 4), "diff": (1, 2, 4)}  # numbers of dimensions; all others are matrices or kernels
Misfit = Callable[[Mapping[str, Shape], Shape], str | None]
# Of each kind how its roles begin, the roles that it must have, and what checks their shapes
_KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...], Misfit], ...] = (
    (("down", "up", "mid", "dora"), ("down", "up"), _misfit_pair),
    (("hada",), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _misfit_loha),
    (("lokr",), (), _misfit_lokr),
    (("diff",), (), _misfit_difference),
)
