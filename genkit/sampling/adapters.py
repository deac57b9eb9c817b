"""LoRAs applied beside the weights, which do not change: each row of a batch has its own LoRAs.

For a module with weight W, y = W x + sum over adapters k of w[row, k] * B_k A_k x. The A of all adapters are one
matrix, and so are the B, so that rows with different LoRAs cost two products more and no switching (as S-LoRA, Sheng et
al. 2023, but without gathering: a weight of 0 takes an adapter out of a row). LoHa, LoKr and DoRA, which are not
products of two small matrices, are applied as full differences of weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d, linear

from genkit.components.lorafile import ADAPTED, Adapter, LoraFile, read_lora
from genkit.errors import InputError
from genkit.files import place

Loras = Sequence[Mapping[str, Any]]
_State = tuple[torch.Tensor | None, torch.Tensor | None, list[int], list[tuple[int, torch.Tensor]]]


class Adapters:
    """The LoRAs that rows have asked for, applied by hooks on the modules of the networks.

    networks: {component: network}. `rows` is set for the length of a call: the weight of each adapter in each row,
    (rows, adapters), or None. lines: what each file adapts, for the user.
    """

    def __init__(self, networks: Mapping[str, Any]) -> None:
        self.networks = {name: networks[name] for name in ADAPTED if networks.get(name) is not None}
        self.files: dict[str, int] = {}
        self.rows: torch.Tensor | None = None
        self.lines: list[str] = []
        self._layers: dict[tuple[str, str], _Layer] = {}

    def __len__(self) -> int:
        return len(self.files)

    def weights(self, loras: Loras | None, kind: str = "weight") -> tuple[float, ...]:
        """Return the weight of each adapter for a row with these LoRAs; new files are loaded."""
        found: dict[str, float] = {}
        for lora in loras or ():
            self.add(str(lora["file"]))
            found[str(lora["file"])] = found.get(str(lora["file"]), 0.0) + float(lora.get(kind, lora["weight"]))
        return tuple(found.get(file, 0.0) for file in self.files)

    def add(self, file: str) -> None:
        """Load a LoRA beside the weights of the networks. Raises InputError as `read_lora` does, and for NaN."""
        if file in self.files:
            return
        found = read_lora(Path(file), self._shapes, self.networks["unet"].config)
        deltas = _loaded(found, self.networks)
        for module in self.networks["unet"].modules():  # with LoRAs the two halves of a guided batch may differ
            if hasattr(getattr(module, "processor", None), "share"):
                module.processor.share = False
        changed: list[tuple[_Layer, _State]] = []
        try:
            for (component, module), parts in deltas.items():
                key = component, module
                if key not in self._layers:
                    target = self.networks[component].get_submodule(module)
                    self._layers[key] = _Layer(target, self)
                    _attach(self.networks[component], module, self._layers[key])
                changed.append((self._layers[key], self._layers[key].state))
                self._layers[key].add(len(self.files), *parts)
        except BaseException:  # out of memory: a second attempt must not find half of the file
            for layer, before in changed:
                layer.state = before
            raise
        self.files[file] = len(self.files)
        self.lines.append(found.line())

    @functools.cached_property
    def _shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of the weights that adapters may change; of the modules, since 8-bit ones store no `weight`."""
        return {
            component: {name: shape for name, module in network.named_modules() if (shape := _shape(module))}
            for component, network in self.networks.items()
        }

    @contextlib.contextmanager
    def using(self, rows: torch.Tensor | None) -> Iterator[None]:
        """Apply the adapters with these weights, (rows, adapters), within this context."""
        if rows is not None and 0 < rows.shape[1] < len(self):  # files were added since
            rows = torch.nn.functional.pad(rows, (0, len(self) - rows.shape[1]))
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def alike(self, weights: Sequence[float]) -> contextlib.AbstractContextManager[None]:
        """Apply the adapters with the same weights in every row within this context."""
        return self.using(torch.tensor([weights]).expand(1024, -1) if any(weights) else None)


def _shape(module: Any) -> tuple[int, ...]:
    """Return the shape of the weight of a linear layer, also a part of a fused one, or of a convolution, else ()."""
    if isinstance(module, torch.nn.Conv2d):
        return (module.out_channels, module.in_channels, *module.kernel_size)
    return (module.out_features, module.in_features) if hasattr(module, "in_features") else ()


