"""`genkit tune`: a plan of few calls fitted to a model at its guidance, written where `generate` finds it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.components import inspect_model, load_components, weight_hashes
from genkit.components.geometry import Geometry
from genkit.device.devices import pick_device
from genkit.durable import write_whole
from genkit.errors import HostError, InputError
from genkit.files import place, read_json
from genkit.progress import Steps
from genkit.rows.prompts import read_prompts
from genkit.rows.request import SEED_LIMIT, Request
from genkit.rows.settings import GUIDANCE
from genkit.schedulers import Scheduler
from genkit.schedulers.tuned import FILE

if TYPE_CHECKING:
    import torch

    from genkit.sampling.generators import Generator

STEPS = (3, 50)  # fewer leave nothing to fit, more do not need it
NOISES = (8, 4096)
TIMESTEPS = "tuned_timesteps.json"  # for diffusers: its levels by the number of steps
# Prompts to fit on when no prompt file is given: ordinary things, animals and scenes.
PROMPTS = (
    "a red apple", "a dog running on grass", "a sailing boat at sunset", "a blue car", "a bowl of soup",
    "a mountain under a night sky", "a smiling face", "a yellow flower", "an old house in the snow", "a cat asleep",
    "a green tree", "a city street in the rain",
)  # fmt: skip


def tune_model(
    model: str,
    steps: int,
    prompts: Path | None = None,
    out: Path | None = None,
    guidance: float | None = None,
    noises: int = 48,
    variant: str | None = None,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Fit a plan of `steps` calls, write it to `out` (default: the model's scheduler folder), and return a summary.

    Also writes tuned_timesteps.json, the noise levels for use in diffusers. Interrupted, it resumes with the same
    arguments from its checkpoint.
    Raises InputError for bad input, before anything heavy loads, and HostError where `out` cannot be written.
    """
    for name, value, (low, high) in (("--steps", steps, STEPS), ("--noises", noises, NOISES)):
        if not low <= value <= high:
            raise InputError(f"{name}: {value} is not within {low} to {high}")
    if not 0 <= seed < SEED_LIMIT:
        raise InputError(f"--seed: {seed} is not within 0 to {SEED_LIMIT - 1}")
    info = inspect_model(model, variant=variant)
    if info.kind == "clip":
        raise InputError(f"{model}: is a CLIP model: it draws nothing that could be tuned")
    geometry = Geometry.of(info.configs["unet"], info.configs.get("vae"))
    if geometry.inpaints:
        raise InputError(f"{model}: is made for inpainting, and plans are tuned from noise alone")
    if info.refines:
        raise InputError(f"{model}: is SDXL's refiner, which finishes pictures, and plans are tuned from noise alone")
    if geometry.guidance_width:
        raise InputError(f"{model}: is distilled for few steps and reads the guidance scale itself: nothing to tune")
    if not geometry.text and (prompts is not None or guidance is not None):
        raise InputError("--prompts, --guidance-scale: this model is unconditional and reads none")
    rows = [] if prompts is None else read_prompts(prompts)
    texts = [row.prompt for row in rows] or list(PROMPTS)
    unread = sorted({name for row in rows for name in row.model_fields_set} - {"id", "prompt"})
    scale = float(info.defaults.get("guidance_scale", GUIDANCE) if guidance is None else guidance)
    if not 1 <= scale <= 100:
        raise InputError(f"--guidance-scale: {scale} is not within 1 to 100")
    folder = _writable(info.folder / "scheduler" if out is None else out)
    found = _tune(info, steps, texts if geometry.text else [], scale if geometry.text else 1.0, noises, seed, device,
                  folder, quiet)  # fmt: skip
    return found | ({"notes": [f"{prompts}: not used to tune: {', '.join(unread)}"]} if unread else {})


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"{place(folder)}: {error.strerror or error}; give another folder with -o") from None
    if not os.access(folder, os.W_OK):
        raise HostError(f"{place(folder)}: cannot be written; give another folder with -o")
    return folder


