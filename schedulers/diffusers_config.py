"""diffusers' scheduler_config.json: a closed table of classes and keys, read into a Scheduler's options and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError, nearest, shown
from genkit.schedulers.solvers import SOLVERS

if TYPE_CHECKING:
    from genkit.schedulers.scheduler import Scheduler

SIZE_LIMIT = 2**20  # bytes; a scheduler config with trained betas takes some 20,000
_META = ("_class_name", "_diffusers_version", "_name_or_path")
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}

# Keys that every class with betas has, and those for what is not expressed here, with the value that leaves it off.
_COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
    "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0, "rescale_betas_zero_snr": False,
}  # fmt: skip
_NO_SIGMAS = {"use_exponential_sigmas": False, "use_beta_sigmas": False}
_NO_THRESHOLD = {"thresholding": False}
_IDLE = {"dynamic_thresholding_ratio", "sample_max_value"}  # read only when `thresholding` is on


@dataclasses.dataclass(frozen=True)
class _Class:
    """A diffusers class: its keys with diffusers' defaults, those that must keep a value, and how options follow."""

    defaults: dict[str, Any]
    fixed: dict[str, Any]
    options: Callable[[dict[str, Any]], dict[str, Any]]


def _clip(c: dict[str, Any]) -> float | None:
    return float(c["clip_sample_range"]) if c["clip_sample"] else None


def _karras(c: dict[str, Any]) -> dict[str, Any]:
    return {"spacing": "karras", "ends": c["timestep_spacing"]} if c["use_karras_sigmas"] else {"ends": c["timestep_spacing"]}


def _ddim(c: dict[str, Any]) -> dict[str, Any]:
    return {"solver": "ddim", "style": "ddim", "clip": _clip(c), "final": "zero" if c["set_alpha_to_one"] else "sigma_min"}


def _ddpm(c: dict[str, Any]) -> dict[str, Any]:
    return {"solver": "ddpm", "style": "ddpm", "clip": _clip(c), "variance": c["variance_type"]}


def _pndm(c: dict[str, Any]) -> dict[str, Any]:
    return {"solver": "pndm", "style": "ddim", "final": "zero" if c["set_alpha_to_one"] else "sigma_min"}


def _euler(c: dict[str, Any]) -> dict[str, Any]:
    return {"solver": "euler", "style": "euler", "final": c["final_sigmas_type"], **_karras(c)}


def _ancestral(c: dict[str, Any]) -> dict[str, Any]:
    return {"solver": "euler_ancestral", "style": "euler"}


def _heun(c: dict[str, Any]) -> dict[str, Any]:
    return {"solver": "heun", "style": "euler", **_karras(c)}


def _dpm(c: dict[str, Any]) -> dict[str, Any]:
    solver = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "sde-dpmpp_2m"}.get(c["algorithm_type"])
    if solver is None:
        raise InputError(f"algorithm_type: {shown(c['algorithm_type'])} is not supported; dpmsolver++ and sde-dpmsolver++ are")
    easy = bool(c["lower_order_final"] or c["euler_at_final"])
    return {"solver": solver, "style": "dpm", "order": c["solver_order"], "easy_end": easy, "final": c["final_sigmas_type"],
            **_karras(c)}  # fmt: skip


def _flow(c: dict[str, Any]) -> dict[str, Any]:
    return {"noise": "flow", "spacing": "linspace", "prediction": "flow_prediction", "solver": "euler", "style": "flow",
            "shift": float(c["shift"]), "num_train_timesteps": c["num_train_timesteps"]}  # fmt: skip


_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
_LEADING = {**_COMMON, "timestep_spacing": "leading"}

CLASSES = {
    "DDIMScheduler": _Class({**_LEADING, **_CLIPPED, "set_alpha_to_one": True}, _NO_THRESHOLD, _ddim),
    "DDPMScheduler": _Class({**_LEADING, **_CLIPPED, "variance_type": "fixed_small"}, _NO_THRESHOLD, _ddpm),
    "PNDMScheduler": _Class(
        {**_LEADING, "set_alpha_to_one": False, "skip_prk_steps": False},
        {"skip_prk_steps": True, "rescale_betas_zero_snr": False},
        _pndm,
    ),
    "EulerDiscreteScheduler": _Class(
        {**_COMMON, "final_sigmas_type": "zero", "use_karras_sigmas": False},
        {**_NO_SIGMAS, "interpolation_type": "linear", "timestep_type": "discrete", "sigma_min": None, "sigma_max": None},
        _euler,
    ),
    "EulerAncestralDiscreteScheduler": _Class(_COMMON, {}, _ancestral),
    "HeunDiscreteScheduler": _Class(
        {**_COMMON, "beta_start": 0.00085, "beta_end": 0.012, "use_karras_sigmas": False, "clip_sample_range": 1.0},
        {**_NO_SIGMAS, "clip_sample": False, "rescale_betas_zero_snr": False},
        _heun,
    ),
    "DPMSolverMultistepScheduler": _Class(
        {**_COMMON, "solver_order": 2, "algorithm_type": "dpmsolver++", "lower_order_final": True, "euler_at_final": False,
         "use_karras_sigmas": False, "final_sigmas_type": "zero", "flow_shift": 1.0, "time_shift_type": "exponential"},
        {**_NO_SIGMAS, **_NO_THRESHOLD, "solver_type": "midpoint", "use_lu_lambdas": False, "use_flow_sigmas": False,
         "lambda_min_clipped": -math.inf, "variance_type": None, "use_dynamic_shifting": False},
        _dpm,
    ),
    "FlowMatchEulerDiscreteScheduler": _Class(
        {"num_train_timesteps": 1000, "shift": 1.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
         "max_image_seq_len": 4096, "time_shift_type": "exponential"},
        {**_NO_SIGMAS, "use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None,
         "use_karras_sigmas": False, "stochastic_sampling": False},
        _flow,
    ),
}  # fmt: skip


