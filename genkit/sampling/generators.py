"""Unconditional, text-to-image and image-to-image: requests become trajectories, and final latents become pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from genkit.components.text import Penultimate, TextEncoder, TextEncoderPair
from genkit.device.cpu import suit_cpu
from genkit.device.devices import check_attention, pick_device
from genkit.device.memory import Budget, away, budget_for, budget_of, check_memory, vae_in_float32
from genkit.device.processor import AttentionChoice, fuse_projections
from genkit.device.residency import Residency
from genkit.errors import InputError
from genkit.rows.plans import plan_for, scheduler_options
from genkit.rows.request import Request, Result
from genkit.rows.settings import Geometry, Settings, settings
from genkit.sampling.codec import Codec, condition
from genkit.sampling.denoiser import Denoiser
from genkit.sampling.draws import Draws
from genkit.sampling.engine import Trajectory
from genkit.sampling.guidance import guidance_scales
from genkit.sampling.stream import Stream
from genkit.schedulers import Plan, Scheduler

if TYPE_CHECKING:
    from PIL import Image

    from genkit.components import Components
    from genkit.scoring.clip import ClipScorer
    from genkit.scoring.panel import Panel


Told = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Output:
    """What a generator call returns: the pictures, and a record of each (seed, steps, scores)."""

    images: list[Image.Image]
    results: list[Result]


class Generator:
    """The parts of a diffusion model, and the work that all call forms share.

    Parts are used as they are, on the device and in the dtype that they have; generators may share them.
    scheduler: a genkit Scheduler, or a diffusers scheduler object, whose config is read. residency: what brings the
    parts to the device, where they are not all there; budget: how much work at once fits beside them.
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
        compile: bool = False,
        attention: AttentionChoice | None = None,
        residency: Residency | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer, self.name = unet, vae, text_encoder, tokenizer, name
        self.scheduler = (
            scheduler if isinstance(scheduler, Scheduler) else Scheduler.from_config(dict(scheduler.config))
        )
        self.geometry = Geometry.of(unet.config, None if vae is None else vae.config)
        if self.geometry.text != (text_encoder is not None) or (text_encoder is None) != (tokenizer is None):
            raise InputError("text_encoder, tokenizer: a UNet with cross-attention needs both, any other takes neither")
        given = {part is not None for part in (text_encoder_2, tokenizer_2)}
        if given != {getattr(unet.config, "addition_embed_type", None) == "text_time"}:
            raise InputError("text_encoder_2, tokenizer_2: SDXL's UNet needs both, any other takes neither")
        self.defaults, self.folder = defaults or {}, folder
        self.residency = residency or Residency(next(unet.parameters()).device)
        self.budget = budget
        self.most_slots: float | None = None  # that did not run out of memory, where more did
        self.codec = Codec(vae, self.residency.add("vae", vae))
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.zero_empty = text_encoder_2 is not None and force_zeros_for_empty_prompt
        self.text: Any = None  # a TextEncoder, SDXL's TextEncoderPair, or nothing
        hold = self.residency.add("text_encoder", text_encoder)
        if text_encoder_2 is not None:
            other = self.residency.add("text_encoder_2", text_encoder_2)
            first = TextEncoder(tokenizer, Penultimate(text_encoder), hold)
            second = TextEncoder(tokenizer_2, Penultimate(text_encoder_2, pooled=True), other)
            self.text = TextEncoderPair(first, second)
        elif text_encoder is not None:
            self.text = TextEncoder(tokenizer, text_encoder, hold)
        self.attention = attention or AttentionChoice()
        self.residency.add("unet", unet)
        steady = self.residency.steady  # a UNet that comes and goes can neither be recorded nor compiled
        self.denoiser = Denoiser(
            unet,
            graphs=steady and self.device.type == "cuda",
            compiled=steady and compile,
            float32=self.residency.float32,
        )
        self._plans: dict[str, Plan] = {}

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str = "auto", dtype: str = "auto", variant: str | None = None,
        compile: bool = False, attention: str = "auto", memory: str = "auto",
    ) -> Self:  # fmt: skip
        """Load `emoji`, a diffusers-layout folder or a hub id. Raises InputError naming what is wrong with it.

        compile: torch.compile the UNet in the background, and go over to that when it is ready and faster.
        attention: a backend of `genkit env`; where that does not work, `.attention.notes` says why and what was taken.
        memory: "high" keeps everything on the device, "low" takes the least, "auto" what fits. Raises HostError, before
        anything is loaded, when not one image does.
        """
        from genkit.components import inspect_model, load_components

        check_attention(attention)
        check_memory(memory)
        info = inspect_model(name, variant=variant)
        target, precision = pick_device(device, dtype)
        budget = budget_for(info, None, target, precision, memory)
        parts = load_components(info, device=target, dtype=precision, in_ram=away(budget.level, info.parts))
        return cls.from_components(parts, budget, compile=compile, attention=attention)

    @classmethod
    def from_components(
        cls, parts: Components, budget: Budget | None = None, *, compile: bool = False, attention: str = "auto"
    ) -> Self:
        """Build a generator around loaded components, which are changed to run faster where they are to work."""
        choice = AttentionChoice(attention)
        if parts.vae is not None and vae_in_float32(parts.info.configs, str(parts.vae.dtype).removeprefix("torch.")):
            parts.vae.to(torch.float32)
        for network in (parts.unet, parts.vae):
            if network is None:
                continue
            if network.device.type == "cuda":  # no gain on a CPU
                fuse_projections(network)
            choice.apply(network, parts.device)
            if parts.device.type == "cpu":
                suit_cpu(network)
        return cls(
            unet=parts.unet,
            vae=parts.vae,
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            text_encoder_2=parts.text_encoder_2,
            tokenizer_2=parts.tokenizer_2,
            force_zeros_for_empty_prompt=parts.info.zero_empty,
            scheduler=parts.scheduler,
            name=parts.info.name,
            defaults=parts.info.defaults,
            folder=parts.info.folder,
            compile=compile,
            attention=choice,
            residency=Residency(parts.device, *([] if budget is None else [budget.level])),
            budget=budget,
        )

    @classmethod
    def from_generator(cls, other: Generator) -> Self:
        """Return this kind of generator over the parts of another; nothing is copied."""
        twin = cls.__new__(cls)
        twin.__dict__.update(other.__dict__)
        twin._plans = {}
        return twin

    def with_scheduler(self, solver: str, **options: Any) -> Self:
        """Return a generator that shares every part but samples with another solver, spacing or option."""
        twin = self.from_generator(self)
        twin.scheduler = self.scheduler.with_options(**{**scheduler_options(solver), **options})
        return twin

    @property
    def device(self) -> torch.device:
        """Where the networks work."""
        return self.residency.device

    def stream(
        self,
        requests: Iterable[Request] | Draws,
        *,
        scorer: ClipScorer | Panel | None = None,
        slots: int | None = None,
        seed: int | None = None,
    ) -> Iterator[Result]:
        """Yield a Result with pixels for every image of `requests`, as they finish; settings may differ freely.

        seed: what rows without a seed of their own derive theirs from; None draws a new one. scorer: fills `scores`
        (clip, clip_margin, clip_z, p[label]), which gates decide on; a Panel adds others. A failed image is a Result
        with status "failed" and a reason. Raises InputError, before any work, for a row that the model cannot draw, or
        that decides on a score which the scorer does not give.
        """
        if not isinstance(requests, Draws):
            rows = [r if r.id else r.filled({"id": f"{i:06d}"}) for i, r in enumerate(requests)]
            scorer = _panel(scorer, rows)
            for row in rows:
                self.plan(row)
            requests = Draws(rows)
        if self.budget is None:
            self.budget = budget_of(self.unet, self.vae, self.device)
        self.codec.area = min(self.codec.area, self.budget.area)
        most = min(slots or self.budget.slots, self.most_slots or math.inf)
        return Stream(self, requests, _panel(scorer, ()), secrets.randbits(32) if seed is None else seed).run(most)

    def settings(self, request: Request) -> Settings:
        """Return what the request comes to on this model; raises InputError where it does not fit."""
        return settings(request, self.geometry, self.defaults)

    def cost(self, request: Request) -> float:
        """Return how many slots an image of the request takes: its pixels over those of the model's own size."""
        s = self.settings(request)
        return s.width * s.height / (self.geometry.width * self.geometry.height)

    def plan(self, request: Request) -> Plan:
        """Return the plan of a request, made once for all requests that agree on steps, scheduler and strength."""
        s = self.settings(request)
        key = json.dumps([request.scheduler, s.steps, s.strength, s.guidance])
        if key not in self._plans:
            self._plans[key] = plan_for(
                self.scheduler, request.scheduler, s.steps, s.strength, s.guidance, folder=self.folder
            )
        return self._plans[key]

    def begin(self, request: Request, index: int, seed: int) -> Trajectory:
        """Return the trajectory of image `index`: picture encoded, noise drawn, prompt embedded, plan made.

        Noise comes from torch.Generator("cpu").manual_seed(seed), in the order in which diffusers draws it for a batch
        of one: first the VAE's sample of the init picture, then the starting noise, then one draw a stochastic step.
        """
        s, plan = self.settings(request), self.plan(request)
        cond, uncond, added, unadded = self.embed(request.prompt, request.negative_prompt, s.width, s.height)
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = self.geometry.latent_shape(s.width, s.height)
        x0 = mask = None
        if request.image is not None:
            picture, mask = condition(request, s.width, s.height, shape)
            x0 = self.codec.encode(picture.to(self.device), generator)
        noise = torch.randn((1, *shape), generator=generator)[0]
        # A picture is noised to the first level also at strength 1, where the schedule may leave a trace of it
        latent = plan.start[1] * noise if x0 is None else plan.alphas[0] * x0 + plan.sigmas[0] * noise
        return Trajectory(
            tag=(request, index, seed),
            latent=latent,
            plan=plan,
            generator=generator,
            cond=cond,
            uncond=uncond,
            added=added,
            unadded=unadded,
            scales=guidance_scales(plan, s.guidance, request.guidance_interval),
            keep_mask=mask,
            known=None if mask is None or x0 is None else (x0, noise),
            cost=self.cost(request),
        )

    def embed(self, prompt: str, negative_prompt: str, width: int, height: int) -> Told:
        """Return what the network is told of a prompt, and without it: cond, uncond, added, unadded of a Trajectory.

        Without a negative prompt SDXL's network is told zeros, as it was trained, unless its model_index.json says no.
        """
        if self.text is None:
            return None, None, None, None
        with_prompt, without = self.text([prompt, negative_prompt])
        if not isinstance(with_prompt, tuple):
            return with_prompt, without, None, None
        if self.zero_empty and not negative_prompt:
            without = [torch.zeros_like(part) for part in without]
        sizes = with_prompt[1].new_tensor([height, width, 0, 0, height, width])
        added, unadded = (torch.cat([vector, sizes]) for _, vector in (with_prompt, without))
        return with_prompt[0], without[0], added, unadded

    def _collect(self, request: Request, scorer: ClipScorer | None) -> Output:
        results = sorted(self.stream([request], scorer=scorer), key=lambda r: r.index)
        failed = next((r for r in results if r.status == "failed"), None)
        if failed is not None:
            raise RuntimeError(f"image {failed.index} (seed {failed.seed}) failed: {failed.reason}")
        return Output([r.image for r in results], results)


