"""Attention processor for diffusers' networks: chooses a backend for each module, and fuses projections."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from genkit.device.attention import BACKENDS, NARROW_TRAINED, Attend
from genkit.device.devices import check_attention
from genkit.device.probes import choose
from genkit.errors import reason

ANY_DTYPE = ("sdpa", "sliced", "math")  # backends whose support does not depend on the dtype


class Processor:
    """The processor of one diffusers Attention module, with the backend chosen for `dtype`.

    share: with guidance a batch holds each sample twice, and before the first cross-attention both halves are equal, so
    the first self-attention of a network computes only one. On a CPU only: the comparison would stall a GPU. notes:
    messages for the user, if the backend fails after all.
    """

    def __init__(self, name: str, dtype: torch.dtype, notes: list[str], share: bool = False) -> None:
        self.name, self.dtype, self.notes, self.share = name, dtype, notes, share
        self.attend = BACKENDS[name]
        self.otherwise: Attend = BACKENDS[name if name in ANY_DTYPE else "sdpa"]  # for other dtypes

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states: (B, L, C) or (B, C, H, W); encoder_hidden_states: (B, S, D). Returns hidden_states' shape."""
        if attention_mask is not None:
            from diffusers.models.attention_processor import AttnProcessor2_0

            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        half = len(hidden_states) // 2
        if (
            self.share
            and encoder_hidden_states is None
            and not torch.compiler.is_compiling()
            and torch.equal(hidden_states[:half], hidden_states[half:])
        ):
            return self(attn, hidden_states[:half]).repeat(2, *(1 for _ in hidden_states.shape[1:]))
        x = hidden_states.flatten(2) if hidden_states.ndim == 4 else hidden_states.transpose(1, 2)  # (B, C, L)
        if attn.group_norm is not None:
            x = attn.group_norm(x)
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in _project(attn, x.transpose(1, 2), encoder_hidden_states)
        )
        out = self._attend(q, k, v).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        if hidden_states.ndim == 4:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.dtype != self.dtype or torch.is_grad_enabled():
            return self.otherwise(q, k, v)
        if torch.compiler.is_compiling():
            return self.attend(q, k, v)
        try:
            return self.attend(q, k, v)
        except torch.OutOfMemoryError:  # smaller batches may do
            raise
        except Exception as error:  # a shape that the backend does not support, unlike the probed ones
            if self.attend is self.otherwise:
                raise
            failed = f"attention: {self.name} failed"
            if not any(note.startswith(failed) for note in self.notes):
                self.notes.append(f"{failed} ({reason(error)}); torch's own goes on in its place")
            self.attend = self.otherwise
            return self.attend(q, k, v)


