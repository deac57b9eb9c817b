"""The components of a diffusion model, and how a request becomes a trajectory on them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from genkit.components.chunks import Prompt
from genkit.components.geometry import REFINER_IDS, TIME_IDS, Geometry
from genkit.components.text import Penultimate, SecondEncoder, TextEncoder, TextEncoderPair, Weights
from genkit.components.words import Words
from genkit.device.devices import give_back
from genkit.device.memory import Budget
from genkit.device.processor import AttentionChoice
from genkit.device.residency import Residency
from genkit.errors import InputError
from genkit.rows.plans import plan_for
from genkit.rows.prompting import check_prompting
from genkit.rows.refining import refined_plan
from genkit.rows.request import Request
from genkit.rows.sdxl import stated_prompts, time_ids
from genkit.rows.settings import Settings, cost, settings
from genkit.sampling.adapters import Adapters
from genkit.sampling.codec import Codec, condition
from genkit.sampling.conditioning import Texts, conditioned, distinct, read_prompts, sized
from genkit.sampling.controls import Controls
from genkit.sampling.denoiser import Denoiser
from genkit.sampling.engine import Trajectory
from genkit.sampling.guidance import embedded_guidance, guidance_scales
from genkit.sampling.refiner import Refiner
from genkit.schedulers import Plan, Scheduler

MOST_PLANS = 1000  # that are kept


class Pipeline:
    """The components of a diffusion model, used as they are: on their device and in their dtype; they may be shared.

    scheduler: a genkit Scheduler, or a diffusers scheduler object, whose config is read. residency: moves networks to
    the device for their work when not all of them stay there. budget: how much work fits in memory at once. refiner:
    SDXL's, for the last steps of every picture.
    """

    def __init__(
        self,
        *,
        unet: Any,
        scheduler: Any,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        name: str = "custom",
        defaults: dict[str, Any] | None = None,
        folder: Path | None = None,
        attention: AttentionChoice | None = None,
        residency: Residency | None = None,
        budget: Budget | None = None,
        refiner: Refiner | None = None,
    ) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer, self.name = unet, vae, text_encoder, tokenizer, name
        self.scheduler = (
            scheduler if isinstance(scheduler, Scheduler) else Scheduler.from_config(dict(scheduler.config))
        )
        refines = text_encoder is None and text_encoder_2 is not None
        self.geometry = Geometry.of(unet.config, None if vae is None else vae.config, refines)
        _check_texts(unet, self.geometry, (text_encoder, tokenizer), (text_encoder_2, tokenizer_2))
        if refiner is not None:
            self.geometry = dataclasses.replace(self.geometry, scored=True)
        self.defaults, self.folder, self.refiner = defaults or {}, folder, refiner
        self.residency = residency or Residency(next(unet.parameters()).device)
        self.budget = budget
        self.most_slots: float | None = None  # the limit found when memory ran out
        self.codec = Codec(vae, self.residency.add("vae", vae))
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.zero_empty = text_encoder_2 is not None and force_zeros_for_empty_prompt
        self.adapters = Adapters({"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2})
        self.text = self._encoder()
        self.attention = attention or AttentionChoice()
        self.residency.add("unet", unet)
        self.controls = Controls(unet, vae, self.residency, self.attention)
        self.denoiser = Denoiser(
            unet,
            graphs=self.residency.steady and self.device.type == "cuda",
            float32=self.residency.float32,
            adapters=self.adapters,
            controls=self.controls,
            sizes=len(REFINER_IDS if refines else TIME_IDS),
        )
        self._plans: dict[str, Plan] = {}

    def _encoder(self) -> Any:
        """Return a TextEncoder, SDXL's TextEncoderPair or its refiner's SecondEncoder; None if unconditional."""
        hold, adapted = self.residency.add("text_encoder", self.text_encoder), self.adapters.alike
        if self.text_encoder_2 is None:
            return None if self.text_encoder is None else TextEncoder(self.tokenizer, self.text_encoder, hold, adapted)
        other = self.residency.add("text_encoder_2", self.text_encoder_2)
        second = TextEncoder(self.tokenizer_2, Penultimate(self.text_encoder_2, pooled=True), other, adapted)
        if self.text_encoder is None:
            return SecondEncoder(second)
        return TextEncoderPair(TextEncoder(self.tokenizer, Penultimate(self.text_encoder), hold, adapted), second)

    @property
    def device(self) -> torch.device:
        """The device that the networks compute on."""
        return self.residency.device

    def unload(self) -> None:
        """Free the weights of all networks. Configs stay readable, but nothing can be drawn any more."""
        self.residency.release()
        networks = [self.unet, self.vae, self.text_encoder, self.text_encoder_2, *self.controls.networks.values()]
        if (r := self.refiner) is not None:
            networks += [r.unet, r.text.encoder.model.model]
        for denoiser in (self.denoiser, *(() if r is None else (r.denoiser,))):
            if denoiser.graphs is not None:
                denoiser.graphs.reset()
        for network in networks:
            if network is not None:
                network.to("meta")
        give_back(self.device)

    def settings(self, request: Request) -> Settings:
        """Return the request with this model's defaults; raises InputError if the model cannot draw it."""
        words = getattr(self.tokenizer, "words", None) or Words({})
        for _, text in stated_prompts(request):
            words.check(text)
        return settings(request, self.geometry, self.defaults)

    def cost(self, request: Request) -> float:
        """Return how many slots an image takes, as `rows.settings.cost`, of a row that need not be planned."""
        s = self.settings(request)
        return cost(request, self.geometry, (s.width, s.height))

    def plan(self, request: Request) -> Plan:
        """Return the sampling plan of a request, cached by steps, scheduler, strength and guidance."""
        s = self.settings(request)
        key = json.dumps([s.scheduler, s.steps, s.strength, s.guidance])
        if key not in self._plans:
            if len(self._plans) >= MOST_PLANS:  # of a server whose clients choose any guidance scale
                self._plans.clear()
            plan = plan_for(self.scheduler, s.scheduler, s.steps, s.strength, s.guidance, folder=self.folder)
            if (r := self.refiner) is not None:
                plan = refined_plan(plan, self.scheduler, s.scheduler, s.steps, r.start, r.scheduler.prediction)
            self._plans[key] = plan
        return self._plans[key]

    def check(self, request: Request) -> None:
        """Raise InputError for a request that cannot be drawn, before any work is done for it."""
        self.plan(request)
        _ = request.mask_source
        self.controls.check(request)
        encoders = [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]
        check_prompting(request, min((encoder.config.num_hidden_layers for encoder in encoders), default=None))

    def begin(self, request: Request, index: int, seed: int) -> Trajectory:
        """Return the trajectory of image `index`: initial picture encoded, noise drawn, prompt embedded, plan made.

        Noise comes from torch.Generator("cpu").manual_seed(seed), in the order in which diffusers draws it for a batch
        of one: the VAE's posterior sample of the initial picture, the starting noise, one draw a stochastic step.
        """
        s, plan = self.settings(request), self.plan(request)
        refined = None
        if self.refiner is not None:
            refined = self.refiner.read(request, *self._read(request), time_ids(request, s.width, s.height, True), plan)
        told = self.embed(request, s.width, s.height, self.adapters.weights(request.loras, "text_weight"))
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = self.geometry.latent_shape(s.width, s.height)
        x0 = mask = masked = beside = None
        if request.image is not None:
            picture, mask, masked = condition(request, s.width, s.height, shape)
            if not (self.geometry.inpaints and s.strength == 1):
                x0 = self.codec.encode(picture.to(self.device), generator)
        noise = torch.randn((1, *shape), generator=generator)[0]
        if self.geometry.inpaints and mask is not None and masked is not None:
            known = self.codec.encode(masked.to(self.device), generator)
            beside, mask = torch.cat([mask.to(known), known]), None
        elif mask is not None:  # diffusers' pipeline encodes the masked picture, too, and does not use it here
            torch.randn((1, *shape), generator=generator)
        from_noise = x0 is None or (mask is not None and s.strength == 1)
        # Without a mask also at strength 1: the schedule's first level may have alpha > 0
        latent = plan.start[1] * noise if from_noise else plan.alphas[0] * x0 + plan.sigmas[0] * noise
        return Trajectory(
            tag=(request, index, seed),
            latent=latent,
            plan=plan,
            generator=generator,
            **told,
            beside=beside,
            adapters=self.adapters.weights(request.loras),
            controls=self.controls.read(request, s.width, s.height, plan.nfe if refined is None else refined.at),
            scales=guidance_scales(plan, s.guided, request.guidance_interval),
            embedded=embedded_guidance(s.guidance, width) if (width := self.geometry.guidance_width) else None,
            refined=refined,
            keep_mask=mask,
            known=None if mask is None or x0 is None else (x0, noise),
            cost=self.cost(request),
        )

    def texts(self, rows: Iterable[Request]) -> tuple[list[Prompt], ...]:
        """Return the prompts and negative prompts of rows for each text encoder, as `text` takes them."""
        pairs = [pair for row in rows for pair in distinct(*self._read(row))]
        return tuple([pair[encoder] for pair in pairs] for encoder in range(1 + isinstance(self.text, TextEncoderPair)))

    def _read(self, row: Request) -> tuple[list[tuple[float, Texts]], Texts]:
        """Return `read_prompts` of a row with this model's settings and plan."""
        s = self.settings(row)
        steps = s.steps if row.image is None else max(1, int(s.steps * s.strength))
        own = 2 if self.geometry.sized else 1  # the layer that the model reads
        skip = row.clip_skip if row.clip_skip is not None and row.clip_skip > own else 0
        return read_prompts(row, steps, self.plan(row).nfe, skip)

    def embed(self, request: Request, width: int, height: int, adapters: Weights = ()) -> dict[str, Any]:
        """Return the conditioning fields of a row's Trajectory. adapters: the weight of each LoRA.

        SDXL's unconditional embeddings are zeros when there is no negative prompt, as in training, unless its
        model_index.json turns this off (force_zeros_for_empty_prompt).
        """
        if self.text is None:
            return {}
        prompts, negative = self._read(request)
        pairs = distinct(prompts, negative)
        firsts, *seconds = ([pair[k] for pair in pairs] for k in range(1 + isinstance(self.text, TextEncoderPair)))
        found = dict(zip(pairs, self.text(firsts, adapters, *seconds), strict=True))
        if not self.geometry.sized:
            return conditioned(prompts, negative, lambda pair: (found[pair], None), lambda pair: (found[pair], None))
        empty = self.zero_empty and not any((request.negative_prompt, request.negative_prompt_2))
        return sized(prompts, negative, found, time_ids(request, width, height, self.geometry.refines), empty)


def _check_texts(unet: Any, geometry: Geometry, first: tuple[Any, Any], second: tuple[Any, Any]) -> None:
    """Raise InputError unless the UNet has the text encoders and tokenizers that it needs, and no others."""
    if {part is not None for part in first} != {geometry.text and not geometry.refines}:
        raise InputError("text_encoder, tokenizer: a UNet with cross-attention needs both, any other takes neither")
    if {part is not None for part in second} != {getattr(unet.config, "addition_embed_type", None) == "text_time"}:
        raise InputError("text_encoder_2, tokenizer_2: SDXL's UNet needs both, any other takes neither")
