"""Training tasks: the trained networks, the precomputed inputs of a batch, and the loss of each picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import avg_pool2d, cross_entropy, embedding

from genkit.components import Components
from genkit.components.geometry import Geometry
from genkit.components.text import Penultimate, TextEncoder, TextEncoderPair, expand_tokens
from genkit.device.cpu import suit_cpu
from genkit.device.memory import CONTROL
from genkit.device.processor import narrow_attention
from genkit.errors import InputError, shown
from genkit.scoring.clip import ClipScorer
from genkit.training.control import copy_first_half, residuals, trained_control
from genkit.training.detection import Detection
from genkit.training.objective import Noising, objective_scheduler
from genkit.training.recipe import Recipe

if TYPE_CHECKING:
    from genkit.training.data import Batch

Tensors = dict[str, torch.Tensor]
Networks = dict[str, torch.nn.Module]
MOST_SCALE = 100.0  # upper bound of CLIP's logit scale (Radford et al. 2021, section 2.5)
CACHED = 2**16  # pixels of a batch that a CPU encodes: a batch of 16 pictures of 128x128 takes twice as long
LEVELS = 3  # downscaled sizes in the autoencoder's loss

MIXED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Task(Protocol):
    """networks: those with trained parameters, by name. nets: the same, wrapped or compiled, for calls.

    encode: returns the inputs of the networks that need no gradients and may be cached. loss: returns the loss of each
    picture, (B,); plain: unweighted, as for validation. timesteps: given ones instead of drawn ones.
    """

    networks: Networks
    nets: dict[str, Any]
    resolution: tuple[int, int]
    multiple: int

    def encode(self, batch: Batch) -> Tensors: ...

    def loss(
        self, tensors: Tensors, generator: torch.Generator, timesteps: torch.Tensor | None = None, plain: bool = False
    ) -> torch.Tensor: ...


class Diffusion:
    """A diffusion model: UNet and trained parts of its text encoders; conditioned on captions if it has any.

    A ControlNet that is trained for it adds to the activations of the frozen UNet.
    """

    def __init__(self, recipe: Recipe, parts: Components, dtype: torch.dtype) -> None:
        assert parts.scheduler is not None
        self.recipe, self.parts, self.device = recipe, parts, parts.device
        self.scheduler = objective_scheduler(parts.scheduler, recipe.objective)
        self.scheduler.to_config()  # raises now if it could not be saved at the end
        self.noising = Noising(self.scheduler, recipe.objective, parts.device)
        geometry = Geometry.of(parts.unet.config, None if parts.vae is None else parts.vae.config)
        self.resolution = self.sample_size = (geometry.width, geometry.height)
        self.multiple = geometry.multiple
        self.tokenizers = [t for t in (parts.tokenizer, parts.tokenizer_2) if t is not None]
        self.encoders = {n: m for n in ("text_encoder", "text_encoder_2") if (m := getattr(parts, n)) is not None}
        copy_first_half(parts)  # before the UNet loses precision
        whole = _way(recipe) == "everything"
        frozen = [
            *([] if whole else [parts.unet]),
            *([] if whole and recipe.train.text_encoder else self.encoders.values()),
        ]
        for network in frozen:
            if network.dtype != dtype:  # frozen weights need not be float32
                torch.nn.Module.to(network, dtype)  # without the needless warning of diffusers' method
        if parts.vae is not None and not getattr(parts.vae.config, "force_upcast", False):
            parts.vae.to(dtype)
        self.networks: Networks = PREPARE[_way(recipe)](recipe, parts)
        self.nets: dict[str, Any] = dict(self.networks)
        if parts.device.type == "cpu":
            for name, part in {"vae": parts.vae, **self.encoders}.items():
                if part is not None and name not in self.networks:
                    suit_cpu(part)
            if dtype == torch.float32:
                for network in filter(None, (parts.unet, parts.controlnet)):
                    narrow_attention(network)
        self.text_learns = any(name in self.networks for name in self.encoders)
        if len(self.encoders) == 2:  # the last layer is unused, so DDP would wait for its gradients
            for unheard in (parts.text_encoder.encoder.layers[-1], parts.text_encoder.final_layer_norm):
                unheard.requires_grad_(False)
        self.text: Any = None if self.text_learns or not self.encoders else self._frozen_text()

    def _frozen_text(self) -> Any:
        if len(self.encoders) == 1:
            return TextEncoder(self.parts.tokenizer, self.parts.text_encoder)
        first = TextEncoder(self.parts.tokenizer, Penultimate(self.parts.text_encoder))
        return TextEncoderPair(first, TextEncoder(self.parts.tokenizer_2, Penultimate(self.parts.text_encoder_2, True)))

    @torch.no_grad()
    def encode(self, batch: Batch) -> Tensors:
        """Return moments (B, 2C, h, w) of latents, or pixels; text (B, T, W) and pooled, or token ids; SDXL's sizes.

        Also what a ControlNet reads, conditioning (B, 3, H, W) uint8.
        """
        pixels = batch.pixels.to(self.device, non_blocking=True)
        vae, kept = self.parts.vae, torch.float16 if self.recipe.data.cache else torch.float32
        found = {"pixels": pixels}
        if vae is not None:
            few = max(1, CACHED // pixels[0, 0].numel()) if self.device.type == "cpu" else len(pixels)
            moments = [vae.encode(part.to(vae.dtype)).latent_dist.parameters for part in pixels.split(few)]
            found = {"moments": torch.cat(moments).to(kept)}
        if self.encoders:
            told = self._ids(batch.captions) if self.text is None else self._embedded(batch.captions)
            found |= {name: t.to(kept) if t.is_floating_point() else t for name, t in told.items()}
        if CONTROL in self.networks and batch.conditioning is not None:
            found["conditioning"] = batch.conditioning.to(self.device, non_blocking=True)
        return found | ({"sizes": batch.sizes.to(self.device)} if len(self.encoders) == 2 else {})

    def _ids(self, captions: Sequence[str]) -> Tensors:
        """Return the tokens of each tokenizer, "ids" and "ids_2", (B, T)."""
        pairs = zip(("ids", "ids_2"), self.tokenizers, strict=False)
        return {
            name: _tokens(tokenizer, expand_tokens(tokenizer, captions)).to(self.device) for name, tokenizer in pairs
        }

    def _embedded(self, captions: Sequence[str]) -> Tensors:
        rows = self.text(captions)
        if not isinstance(rows[0], tuple):
            return {"text": torch.stack(rows).clone()}
        return {"text": torch.stack([t for t, _ in rows]).clone(), "pooled": torch.stack([p for _, p in rows]).clone()}

    def loss(
        self, tensors: Tensors, generator: torch.Generator, timesteps: torch.Tensor | None = None, plain: bool = False
    ) -> torch.Tensor:
        """Return the weighted squared error of the prediction, averaged over each picture: (B,)."""
        noised = self.noising(self._latents(tensors, generator), generator, timesteps, plain)
        told = self._told(tensors) if self.encoders else {}
        x = noised.x.to(self._dtype)  # a frozen UNet is not in float32, and there may be no autocast
        if "conditioning" in tensors:
            told |= residuals(self.nets[CONTROL], x, noised.t, tensors["conditioning"], told)
        out = self.nets.get("unet", self.parts.unet)(x, noised.t, return_dict=False, **told)[0]
        return (out.float() - noised.target).square().flatten(1).mean(dim=1) * noised.weight

    def _latents(self, tensors: Tensors, generator: torch.Generator) -> torch.Tensor:
        if "pixels" in tensors:
            return tensors["pixels"].float()
        mean, logvar = tensors["moments"].float().chunk(2, dim=1)
        drawn = torch.randn(mean.shape, generator=generator, device=mean.device)
        config = self.parts.vae.config
        latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * drawn
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def _told(self, tensors: Tensors) -> dict[str, Any]:
        """Return the conditioning of a UNet2DConditionModel; dropped captions become the empty caption."""
        empty = self._ids([""]) if self.text is None else self._embedded([""])
        if self.text is not None and self.parts.info.zero_empty:
            empty = {name: torch.zeros_like(t) for name, t in empty.items()}
        dropped = tensors.get("dropped")
        told = {name: tensors[name] for name in empty}
        if dropped is not None:  # no branch on its values, which would synchronise a GPU
            told = {n: torch.where(dropped.view(-1, *[1] * (t.ndim - 1)), empty[n].to(t), t) for n, t in told.items()}
        if self.text is None:
            told = self._encoded(told)
            if dropped is not None and self.parts.info.zero_empty:  # zeros, as in the pipeline
                told = {n: t * ~dropped.view(-1, *[1] * (t.ndim - 1)) for n, t in told.items()}
        added = {}
        if "pooled" in told:
            added = {"added_cond_kwargs": {"text_embeds": told["pooled"].to(self._dtype), "time_ids": tensors["sizes"]}}
        return {"encoder_hidden_states": told["text"].to(self._dtype), **added}

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parts.unet.parameters()).dtype

    def _encoded(self, ids: Tensors) -> Tensors:
        """Run the text encoders, of which at least one is trained."""
        models = [self.nets.get(name, module) for name, module in self.encoders.items()]
        if len(models) == 1:
            return {"text": models[0](ids["ids"])[0]}
        one = models[0](ids["ids"], output_hidden_states=True).hidden_states[-2]
        other = models[1](ids["ids_2"], output_hidden_states=True)
        return {"text": torch.cat([one, other.hidden_states[-2]], dim=-1), "pooled": other.text_embeds}


class Autoencoding(torch.nn.Module):
    """A KL autoencoder (Kingma and Welling 2014; Rombach et al. 2022, section 3.1) with the losses of the recipe."""

    def __init__(self, recipe: Recipe, parts: Components, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights, self.device = recipe.autoencoder, parts.device
        self.vae = parts.vae
        self.vae.requires_grad_(True)
        self.networks: Networks = {"vae": self}
        self.nets: dict[str, Any] = dict(self.networks)
        side, self.multiple = self.vae.config.sample_size, 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.resolution = (side, side)

    def encode(self, batch: Batch) -> Tensors:
        """Return the pixels."""
        return {"pixels": batch.pixels.to(self.device, non_blocking=True)}

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return reconstructed pictures, from latents sampled with `noise`, and each latent's KL from N(0, 1)."""
        posterior = self.vae.encode(pixels).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample.float(), posterior.kl()

    def loss(
        self, tensors: Tensors, generator: torch.Generator, timesteps: torch.Tensor | None = None, plain: bool = False
    ) -> torch.Tensor:
        """Return |x - x'| + kl * KL + coarse * |x - x'| at smaller sizes for each picture; plain: squared error."""
        x = tensors["pixels"]
        latent = (len(x), self.vae.config.latent_channels, x.shape[2] // self.multiple, x.shape[3] // self.multiple)
        noise = torch.randn(latent, generator=generator, device=x.device)
        again, divergence = self.nets["vae"](x, noise * (not plain))
        error = again - x
        if plain:
            return error.square().flatten(1).mean(dim=1)
        loss = error.abs().flatten(1).mean(dim=1) + self.weights.kl * divergence
        for _ in range(LEVELS):
            error = avg_pool2d(error, 2)
            loss = loss + self.weights.coarse * error.abs().flatten(1).mean(dim=1)
        return loss


class Contrastive:
    """CLIP: contrastive loss between the pictures and captions of a batch (Radford et al. 2021)."""

    def __init__(self, recipe: Recipe, parts: Components, dtype: torch.dtype) -> None:
        self.device, self.parts = parts.device, parts
        self.scorer = ClipScorer.from_components(parts)
        parts.clip.requires_grad_(True)
        self.networks: Networks = {"clip": parts.clip}
        self.nets: dict[str, Any] = dict(self.networks)
        side = parts.clip.config.vision_config.image_size
        self.resolution, self.multiple = (side, side), 1

    def encode(self, batch: Batch) -> Tensors:
        """Return pixel_values (B, 3, H, W) and ids (B, T)."""
        ids = _tokens(self.parts.tokenizer, batch.captions).to(self.device)
        return {"pixel_values": self.scorer.preprocess(batch.pixels / 2 + 0.5), "ids": ids}

    def loss(
        self, tensors: Tensors, generator: torch.Generator, timesteps: torch.Tensor | None = None, plain: bool = False
    ) -> torch.Tensor:
        """Return the mean of both cross-entropies; equal captions in a batch all count as correct."""
        return self.contrast(*self.embed(tensors), tensors["ids"], self.scale)

    @property
    def scale(self) -> torch.Tensor:
        """The trained logarithm of the logit scale."""
        return self.parts.clip.logit_scale

    def embed(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unit embeddings of pictures and captions, (B, D) each."""
        out = self.nets["clip"](input_ids=tensors["ids"], pixel_values=tensors["pixel_values"])
        return out.image_embeds.float(), out.text_embeds.float()

    def contrast(
        self, images: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of each picture, (B,), from the embeddings (B, D) and token ids (B, T) of all of them."""
        logits = scale.float().exp().clamp(max=MOST_SCALE) * images @ texts.T
        same = (ids[:, None] == ids[None]).all(dim=2).float()
        wanted = same / same.sum(dim=1, keepdim=True)
        return (cross_entropy(logits, wanted, reduction="none") + cross_entropy(logits.T, wanted, reduction="none")) / 2


def _tokens(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(list(texts), return_tensors="pt", **options).input_ids


class NewTokens(torch.nn.Module):
    """A text encoder's token embedding with trained rows at its end; the other rows are frozen."""

    def __init__(self, table: torch.nn.Embedding, start: torch.Tensor) -> None:
        super().__init__()
        self.table, self.vectors = table, torch.nn.Parameter(start.float().clone())

    @property
    def weight(self) -> torch.Tensor:
        return torch.cat([self.table.weight, self.vectors.to(self.table.weight)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        old = self.table.num_embeddings
        known = self.table(ids.clamp(max=old - 1))
        new = embedding((ids - old).clamp(min=0), self.vectors).to(known)
        return torch.where((ids >= old)[..., None], new, known)


def _everything(recipe: Recipe, parts: Components) -> Networks:
    names = ["unet", *(("text_encoder", "text_encoder_2") if recipe.train.text_encoder else ())]
    return {n: m.float().requires_grad_(True) for n in names if (m := getattr(parts, n)) is not None}


def _adapters(recipe: Recipe, parts: Components) -> Networks:
    from peft import LoraConfig

    assert recipe.lora is not None
    lora = recipe.lora
    wanted = {"unet": lora.targets}
    if lora.text_encoder:
        wanted |= {n: ["q_proj", "k_proj", "v_proj", "out_proj"] for n in ("text_encoder", "text_encoder_2")}
    found = {}
    for name, targets in wanted.items():
        if (network := getattr(parts, name)) is None:
            continue
        alpha: Any = lora.alpha or lora.rank  # peft annotates it as int, but any number works
        config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
        try:
            network.add_adapter(config)
        except ValueError as error:
            raise InputError(f"lora.targets: {shown(targets)}: {shown(str(error), 200)}") from None
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        found[name] = network
    return found


def _words(recipe: Recipe, parts: Components) -> Networks:
    assert recipe.token is not None
    token, tokenizer, encoder = recipe.token, parts.tokenizer, parts.text_encoder
    if parts.text_encoder_2 is not None:
        raise InputError("task: textual-inversion is for models with one text encoder; SDXL has two")
    start = tokenizer(token.initializer, add_special_tokens=False).input_ids
    if not start:
        raise InputError(f"token.initializer: {shown(token.initializer)} has no tokens")
    names = token.names
    if len(tokenizer(token.placeholder, add_special_tokens=False).input_ids) == 1:
        raise InputError(f"token.placeholder: {shown(token.placeholder)} is a word of the model already; take <…>")
    if tokenizer.add_tokens(names) != len(names):
        raise InputError(f"token.placeholder: {shown(token.placeholder)} is a token of the model already")
    table = encoder.get_input_embeddings()
    first = table.weight.detach()[[start[min(i, len(start) - 1)] for i in range(len(names))]]
    encoder.set_input_embeddings(NewTokens(table, first).to(parts.device))
    return {"text_encoder": encoder}


def _way(recipe: Recipe) -> str:
    if recipe.task in WAYS:
        return WAYS[recipe.task]
    return "everything" if recipe.lora is None else "adapters"


PREPARE: dict[str, Callable[[Recipe, Components], Networks]] = {
    "everything": _everything, "adapters": _adapters, "words": _words, "control": trained_control,
}  # fmt: skip
WAYS = {"textual-inversion": "words", "controlnet": "control"}  # others: by the recipe
KINDS = {  # others: text-to-image
    "autoencoder": "autoencoder", "clip": "clip", "detector": "clip", "unconditional": "unconditional",
}  # fmt: skip
TASKS: dict[str, Callable[[Recipe, Components, torch.dtype], Any]] = {
    "autoencoder": Autoencoding, "clip": Contrastive, "detector": Detection,
}  # fmt: skip


def make_task(recipe: Recipe, parts: Components, dtype: torch.dtype) -> Any:
    """Return the Task of a recipe; dtype: of frozen networks."""
    task = TASKS.get(recipe.task, Diffusion)(recipe, parts, dtype)
    if recipe.train.gradient_checkpointing:
        for name in {"unet", *task.networks}:  # gradients of new tokens pass through the frozen UNet
            network = task.owl if name == "detector" else getattr(parts, name)
            found = (getattr(network, way, None) for way in CHECKPOINTING)
            if network is not None:
                next(way for way in found if way is not None)()
    return task


# The method's name in diffusers, in transformers from 5.20 on, and in older transformers.
CHECKPOINTING = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