class Unconditional(Generator):
    """Pictures from noise alone: a UNet2DModel on pixels, or on the latents of a VAE."""

    def __call__(
        self,
        num_images: int = 1,
        *,
        seed: int | list[int] | None = None,
        num_inference_steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        scorer: ClipScorer | None = None,
    ) -> Output:
        """Draw `num_images` pictures; image k has seed `seed` + k. Raises InputError for settings that do not fit."""
        request = Request(
            num_images=num_images, seed=seed, num_inference_steps=num_inference_steps, width=width, height=height
        )
        return self._collect(request, scorer)


class TextToImage(Generator):
    """Pictures from a prompt, with classifier-free guidance away from `negative_prompt`."""

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        num_images: int = 1,
        seed: int | list[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        scorer: ClipScorer | None = None,
    ) -> Output:
        """Draw `num_images` pictures of `prompt`; image k has seed `seed` + k. Raises InputError for bad settings.

        guidance_scale 1 or less turns guidance off and halves the work. None takes the model's own value.
        """
        request = Request(
            prompt=prompt, negative_prompt=negative_prompt, num_images=num_images, seed=seed,
            num_inference_steps=num_inference_steps, guidance_scale=_number(guidance_scale), width=width, height=height,
        )  # fmt: skip
        return self._collect(request, scorer)