def _tune(
    info: Any, steps: int, texts: list[str], guidance: float, noises: int, seed: int, device: str, folder: Path,
    quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    import torch

    from genkit.sampling.generators import Generator
    from genkit.schedulers.tune import fit
    from genkit.schedulers.tuned import write_plan

    target, _ = pick_device(device, "float32")
    generator = Generator.from_components(load_components(info, device=target, dtype=torch.float32))
    generator.unet.requires_grad_(False)
    g = generator.geometry
    noise = torch.randn(
        (noises, *g.latent_shape(g.width, g.height)), generator=torch.Generator("cpu").manual_seed(seed)
    ).to(target)
    scheduler = stock(generator.scheduler)
    identity = json.dumps([weight_hashes(info), texts, guidance, seed])
    checkpoint = folder / f".tune-{steps}.safetensors"
    with Steps(quiet=quiet) as progress:
        tuned = fit(
            _network(generator, texts, guidance), scheduler, steps, noise, lean=noise[0].numel() > 4096,
            seed=seed, progress=progress, checkpoint=checkpoint, identity=identity,
        )  # fmt: skip
    found: dict[str, Any] = {
        "steps": steps, "guidance_scale": guidance, "held_out": max(1, round(noises / 4)),
        "stock_error": round(tuned.stock["mean"], 5), "tuned_error": round(tuned.fitted["mean"], 5),
        "better": tuned.better, "timesteps": tuned.timesteps,
    }  # fmt: skip
    if tuned.better:
        write_plan(folder / FILE, tuned, scheduler, guidance=guidance, identity=_unet_hash(info))
        found["file"] = str(folder / FILE)
        found["diffusers"] = _for_diffusers(folder, generator.scheduler, tuned.timesteps)
    checkpoint.unlink(missing_ok=True)
    return found


def stock(scheduler: Scheduler) -> Scheduler:
    """Return the scheduler without fitting that a tuned plan is compared with."""
    return scheduler.with_options(solver="pc")


def _unet_hash(info: Any) -> str:
    return next(digest for file, digest in sorted(weight_hashes(info).items()) if file.startswith("unet"))


def _network(generator: Generator, texts: list[str], guidance: float) -> Any:
    """Return model(x, t, index) -> guided raw prediction; picture i has prompt i modulo their number."""
    import torch

    if generator.text is None:
        return lambda x, t, index: generator.denoiser(x, t, None, None, torch.ones(len(x)))
    with torch.no_grad():
        g = generator.geometry
        found = [generator.embed(Request(prompt=text), g.width, g.height) for text in texts]
        names = ("cond", "uncond", "added_cond", "added_uncond")
        each = [[told[name] for told in found] for name in names]
        conditioning = [None if rows[0] is None else torch.stack(rows) for rows in each]

    def model(x: torch.Tensor, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        cond, uncond, added_cond, added_uncond = (
            None if each is None else each[index.to(x.device) % len(texts)] for each in conditioning
        )
        return generator.denoiser(x.float(), t, cond, uncond, torch.full((len(x),), guidance), added_cond, added_uncond)

    return model


def _for_diffusers(folder: Path, scheduler: Scheduler, timesteps: list[int]) -> str:
    """Write tuned_timesteps.json, the plan's noise levels by number of steps, and a config to use them with.

    The config has order 1: the levels were fitted together with their own coefficients, and order 2 measures worse with
    them. An existing scheduler_config.json is not changed.
    """
    path, config = folder / TIMESTEPS, folder / "scheduler_config.json"
    known = read_json(path) if path.exists() else {}
    known |= {str(len(timesteps)): timesteps}
    lines = ",\n".join(f' "{steps}": {json.dumps(known[steps])}' for steps in sorted(known, key=int))
    write_whole(path, f"{{\n{lines}\n}}\n".encode())
    if not config.exists():
        text = json.dumps(scheduler.with_options(solver="dpmpp_2m", order=1).to_config(), indent=1)
        write_whole(config, (text + "\n").encode())
    return str(path)