def read_config(config: str | Path | dict[str, Any]) -> dict[str, Any]:
    """Return the options of a Scheduler for a diffusers scheduler config. Raises InputError, naming file and key."""
    if isinstance(config, dict):
        return _options(config)
    path = Path(config)
    path = path / "scheduler_config.json" if path.is_dir() else path
    try:
        return _options(_parse(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def write_config(scheduler: Scheduler) -> dict[str, Any]:
    """Return the diffusers config of a scheduler that came from one; raises InputError for what diffusers cannot say."""
    names = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "pndm": "PNDMScheduler", "euler": "EulerDiscreteScheduler",
             "euler_ancestral": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler",
             "dpmpp_2m": "DPMSolverMultistepScheduler", "sde-dpmpp_2m": "DPMSolverMultistepScheduler"}  # fmt: skip
    s = scheduler
    name = "FlowMatchEulerDiscreteScheduler" if s.style == "flow" else names[s.solver]
    back = {new: old for old, new in _BETAS.items()}
    said: dict[str, Any] = {
        "num_train_timesteps": s.num_train_timesteps, "beta_start": s.beta_start, "beta_end": s.beta_end,
        "beta_schedule": back.get(s.noise, s.noise), "trained_betas": None if s.trained_betas is None else list(s.trained_betas),
        "prediction_type": s.prediction, "timestep_spacing": s.ends if s.spacing == "karras" else s.spacing,
        "steps_offset": s.steps_offset, "rescale_betas_zero_snr": s.zero_snr, "use_karras_sigmas": s.spacing == "karras",
        "set_alpha_to_one": s.final == "zero", "final_sigmas_type": s.final, "clip_sample": s.clip is not None,
        "clip_sample_range": s.clip or 1.0, "variance_type": s.variance, "solver_order": s.order, "shift": s.shift,
        "algorithm_type": "sde-dpmsolver++" if s.solver == "sde-dpmpp_2m" else "dpmsolver++",
        "lower_order_final": s.easy_end, "skip_prk_steps": True,
    }  # fmt: skip
    known = CLASSES[name]
    config = {"_class_name": name, **known.defaults, **known.fixed}
    config |= {key: said[key] for key in config if key in said and key not in known.fixed}
    config = {key: value for key, value in config.items() if value != -math.inf}
    if _options(config) != {**_options({"_class_name": name}), **_relevant(s, _options(config))}:
        raise InputError(f"scheduler: {s.solver} with these options has no diffusers config")
    return config


def _relevant(scheduler: Scheduler, options: dict[str, Any]) -> dict[str, Any]:
    return {key: getattr(scheduler, key) for key in options}


def _options(config: dict[str, Any]) -> dict[str, Any]:
    name = config.get("_class_name")
    if name not in CLASSES:
        raise InputError(f"_class_name: {shown(name)} is not supported{nearest(name, CLASSES)}; supported: {', '.join(CLASSES)}")
    known = CLASSES[name]
    allowed = {*known.defaults, *known.fixed, *_META, *(_IDLE if "thresholding" in known.fixed else ())}
    for key, value in config.items():
        if key not in allowed:
            raise InputError(f"{shown(key)}: unknown key of {name}{nearest(key, allowed)}")
        if key in known.fixed and value != known.fixed[key] and not (value is None and key in _NO_SIGMAS):
            raise InputError(f"{key}: {shown(value)} is not supported for {name}; {known.fixed[key]!r} is")
        if key in known.defaults and not _same_type(value, known.defaults[key], key):
            raise InputError(f"{key}: {shown(value)} is not of the type of {known.defaults[key]!r}")
    if "skip_prk_steps" in known.fixed and not config.get("skip_prk_steps"):
        raise InputError("skip_prk_steps: False is not supported for PNDMScheduler; True is")
    full = {**known.defaults, **{k: v for k, v in config.items() if k in known.defaults}}
    options = {**(_axes(full) if "beta_start" in full else {}), **known.options(full)}
    return options


def _axes(c: dict[str, Any]) -> dict[str, Any]:
    if c["beta_schedule"] not in _BETAS:
        raise InputError(f"beta_schedule: {shown(c['beta_schedule'])} is not supported; {', '.join(_BETAS)} are")
    betas = c["trained_betas"]
    return {
        "noise": _BETAS[c["beta_schedule"]],
        "num_train_timesteps": c["num_train_timesteps"] if betas is None else len(betas),
        "beta_start": c["beta_start"],
        "beta_end": c["beta_end"],
        "trained_betas": None if betas is None else tuple(betas),
        "zero_snr": c["rescale_betas_zero_snr"],
        "spacing": c["timestep_spacing"],
        "steps_offset": c["steps_offset"],
        "prediction": c["prediction_type"],
    }


def _same_type(value: Any, default: Any, key: str) -> bool:
    if key == "trained_betas":
        return value is None or (isinstance(value, list) and all(isinstance(b, float) for b in value))
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, type(default))


def _parse(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise InputError("a key stands twice")
        return found

    def constant(name: str) -> float:
        raise InputError(f"{name} is not a JSON number")

    try:
        if not path.is_file():
            raise InputError("no such file")
        if path.stat().st_size > SIZE_LIMIT:
            raise InputError(f"larger than {SIZE_LIMIT} bytes")
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"not readable as JSON ({type(error).__name__}: {' '.join(str(error).split())[:80]})") from None
    if not isinstance(found, dict):
        raise InputError("holds no JSON object")
    return found
