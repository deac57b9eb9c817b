"""What a run's pictures say of what drew them: model, weights, device and versions."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from genkit.components.folder import DEFAULTS
from genkit.files import user_path
from genkit.job.plan import Job
from genkit.pictures.encoders import encoding
from genkit.pictures.metadata import Origin, config_hash
from genkit.schedulers import Scheduler
from genkit.version import __version__


def origin_of(job: Job, binding: dict[str, Any], generator: Any) -> Origin:
    """Return what the metadata of the job's pictures says of what drew them. binding: of run.json."""
    o, info = job.options, job.info
    vae = None if o.vae is None else user_path(o.vae)
    return Origin(
        model=info.name if info.name in DEFAULTS or info.revision is not None else Path(info.folder.absolute()).name,
        version=__version__,
        solver=Scheduler.from_config(info.scheduler_config).solver,
        weights=binding["model"]["weights"],
        config=config_hash(info.scheduler_config),
        tuned=binding.get("tuned"),
        vae=vae.name if vae is not None and vae.is_file() else None,
        refiner=_refiner(job, binding),
        segmenter=None if job.segmenter is None else job.segmenter.hashes,
        device=_device(generator.device),
        dtype=binding["dtype"],
        attention=generator.attention.text,
        torch=version("torch"),
        format=str(encoding(o.format, o.quality)),
    )


def _refiner(job: Job, binding: dict[str, Any]) -> dict[str, Any] | None:
    if job.refiner is None:
        return None
    weights = binding["refiner"]["weights"]
    return {"name": Path(job.refiner.name).name, "start": job.refiner_start, "weights": weights}


def _device(device: Any) -> str:
    if device.type != "cuda":
        return device.type
    import torch

    return f"cuda, {torch.cuda.get_device_name(device)}"
