"""Load the networks of a job, or of a run that is reopened; and what a run folder is bound to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit.components import load_components, weight_hashes
from genkit.components.folder import DEFAULTS
from genkit.components.needs import FIRST, budget_for
from genkit.components.shapes import head_widths
from genkit.components.weights import sha256
from genkit.device.devices import DTYPES, compute_dtype, pick_device
from genkit.device.memory import Look, away
from genkit.files import user_path
from genkit.job.masks import prepare_masks, without_mask
from genkit.job.plan import Job, plan_job
from genkit.job.senses import load_senses
from genkit.job.words import recorded_words
from genkit.options import Options
from genkit.phases import phase
from genkit.pictures.encoders import encoding
from genkit.rows.plans import is_tuned, tuned_file
from genkit.rows.request import Request
from genkit.runs.destination import check_binding
from genkit.runs.records import found_at, read_config, read_rows
from genkit.scoring.aesthetic import Head
from genkit.scoring.senses import NAMES as SENSES
from genkit.version import __version__


def load(job: Job, recorded: dict[str, Any] | None, rows: Sequence[Request] = ()) -> tuple[Any, Any]:
    """Return (generator, panel of scorers), on the device and in the dtype recorded by the run's first start.

    rows: those whose masks in words are found first, by a network that needs its memory only until then.
    """
    with phase("import torch"):
        import torch  # noqa: F401
    with phase("import diffusers and transformers"):
        from genkit.sampling.generators import Generator
        from genkit.scoring.clip import ClipScorer
        from genkit.scoring.panel import Panel

    before = (recorded or {}).get("binding", {})
    asked = {"device": job.options.device, "dtype": job.options.dtype}
    with phase("find the device"):
        device, dtype = pick_device(
            *(before.get(key, "auto") if name == "auto" else name for key, name in asked.items())
        )
        from genkit.device.warm import warm_up

        unets = [info.configs["unet"] for info in (job.info, job.refiner) if info is not None]
        widths = {w for u in unets for w in head_widths(u)} if job.options.attention == "auto" else ()
        warm_up(device, compute_dtype(device, dtype), widths)
    o = job.options
    with phase("plan memory"):
        looks = job.looks(str(dtype).removeprefix("torch."), device.type)
        first = looks[FIRST] if without_mask(rows) and FIRST in looks else Look(0, 0)
        looks[FIRST] = first  # no memory where every mask has been found already
        budget = budget_for(
            job.weighed, job.clip, device, dtype, o.memory, o.batch_size, job.largest, job.refiner, looks
        )
    prepare_masks(rows, job.segmenter, device, first, budget.free)
    in_ram = away(budget.level, ("unet", "vae", "text_encoder", "text_encoder_2", "clip", *job.senses))
    senses = load_senses(job.senses, job.rows, device, compute_dtype(device, dtype), in_ram)
    parts = load_components(job.info, device=device, dtype=dtype, in_ram=in_ram)
    if job.inversions.used:
        from genkit.components.inversion import add_embeddings

        add_embeddings(parts, job.inversions.used)
    second = None
    if job.refiner is not None:
        second = load_components(job.refiner, device=device, dtype=dtype, in_ram=in_ram), job.refiner_start
    generator = Generator.from_components(parts, budget, attention=o.attention, refiner=second)
    for file, part in job.controls.items():
        generator.controls.add(file, part)
    for name in job.senses:
        sense = getattr(senses, name)
        sense.hold = generator.residency.add(name, sense.model)
    scorer = head = None
    if job.clip is not None:
        scorer = ClipScorer.from_components(load_components(job.clip, device=device, dtype=dtype, in_ram=in_ram))
        scorer.texts.hold = generator.residency.add("clip", scorer.model)
    if o.aesthetic is not None and job.clip is not None:
        head = Head.load(Path(o.aesthetic))
    return generator, Panel(scorer, [row.plain_prompt for row in job.rows], head, job.scorers, senses)


def reopen(folder: Path, device: str = "auto") -> tuple[Any, Any, int, int]:
    """Return (generator, scorer or None, slots, seed) as the run in `folder` was drawn with.

    Raises InputError if its model is gone or has changed.
    """
    recorded = read_config(folder)
    assert recorded is not None
    binding = recorded["binding"]
    rows = read_rows(folder)
    model, clip = (found_at(binding.get(part) or {"name": "none"}) for part in ("model", "clip"))
    second = binding.get("refiner")
    senses = {name: found_at(binding[name]) for name in SENSES if name in binding}
    options = Options(
        model=model, clip=clip, variant=binding.get("variant"), device=device, seed=binding["seed"],
        embeddings=recorded_words(binding.get("embeddings", {}), rows),
        aesthetic=recorded["info"].get("aesthetic"), scorers=tuple(binding.get("scorers", ())),
        detector=senses.get("detector"), classifier=senses.get("classifier"), captioner=senses.get("captioner"),
        segmenter=None if "segmenter" not in binding else found_at(binding["segmenter"]),
        refiner=None if second is None else found_at(second), refiner_start=None if second is None else second["start"],
        **recorded["info"].get("parts", {}),
    )  # fmt: skip
    job = plan_job(rows, options, {})
    same = {name: binding[name] for name in ("device", "format") if name in binding}
    check_binding(folder, binding, {**run_config(job, None, recorded, hashes(job))["binding"], **same})
    generator, scorer = load(job, recorded)
    return generator, scorer, generator.budget.slots, options.seed


def hashes(job: Job) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of each weight file of "model", "clip", "refiner", and of the vision models by their names."""
    models = {"model": job.info, "clip": job.clip, "refiner": job.refiner}
    found = {name: weight_hashes(info) for name, info in models.items() if info is not None}
    return found | {name: info.hashes for name, info in job.senses.items()}


