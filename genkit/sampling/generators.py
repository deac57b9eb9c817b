"""The public generators: Unconditional, TextToImage and ImageToImage."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from genkit.components.needs import budget_for, budget_of, vae_in_float32
from genkit.device.cpu import suit_cpu
from genkit.device.devices import check_attention, pick_device
from genkit.device.memory import LAYERS, Budget, away, check_memory
from genkit.device.norms import fuse_norms
from genkit.device.processor import AttentionChoice, fuse_projections
from genkit.device.residency import Residency
from genkit.phases import phase
from genkit.rows.plans import scheduler_options, with_read_options
from genkit.rows.refining import START, check_refiner
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.rows.templates import expanded
from genkit.sampling.draws import Draws
from genkit.sampling.pipeline import Pipeline
from genkit.sampling.refiner import Refiner
from genkit.sampling.stream import Stream

if TYPE_CHECKING:
    from PIL import Image

    from genkit.components import Components
    from genkit.scoring.clip import ClipScorer
    from genkit.scoring.panel import Panel


@dataclasses.dataclass(frozen=True)
class Output:
    """What a generator call returns: the pictures, and the Result of each (seed, steps, scores)."""

    images: list[Image.Image]
    results: list[Result]


class Generator(Pipeline):
    """Loads a pipeline and draws with it; what all generators share."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str = "auto", dtype: str = "auto", variant: str | None = None,
        attention: str = "auto", memory: str = "auto", vae: str | None = None, text_encoder: str | None = None,
        prediction: str = "auto", embeddings: Sequence[Any] = (), embedding_dir: str | None = None,
        refiner: str | Path | None = None, refiner_start: float = START,
    ) -> Self:  # fmt: skip
        """Load `emoji`, a diffusers-layout folder, a hub id, or a single file. Raises InputError naming what is wrong.

        vae, text_encoder: models to take these networks from. prediction: "epsilon", "v_prediction" or "sample", of a
        file that does not show it. embeddings: textual inversions, each FILE, FILE:WORD or (file, word); embedding_dir:
        a folder of them, whose words are the names of its files. refiner: SDXL's refiner, which takes over at the
        fraction refiner_start of the steps.
        attention: a backend listed by `genkit env`; if it does not work, `.attention.notes` says why and what is used.
        memory: "high" keeps everything on the device, "low" takes the least memory, "auto" what fits. Raises HostError,
        before anything is loaded, if not even one image fits.
        """
        from genkit.components import inspect_model, load_components
        from genkit.components.inversion import add_embeddings
        from genkit.components.words import all_embeddings

        check_attention(attention)
        check_memory(memory)
        info = inspect_model(name, variant=variant, vae=vae, text_encoder=text_encoder, prediction=prediction)
        words = all_embeddings(embeddings, embedding_dir, info.configs)
        target, precision = pick_device(device, dtype)
        other = None if refiner is None else check_refiner(info, inspect_model(refiner, variant=variant), refiner_start)
        budget = budget_for(info, None, target, precision, memory, refiner=other)
        loaded = [
            load_components(i, device=target, dtype=precision, in_ram=away(budget.level, i.parts))
            for i in (info, other)
            if i is not None
        ]
        add_embeddings(loaded[0], *words)
        second = None if other is None else (loaded[1], refiner_start)
        return cls.from_components(loaded[0], budget, attention=attention, refiner=second)

    @classmethod
    def from_components(
        cls, parts: Components, budget: Budget | None = None, *, attention: str = "auto",
        refiner: tuple[Components, float] | None = None,
    ) -> Self:  # fmt: skip
        """Build a generator from loaded components. They are modified in place to run faster on their device.

        refiner: SDXL's, loaded without its VAE, and the fraction of the steps where it takes over.
        """
        choice = AttentionChoice(attention)
        if parts.vae is not None and vae_in_float32(parts.info.configs, str(parts.vae.dtype).removeprefix("torch.")):
            parts.vae.to(torch.float32)
        unets = (parts.unet, None if refiner is None else refiner[0].unet)
        for network in (*unets, parts.vae):
            if network is None:
                continue
            with phase("choose attention, fuse projections"):
                if network.device.type == "cuda":  # no gain on a CPU
                    fuse_projections(network)
                if parts.device.type == "cuda" and not (network in unets and budget and budget.level == LAYERS):
                    fuse_norms(network, parts.device)  # which goes around the hooks of single layers
                choice.apply(network, parts.device)
                if parts.device.type == "cpu":
                    suit_cpu(network)
        residency = Residency(parts.device, *([] if budget is None else [budget.level]))
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
            attention=choice,
            residency=residency,
            budget=budget,
            refiner=None if refiner is None else Refiner(refiner[0], residency, refiner[1]),
        )

    @classmethod
    def from_generator(cls, other: Generator) -> Self:
        """Return this kind of generator with the components of another; nothing is copied."""
        twin = cls.__new__(cls)
        twin.__dict__.update(other.__dict__)
        twin._plans = {}
        return twin

    def with_scheduler(self, solver: str, **options: Any) -> Self:
        """Return a generator that shares every component but samples with another solver, spacing or option."""
        twin = self.from_generator(self)
        twin.scheduler = with_read_options(self.scheduler, {**scheduler_options(solver), **options})
        twin.defaults = {name: value for name, value in self.defaults.items() if name != "tuned_steps"}
        return twin

    def stream(
        self,
        requests: Iterable[Request] | Draws,
        *,
        scorer: ClipScorer | Panel | None = None,
        slots: int | None = None,
        seed: int | None = None,
    ) -> Iterator[Result]:
        """Yield a Result with pixels for every image of `requests`, as they finish; settings may differ per request.

        seed: base for the seeds of requests that have none; None picks a random one. scorer: fills `scores` (clip,
        clip_margin, clip_z, p[label]), which gates use; a Panel adds others. slots: images in flight, None: by memory.
        A failed image is a Result with status "failed" and a reason. Raises InputError, before any work, for a request
        that the model cannot draw, or whose gate or rank_by uses a score that the scorer does not give.
        """
        if not isinstance(requests, Draws):
            seed = secrets.randbits(32) if seed is None else seed
            named = [r if r.id else r.filled({"id": f"{i:06d}"}) for i, r in enumerate(requests)]
            rows = [row for r in named for row in expanded(r, seed)]
            scorer = _panel(scorer, rows)
            for row in rows:
                self.check(row)
            requests = Draws(rows)
        if self.budget is None:
            self.budget = budget_of(self.unet, self.vae, self.device)
        self.codec.area = min(self.codec.area, self.budget.area)
        most = min(slots or self.budget.slots, self.most_slots or math.inf)
        return Stream(self, requests, _panel(scorer, ()), secrets.randbits(32) if seed is None else seed).run(most)

    def _collect(self, request: Request, scorer: ClipScorer | None) -> Output:
        results = sorted(self.stream([request], scorer=scorer), key=lambda r: r.index)
        failed = next((r for r in results if r.status == "failed"), None)
        if failed is not None:
            raise RuntimeError(f"image {failed.index} (seed {failed.seed}) failed: {failed.reason}")
        return Output([r.image for r in results], results)