class AttentionChoice:
    """Chooses the attention backend of networks. Raises InputError for an unknown name."""

    def __init__(self, asked: str = "auto") -> None:
        check_attention(asked)
        self.asked = asked
        self.notes: list[str] = []
        self.chosen: dict[str, str] = {}  # "self 40" -> backend
        self._refused: dict[str, str] = {}  # … -> why not the one asked for

    def apply(self, network: Any, device: torch.device | None = None) -> None:
        """Set the processors of `network`'s plain attention modules to the best backend for its dtype and device.

        device: the device it will compute on, if its weights are not there.
        """
        device = device or network.device
        modules = _plain_modules(network)
        guided = device.type == "cpu" and any(module.is_cross_attention for module in modules)
        for module in modules:
            name = self._choose(device, network.dtype, module.inner_dim // module.heads, module.is_cross_attention)
            share = guided and not module.is_cross_attention
            module.set_processor(Processor(name, network.dtype, self.notes, share))
            guided = guided and not share
        if self._refused:
            kinds, reason = ", ".join(self._refused), next(iter(self._refused.values()))
            instead = ", ".join(dict.fromkeys(self.chosen[kind] for kind in self._refused))
            self.notes[:] = [f"--attention {self.asked}: {reason}; {instead} in its place (heads: {kinds})"]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # frees what the probes allocated

    @property
    def text(self) -> str:
        """For run.json: which backend is used for which width of heads."""
        backends: dict[str, list[str]] = {}
        for kind, name in self.chosen.items():
            backends.setdefault(name, []).append(kind)
        found = "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in backends.items())
        return "; ".join([found or "as diffusers has it", *self.notes])

    def _choose(self, device: torch.device, dtype: torch.dtype, width: int, cross: bool) -> str:
        kind = f"{'cross' if cross else 'self'} {width}"
        self.chosen[kind], reason = choose(self.asked, device, dtype, width, cross)
        if reason is not None:
            self._refused[kind] = reason
        return self.chosen[kind]


def narrow_attention(network: Any) -> None:
    """Use `sliced` attention for narrow heads of a float32 network trained on a CPU: fastest forward and backward."""
    for module in _plain_modules(network):
        if module.inner_dim // module.heads <= NARROW_TRAINED:
            module.set_processor(Processor("sliced", torch.float32, []))


def fuse_projections(network: Any) -> int:
    """Fuse to_q, to_k, to_v of self-attention and to_k, to_v of cross-attention; returns the number of fused modules.

    For inference only: to_q, to_k and to_v become views of the fused weight, which a LoRA or an optimizer cannot adapt.
    State dicts are saved and loaded under the original names.
    """
    fused = 0
    for module in _plain_modules(network):
        names = _parts_of(module)
        layers = [getattr(module, name) for name in names]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if any(type(layer) is not torch.nn.Linear for layer in layers) or len(biases) not in (0, len(layers)):
            continue
        with torch.no_grad():
            whole = torch.nn.Linear(1, 1, bias=False)
            whole.weight = torch.nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
            whole.out_features, whole.in_features = whole.weight.shape
            if biases:
                whole.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False)
        module.add_module(_whole(names), whole.train(module.training))
        first = 0
        for name, layer in zip(names, layers, strict=True):
            setattr(module, name, _Part(whole, first, first + layer.out_features))
            first += layer.out_features
        module.register_state_dict_post_hook(_split_state)
        module.register_load_state_dict_pre_hook(_join_state)
        fused += 1
    return fused


class _Part(torch.nn.Module):
    """Some rows of a linear layer, as a layer without own parameters."""

    whole: torch.nn.Linear

    def __init__(self, whole: torch.nn.Linear, first: int, last: int) -> None:
        super().__init__()
        self.__dict__["whole"] = whole  # not a child: its parameters are listed once
        self.rows = slice(first, last)
        self.in_features, self.out_features = whole.in_features, last - first

    @property
    def weight(self) -> torch.Tensor:
        return self.whole.weight[self.rows]

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.whole.bias is None else self.whole.bias[self.rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def _parts_of(module: Any) -> tuple[str, ...]:
    return ("to_k", "to_v") if module.is_cross_attention else ("to_q", "to_k", "to_v")


def _whole(names: tuple[str, ...]) -> str:
    """Return the name that diffusers gives the fused layer: to_qkv or to_kv."""
    return "to_" + "".join(name[-1] for name in names)


def _split_state(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    names = _parts_of(module)
    for kind in ("weight", "bias"):
        whole = state.pop(f"{prefix}{_whole(names)}.{kind}", None)
        if whole is not None:
            state |= {f"{prefix}{name}.{kind}": whole[getattr(module, name).rows] for name in names}


def _join_state(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    names = _parts_of(module)
    for kind in ("weight", "bias"):
        found = [state.pop(f"{prefix}{name}.{kind}") for name in names if f"{prefix}{name}.{kind}" in state]
        if len(found) == len(names):
            state[f"{prefix}{_whole(names)}.{kind}"] = torch.cat(found)


def _project(attn: Any, x: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return q, k and v, each (B, positions, heads * width)."""
    if context is None and hasattr(attn, "to_qkv"):
        return attn.to_qkv(x).chunk(3, dim=-1)
    context = x if context is None else context
    if hasattr(attn, "to_kv"):
        return attn.to_q(x), *attn.to_kv(context).chunk(2, dim=-1)
    return attn.to_q(x), attn.to_k(context), attn.to_v(context)


def _plain_modules(network: Any) -> list[Any]:
    """Return the attention modules that Processor can compute: no norms of q and k, no added projections."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    def plain(module: Any) -> bool:
        return (
            isinstance(module.processor, AttnProcessor2_0 | Processor)
            and module.inner_dim == module.inner_kv_dim
            and all(getattr(module, name) is None for name in _OTHERS)
            and module.to_out is not None
        )

    return [module for module in network.modules() if isinstance(module, Attention) and plain(module)]


_OTHERS = ("norm_q", "norm_k", "norm_cross", "added_kv_proj_dim", "spatial_norm")