def run_config(
    job: Job, loaded: tuple[Any, Any] | None, recorded: dict[str, Any] | None, weights: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """Return run.json: "binding" is what every later start must agree with, "info" the rest. weights: `hashes`."""
    o = job.options
    models = {"model": job.info, "clip": job.clip, **({} if job.refiner is None else {"refiner": job.refiner})}
    used = {tuned_file(str(row.scheduler), job.info.folder) for row in job.rows if is_tuned(row.scheduler)}
    binding: dict[str, Any] = {"seed": o.seed, "variant": o.variant, "format": str(encoding(o.format, o.quality))}
    for name, info in models.items():
        if info is None:
            binding[name] = None
            continue
        built_in = info.name in DEFAULTS or info.revision is not None  # or of the hub
        local = {} if built_in else {"folder": str(info.folder.absolute())}
        binding[name] = {"name": info.name, **local, "weights": weights[name]}
    if job.refiner is not None:
        prediction = job.refiner.scheduler_config.get("prediction_type")
        binding["refiner"] |= {"start": job.refiner_start, "prediction": prediction, "zeros": job.refiner.zero_empty}
    if job.segmenter is not None:
        binding["segmenter"] = job.segmenter.binding()
    for name, vision in job.senses.items():
        binding[name] = {**vision.binding(), "weights": weights[name]}
    binding["scheduler"] = job.info.scheduler_config
    binding |= {"tuned": {file.name: sha256(file) for file in sorted(used)}} if used else {}
    before = {} if recorded is None else recorded["binding"].get("embeddings", {})
    binding |= {"embeddings": words} if (words := job.inversions.binding(before, job.rows)) else {}
    binding |= {"aesthetic": sha256(Path(o.aesthetic))} if o.aesthetic is not None else {}
    binding |= {"scorers": [plugin.name for plugin in job.scorers]} if job.scorers else {}
    if recorded is not None:
        same = {"device": o.device.split(":")[0], "dtype": DTYPES.get(o.dtype, o.dtype)}
        for key, asked in same.items():
            binding[key] = recorded["binding"].get(key) if asked == "auto" else asked
        return {"binding": binding, "info": recorded["info"]}
    assert loaded is not None
    from genkit.components.int8 import is_8_bit

    generator = loaded[0]
    binding["device"] = generator.device.type
    binding["dtype"] = "int8" if is_8_bit(generator.unet) else str(generator.unet.dtype).removeprefix("torch.")
    # For `reopen`
    head: dict[str, Any] = {} if o.aesthetic is None else {"aesthetic": str(Path(o.aesthetic).absolute())}
    parts = {name: value for name in ("vae", "text_encoder", "prediction") if (value := getattr(o, name))}
    parts = {name: str(user_path(v).absolute()) if user_path(v).exists() else v for name, v in parts.items()}
    head |= {} if parts == {"prediction": "auto"} else {"parts": parts}
    return {"binding": binding, "info": {**_versions(), "attention": generator.attention.text, **head}}


def _versions() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "safetensors", "pillow", "numpy")
    return {
        "genkit": __version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **{name: version(name) for name in packages},
    }