class Unconditional(Generator):
    """Unconditional generation: a UNet2DModel on pixels, or on the latents of a VAE."""

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
    """Text-to-image generation with classifier-free guidance."""

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
        prompt_2: str | None = None,
        negative_prompt_2: str | None = None,
        original_size: Sequence[int] | None = None,
        crop: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
        controls: Sequence[Mapping[str, Any]] | None = None,
        scorer: ClipScorer | None = None,
    ) -> Output:
        """Draw `num_images` pictures of `prompt`; image k has seed `seed` + k. Raises InputError for bad settings.

        guidance_scale 1 or less turns guidance off, which halves the work. None takes the model's default. prompt_2,
        negative_prompt_2: of SDXL's second text encoder; original_size, target_size: (width, height), crop: (left, top)
        that SDXL is told. controls: ControlNets, each like {"file": "canny", "image": picture, "weight": 0.8}; the size
        is then that of the first picture, unless width and height are given. Request has more of them.
        """
        request = Request(
            prompt=prompt, negative_prompt=negative_prompt, num_images=num_images, seed=seed,
            num_inference_steps=num_inference_steps, guidance_scale=_number(guidance_scale), width=width, height=height,
            prompt_2=prompt_2, negative_prompt_2=negative_prompt_2, original_size=original_size, crop=crop,
            target_size=target_size, controls=None if controls is None else list(controls),
        )  # fmt: skip
        return self._collect(request, scorer)


class ImageToImage(Generator):
    """Image-to-image generation; with a mask, inpainting of its white part."""

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
        prompt_2: str | None = None,
        negative_prompt_2: str | None = None,
        controls: Sequence[Mapping[str, Any]] | None = None,
        scorer: ClipScorer | None = None,
    ) -> Output:
        """Draw `num_images` variations of `image`; strength, 0 to 1, is how much noise is added to it (default 0.8).

        The size is that of `image`, rounded down to what the model allows, unless width and height are given.
        controls: ControlNets, as of TextToImage.
        """
        request = Request(
            prompt=prompt, image=image, strength=_number(strength), mask_image=mask_image,
            negative_prompt=negative_prompt,
            num_images=num_images, seed=seed, num_inference_steps=num_inference_steps,
            guidance_scale=_number(guidance_scale), width=width, height=height, prompt_2=prompt_2,
            negative_prompt_2=negative_prompt_2, controls=None if controls is None else list(controls),
        )  # fmt: skip
        return self._collect(request, scorer)


def _panel(scorer: ClipScorer | Panel | None, rows: Sequence[Request]) -> Panel:
    """Return the scorer as a Panel. Raises InputError for a row whose gate or rank_by uses a score it does not give."""
    from genkit.scoring.clip import ClipScorer
    from genkit.scoring.gates import check_row
    from genkit.scoring.panel import Panel
    from genkit.scoring.senses import Senses

    if scorer is None or isinstance(scorer, ClipScorer):
        scorer = Panel(scorer, [row.plain_prompt for row in rows])
    for row in rows if hasattr(scorer, "names") else ():  # a caller's own scorer need not declare names
        senses = getattr(scorer, "senses", None) or Senses()
        check_row(row.gate, row.rank_by, row.labels, scorer.names, senses.names, senses.labels)
    return scorer


def _number(value: float | None) -> float | None:
    """Accept whole numbers where a Python caller writes 5 for 5.0."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