class _Layer:
    """What all adapters add to the output of one module."""

    def __init__(self, module: Any, owner: Adapters) -> None:
        self.module, self.owner = module, owner
        self.down: torch.Tensor | None = None  # (all ranks, in, …)
        self.up: torch.Tensor | None = None  # (out, all ranks, …)
        self.index: list[int] = []  # for each rank, its adapter
        self._index: torch.Tensor | None = None  # the same, on the device
        self.whole: list[tuple[int, torch.Tensor]] = []

    @property
    def state(self) -> _State:
        """What `add` changes."""
        return self.down, self.up, list(self.index), list(self.whole)

    @state.setter
    def state(self, state: _State) -> None:
        self.down, self.up, self.index, self.whole = state
        self._index = None

    def add(self, number: int, down: torch.Tensor | None, up: torch.Tensor, stored: torch.dtype) -> None:
        """Add an adapter: its two matrices, or with down None the whole difference `up`."""
        device = self.module.weight.device
        down, up = None if down is None else down.to(device, stored), up.to(device, stored)
        if down is None:
            self.whole.append((number, up))
            return
        self.index += [number] * len(down)
        self._index = None
        self.down = down if self.down is None else torch.cat([self.down, down])
        self.up = up if self.up is None else torch.cat([self.up, up], dim=1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return what is added to the module's output for its input x."""
        rows = self.owner.rows
        if rows is None or not rows.shape[1]:
            return None
        rows = rows[: len(x)].to(x)
        found = None
        if self.down is not None and self.up is not None:
            if self._index is None or self._index.device != x.device:
                self._index = torch.tensor(self.index, device=x.device)
            found = self._product(x, rows[:, self._index])
        for number, whole in self.whole:
            one = self._apply(x, whole) * _beside(rows[:, number], x, self._convolves)
            found = one if found is None else found + one
        return found

    @property
    def _convolves(self) -> bool:
        return isinstance(self.module, torch.nn.Conv2d)

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        down, up = self.down, self.up
        assert down is not None and up is not None
        if self._convolves:
            inner = conv2d(x, down.to(x), None, self.module.stride, self.module.padding)
            return conv2d(inner * weight[:, :, None, None], up.to(x))
        inner = linear(x, down.to(x))
        return linear(inner * weight.view(len(weight), *[1] * (x.dim() - 2), -1), up.to(x))

    def _apply(self, x: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        if self._convolves:
            return conv2d(x, whole.to(x), None, self.module.stride, self.module.padding)
        return linear(x, whole.to(x))


def _beside(row: torch.Tensor, x: torch.Tensor, convolves: bool) -> torch.Tensor:
    return row.view(-1, *[1] * (3 if convolves else x.dim() - 1))


def _attach(network: Any, name: str, layer: _Layer) -> None:
    """Add the layer's output to that of its module, or to the rows of a fused projection that it is part of."""
    module = layer.module
    parent = network.get_submodule(name.rpartition(".")[0])
    vars(parent).pop("forward", None)  # a fused residual block calls no modules
    whole = getattr(module, "whole", None)

    def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        added = layer(inputs[0])
        if added is None:
            return None
        if whole is None:
            return output + added
        output = output.clone()
        output[..., module.rows] += added
        return output

    (whole or module).register_forward_hook(hook)


def _loaded(found: LoraFile, networks: Mapping[str, Any]) -> dict[tuple[str, str], tuple[Any, Any, torch.dtype]]:
    """Read the tensors of a file; return for each module (down, up, dtype), or (None, difference, dtype)."""
    from safetensors.torch import load_file

    values = load_file(found.path)
    for key, value in values.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{place(found.path)}: {key}: holds a NaN or an infinity")
    made = {}
    for component, adapters in found.adapters.items():
        for name, adapter in adapters.items():
            module = networks[component].get_submodule(name)
            roles = {role: values[tensor.key].float() for role, tensor in adapter.tensors.items()}
            dtype = networks[component].dtype
            made[component, name] = (*_matrices(adapter, roles, module), dtype)
    return made


def _matrices(
    adapter: Adapter, roles: dict[str, torch.Tensor], module: Any
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return (down, up), scaled by alpha / rank, or (None, the whole difference); `read_lora` checked the shapes."""
    shape = tuple(module.weight.shape)
    alpha = float(roles["alpha"]) if "alpha" in roles else adapter.alpha
    scale = 1.0 if alpha is None or not adapter.rank else alpha / adapter.rank
    if adapter.low_rank:
        down, up = roles["down"], roles["up"] * scale
        return (down.flatten(1), up.flatten(1)) if len(shape) == 2 else (down, up.view(*up.shape[:2], 1, 1))
    if "diff" in roles:
        return None, roles["diff"]
    if "hada_w1_a" in roles:
        one, two = (roles[f"hada_{w}_a"] @ roles[f"hada_{w}_b"] for w in ("w1", "w2"))
        return None, (one * two * scale).reshape(shape)
    if any(role.startswith("lokr") for role in roles):
        return None, _kronecker(roles, alpha, shape)
    if "mid" in roles:  # LoCon's third matrix: k x k in the middle, 1 x 1 around it (LyCORIS, CP decomposition)
        inner = torch.einsum("nmkl,mi->nikl", roles["mid"], roles["down"].flatten(1))
        delta = torch.einsum("on,nikl->oikl", roles["up"].flatten(1), inner) * scale
    else:
        delta = (roles["up"].flatten(1) @ roles["down"].flatten(1)).reshape(shape) * scale
    if "dora" in roles:  # Liu et al. 2024, equation 5: a magnitude for each output, and the direction of W + BA
        base = module.weight.detach().float().cpu()
        whole = base + delta
        norm = whole.flatten(1).norm(dim=1)
        delta = whole * (roles["dora"].flatten() / norm).view(-1, *[1] * (len(shape) - 1)) - base
    return None, delta


def _kronecker(roles: dict[str, torch.Tensor], alpha: float | None, shape: tuple[int, ...]) -> torch.Tensor:
    """Return LoKr's difference: the Kronecker product of two matrices, each whole or a product of two."""
    rank = None
    found = []
    for name in ("w1", "w2"):
        if f"lokr_{name}" in roles:
            found.append(roles[f"lokr_{name}"])
        else:
            a, b = roles[f"lokr_{name}_a"], roles[f"lokr_{name}_b"]
            rank = len(b)
            found.append((a @ b.flatten(1)).reshape(len(a), *b.shape[1:]))
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    one, two = found
    one = one.view(*one.shape, *[1] * (two.dim() - one.dim()))
    return torch.kron(one, two.contiguous()).reshape(shape) * scale
