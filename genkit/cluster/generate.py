"""The function behind `genkit.generate`, and who does its work: this process, or many workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit.cluster.crew import check_address, check_device, parse_workers, ray_crew
from genkit.errors import EXIT_SIGINT, EXIT_SIGTERM
from genkit.files import run_path, user_path
from genkit.job.plan import Job, plan_job
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
    lora_dir: str | None = None, control_dir: str | None = None, embeddings: Sequence[Any] = (),
    embedding_dir: str | None = None,
    no_metadata: bool = False, format_in: str = "auto", refiner: str | None = None,
    refiner_start: float | None = None, detector: str | None = None, segmenter: str | None = None,
    classifier: str | None = None, captioner: str | None = None, variant: str | None = None,
    workers: int | str | None = None, ray: str | None = None,
) -> Summary:  # fmt: skip
    """Make every image of a prompt file, or of a list of Requests, in folder `out`; what is there is not redone.

    defaults: fields (num_inference_steps, guidance_scale, …) for rows that do not state them. format: png, webp, jpeg
    or jxl; quality, of the last three: 1 to 100, at which webp and jxl keep every bit. aesthetic: a file with a head
    over CLIP embeddings. scorers: names of installed ones, or functions (scoring/plugins.py). variant, vae,
    text_encoder, prediction, embeddings, refiner, refiner_start: as with `TextToImage.from_pretrained`. embedding_dir:
    a folder of textual inversions, of which those are read whose file name is a word of a prompt. wildcards, lora_dir:
    where rows of syntax "a1111" find the files of __wildcards__ and of <lora:name>. no_metadata: pictures hold no
    settings. format_in: as with `read_prompts`. detector, classifier, captioner: for count['cat'], p_class['tabby'] and
    answer['is it red?'] in gates; segmenter: for masks in words. workers: so many processes of this machine draw, each
    with a device of its own; ray: the address of a cluster of Ray, or "auto", whose nodes draw, as many as `workers`,
    which may be "4:64", least and most. Raises InputError, before anything is loaded or written, for bad input,
    HostError for what disk, lock or device forbid.
    """
    rows = read_prompts(prompts, defaults, format_in) if isinstance(prompts, str | Path) else list(prompts)
    aesthetic = None if aesthetic is None else str(user_path(aesthetic))
    seed = run_seed(seed, run_path(out))
    options = Options(
        model=model, clip=clip, device=device, dtype=dtype, batch_size=batch_size, memory=memory, seed=seed,
        quiet=quiet, attention=attention, format=format, quality=quality, aesthetic=aesthetic,
        scorers=tuple(scorers), picking=picking, max_total_images=max_total_images, max_seconds=max_seconds,
        vae=vae, text_encoder=text_encoder, prediction=prediction, wildcards=wildcards, lora_dir=lora_dir,
        control_dir=control_dir,
        embeddings=tuple(embeddings), embedding_dir=embedding_dir, no_metadata=no_metadata, refiner=refiner,
        refiner_start=refiner_start, detector=detector, segmenter=segmenter, classifier=classifier,
        captioner=captioner, variant=variant,
    )  # fmt: skip
    return _unless_stopped(run_on(plan_job(rows, options, defaults or {}), run_path(out), workers, ray))


def run_on(job: Job, folder: Path, workers: int | str | None = None, ray: str | None = None) -> Summary:
    """Do a job in this process or, with `workers` or `ray` as `generate` has them, in many. Raises as `generate`."""
    bounds = check_workers(workers, ray, job.options.device)
    if bounds is None and ray is None:
        return run_job(job, folder)
    return run_job(job, folder, ray_crew(job, folder.absolute(), bounds, ray))


def check_workers(workers: int | str | None, ray: str | None, device: str) -> tuple[int, int] | None:
    """Return the least and the most workers. Raises InputError for a bad number, address or device."""
    check_address(ray)
    bounds = parse_workers(workers)
    if bounds is not None or ray is not None:
        check_device(device, bounds, ray)
    return bounds


def _unless_stopped(summary: Summary) -> Summary:
    """Return the summary, or raise what a signal means in Python; what is finished is saved: the same call goes on."""
    if summary.exit_code == EXIT_SIGINT:
        raise KeyboardInterrupt
    if summary.exit_code == EXIT_SIGTERM:
        raise SystemExit(EXIT_SIGTERM)
    return summary
