"""What `genkit generate` does: check and plan, load, draw, decide, write the gallery."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit.errors import EXIT_SIGINT, EXIT_SIGTERM
from genkit.files import run_path, user_path
from genkit.job.plan import plan_job
from genkit.job.run import Summary, run_job
from genkit.options import Options
from genkit.rows.prompts import read_prompts
from genkit.rows.request import Request
from genkit.runs.destination import run_seed
from genkit.selection.picking import NONE, Picking


def generate(
    prompts: str | Path | Sequence[Request], out: str | Path, *, model: str = "emoji", clip: str = "auto",
    device: str = "auto", dtype: str = "auto", batch_size: int | None = None, memory: str = "auto", seed: int = 0,
    defaults: dict[str, Any] | None = None, quiet: bool = False, attention: str = "auto", format: str = "png",
    quality: int | None = None, aesthetic: str | None = None, scorers: Sequence[Any] = (), picking: Picking = NONE,
    max_total_images: int | None = None, max_seconds: float | None = None, vae: str | None = None,
    text_encoder: str | None = None, prediction: str = "auto", wildcards: str | None = None,
    lora_dir: str | None = None, embeddings: Sequence[Any] = (), embedding_dir: str | None = None,
    no_metadata: bool = False, format_in: str = "auto", refiner: str | None = None,
    refiner_start: float | None = None, detector: str | None = None, segmenter: str | None = None,
) -> Summary:  # fmt: skip
    """Make every image of a prompt file, or of a list of Requests, in folder `out`; what is there is not redone.

    defaults: fields (num_inference_steps, guidance_scale, …) for rows that do not state them. format: png, webp, jpeg
    or jxl; quality, of the last three: 1 to 100, at which webp and jxl keep every bit. aesthetic: a file with a head
    over CLIP embeddings. scorers: names of installed ones, or functions (scoring/plugins.py). vae, text_encoder,
    prediction, embeddings, refiner, refiner_start: as with `TextToImage.from_pretrained`. embedding_dir: a folder of
    textual inversions, of which those are read whose file name is a word of a prompt. wildcards, lora_dir: where rows
    of syntax "a1111" find the files of __wildcards__ and of <lora:name>. no_metadata: pictures hold no settings.
    format_in: as with `read_prompts`. detector: for count['cat'] in gates; segmenter: for masks in words. Raises
    InputError, before anything is loaded or written, for bad input, HostError for what disk, lock or device forbid.
    """
    rows = read_prompts(prompts, defaults, format_in) if isinstance(prompts, str | Path) else list(prompts)
    aesthetic = None if aesthetic is None else str(user_path(aesthetic))
    seed = run_seed(seed, run_path(out))
    options = Options(
        model=model, clip=clip, device=device, dtype=dtype, batch_size=batch_size, memory=memory, seed=seed,
        quiet=quiet, attention=attention, format=format, quality=quality, aesthetic=aesthetic,
        scorers=tuple(scorers), picking=picking, max_total_images=max_total_images, max_seconds=max_seconds,
        vae=vae, text_encoder=text_encoder, prediction=prediction, wildcards=wildcards, lora_dir=lora_dir,
        embeddings=tuple(embeddings), embedding_dir=embedding_dir, no_metadata=no_metadata, refiner=refiner,
        refiner_start=refiner_start, detector=detector, segmenter=segmenter,
    )  # fmt: skip
    return _unless_stopped(run_job(plan_job(rows, options, defaults or {}), run_path(out)))


def _unless_stopped(summary: Summary) -> Summary:
    """Return the summary, or raise what a signal means in Python; what is finished is saved: the same call goes on."""
    if summary.exit_code == EXIT_SIGINT:
        raise KeyboardInterrupt
    if summary.exit_code == EXIT_SIGTERM:
        raise SystemExit(EXIT_SIGTERM)
    return summary