class ImageToImage(Generator):
    """Pictures from a prompt and a picture to start from; with a mask, only its white part is drawn anew."""

    def __call__(
        self,
        prompt: str,
        image: Image.Image | str | Path,
        *,
        strength: float | None = None,
        mask_image: Image.Image | str | Path | None = None,
        negative_prompt: str = "",
        num_images: int = 1,
        seed: int | list[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        scorer: ClipScorer | None = None,
    ) -> Output:
        """Draw `num_images` variations of `image`; strength 0 to 1 is how much of it is given up (default 0.8).

        The size is the picture's, rounded down to what the model allows, unless width and height say otherwise.
        """
        request = Request(
            prompt=prompt, image=image, strength=_number(strength), mask_image=mask_image,
            negative_prompt=negative_prompt,
            num_images=num_images, seed=seed, num_inference_steps=num_inference_steps,
            guidance_scale=_number(guidance_scale), width=width, height=height,
        )  # fmt: skip
        return self._collect(request, scorer)


def _panel(scorer: ClipScorer | Panel | None, rows: Sequence[Request]) -> Panel:
    """Return what scores the pictures of `rows`. Raises InputError for a row that decides on what it does not give."""
    from genkit.scoring.clip import ClipScorer
    from genkit.scoring.gates import check_row
    from genkit.scoring.panel import Panel

    if scorer is None or isinstance(scorer, ClipScorer):
        scorer = Panel(scorer, [row.prompt for row in rows])
    for row in rows if hasattr(scorer, "names") else ():  # somebody's own object need not say
        check_row(row.gate, row.rank_by, row.labels, scorer.names)
    return scorer


def _number(value: float | None) -> float | None:
    """Accept whole numbers where a Python caller writes 5 for 5.0."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
