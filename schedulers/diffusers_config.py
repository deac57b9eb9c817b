"""diffusers' scheduler_config.json: a closed table of classes and keys, read into a Scheduler's options and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError, nearest, shown
from genkit.files import place, read_json
from genkit.schedulers.solvers import SOLVERS

if TYPE_CHECKING:
    from genkit.schedulers.scheduler import Scheduler

Config = Mapping[str, Any]
SOLVER_OPTIONS = {option for solver in SOLVERS.values() for option in solver.options}
UNREAD = {"style", "ends", "source"}  # what does not say which numbers come out, or only in diffusers' style
UNSTATED = "_use_default_values"
META = ("_class_name", "_diffusers_version", "_name_or_path")
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
FLOW = "FlowMatchEulerDiscreteScheduler"


@dataclasses.dataclass(frozen=True)
class Class:
    """A diffusers class. keys: each with its default there, or with the tuple of supported values, default first.

    options: what they are in a Scheduler. needs: keys whose default in diffusers is not supported.
    """

    keys: dict[str, Any]
    options: Callable[[Config], dict[str, Any]]
    needs: tuple[str, ...] = ()


def read_config(config: str | Path | Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (options of a Scheduler, the keys that the config states). Raises InputError, naming file and key."""
    if isinstance(config, Mapping):
        # diffusers' objects list the keys that nobody stated: another class takes its own defaults for them
        unstated = config.get(UNSTATED)
        open_keys = {UNSTATED, *map(str, unstated)} if isinstance(unstated, list | tuple) else set()
        stated = {key: value for key, value in config.items() if key not in open_keys}
        return _options(stated), stated
    path = Path(config)
    path = path / "scheduler_config.json" if path.is_dir() else path
    stated = read_json(path, infinite=True)  # diffusers writes lambda_min_clipped as -Infinity
    try:
        return _options(stated), stated
    except InputError as error:
        raise InputError(f"{place(path)}: {error}") from None


def swap_solver(source: Config, solver: str) -> dict[str, Any]:
    """Return the options of the class of `solver` made from another class's config, as diffusers' `from_config` does.

    What the config states stays; what it leaves open takes the new class's default.
    """
    if source["_class_name"] == FLOW:
        return {**_options(source), "solver": solver}
    name, keys = DIFFUSERS[solver]
    return _options({**source, "_class_name": name, **keys})


def write_config(scheduler: Scheduler) -> dict[str, Any]:
    """Return the diffusers config of a scheduler. Raises InputError for an option that diffusers has no key for."""
    s = scheduler
    name, keys = (FLOW, {}) if s.noise == "flow" else DIFFUSERS[s.solver]
    said: dict[str, Any] = {
        "num_train_timesteps": s.num_train_timesteps, "beta_start": s.beta_start, "beta_end": s.beta_end,
        "beta_schedule": {new: old for old, new in BETAS.items()}.get(s.noise),
        "trained_betas": None if s.trained_betas is None else list(s.trained_betas),
        "prediction_type": s.prediction, "timestep_spacing": s.ends if s.spacing == "karras" else s.spacing,
        "steps_offset": s.steps_offset, "rescale_betas_zero_snr": s.zero_snr,
        "use_karras_sigmas": s.spacing == "karras",
        "set_alpha_to_one": s.final == "zero", "final_sigmas_type": s.final, "clip_sample": s.clip is not None,
        "clip_sample_range": 1.0 if s.clip is None else s.clip, "solver_order": s.order, "shift": s.shift,
        "lower_order_final": s.lower_order_final, "euler_at_final": s.euler_at_final,
        **({"variance_type": s.variance} if s.solver == "ddpm" else {}), **keys,
    }  # fmt: skip
    defaults = {key: _default(value) for key, value in CLASSES[name].keys.items()}
    full = {key: said.get(key, value) for key, value in defaults.items()}
    stated = {*(s.source or full), *CLASSES[name].needs} - {"lambda_min_clipped"}  # whose -Infinity is not JSON
    config = {"_class_name": name, **{k: v for k, v in full.items() if k in stated or v != defaults[k]}}
    back = type(s)(**_options(config))
    unread = UNREAD | SOLVER_OPTIONS - {*SOLVERS[s.solver].options}
    for field in sorted({f.name for f in dataclasses.fields(s)} - unread):
        if getattr(s, field) != getattr(back, field):
            raise InputError(f"{field}: {shown(getattr(s, field))} cannot be said in the config of a {name}")
    return config


def _options(config: Config) -> dict[str, Any]:
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise InputError(
            f"_class_name: {shown(name)} is not supported{nearest(name, CLASSES)}; supported: {', '.join(CLASSES)}"
        )
    known = CLASSES[name]
    full = {key: _default(value) for key, value in known.keys.items()}
    for key, value in config.items():
        if key in META:
            continue
        if key in known.keys:
            full[key] = _checked(name, key, value, known.keys[key])
        elif key not in FOREIGN:
            raise InputError(f"{shown(key)}: unknown key of {name}{nearest(key, [*known.keys, *META])}")
    for key in known.needs:
        if key not in config:
            raise InputError(f"{key}: missing, and the default of {name} is not supported; {known.keys[key][0]!r} is")
    return known.options(full)


def _default(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _checked(name: str, key: str, value: Any, known: Any) -> Any:
    if isinstance(known, tuple):
        if not any(value == v and type(value) is type(v) for v in known):
            raise InputError(f"{key}: {shown(value)} is not supported for {name}; {' or '.join(map(repr, known))} is")
        return value
    if key == "trained_betas":
        good = value is None or (isinstance(value, list | tuple) and all(isinstance(b, float) for b in value))
    elif isinstance(known, float):
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    else:
        good = type(value) is type(known) or (value is None and known is False)
    if not good:
        raise InputError(f"{key}: {shown(value)} is not of the kind of {known!r}")
    return value


def _axes(c: Config) -> dict[str, Any]:
    """The options that every class with betas has."""
    betas = c["trained_betas"]
    return {
        "noise": BETAS[c["beta_schedule"]],
        "num_train_timesteps": c["num_train_timesteps"],
        "beta_start": c["beta_start"],
        "beta_end": c["beta_end"],
        "trained_betas": None if betas is None else tuple(betas),
        "zero_snr": bool(c["rescale_betas_zero_snr"]),
        "spacing": c["timestep_spacing"],
        "steps_offset": c["steps_offset"],
        "prediction": c["prediction_type"],
    }


def _clip(c: Config) -> float | None:
    return float(c["clip_sample_range"]) if c["clip_sample"] else None


def _karras(c: Config) -> dict[str, Any]:
    return {"spacing": "karras" if c["use_karras_sigmas"] else c["timestep_spacing"], "ends": c["timestep_spacing"]}


def _final(c: Config) -> str:
    return "zero" if c["set_alpha_to_one"] else "sigma_min"


def _ddim(c: Config) -> dict[str, Any]:
    return {**_axes(c), "solver": "ddim", "style": "ddim", "clip": _clip(c), "final": _final(c)}


def _ddpm(c: Config) -> dict[str, Any]:
    variance = c["variance_type"].removesuffix("_log")  # for fixed_small the logarithm is taken and undone
    return {**_axes(c), "solver": "ddpm", "style": "ddpm", "clip": _clip(c), "variance": variance}


def _pndm(c: Config) -> dict[str, Any]:
    return {**_axes(c), "solver": "pndm", "style": "ddim", "final": _final(c)}


def _euler(c: Config) -> dict[str, Any]:
    return {**_axes(c), **_karras(c), "solver": "euler", "style": "euler", "final": c["final_sigmas_type"]}


def _ancestral(c: Config) -> dict[str, Any]:
    return {**_axes(c), "solver": "euler_ancestral", "style": "euler"}


def _heun(c: Config) -> dict[str, Any]:
    return {**_axes(c), **_karras(c), "solver": "heun", "style": "euler", "clip": _clip(c)}


def _dpm(c: Config) -> dict[str, Any]:
    solver = "sde-dpmpp_2m" if c["algorithm_type"] == "sde-dpmsolver++" else "dpmpp_2m"
    same = {"final": c["final_sigmas_type"], **{key: c[key] for key in ("lower_order_final", "euler_at_final")}}
    return {**_axes(c), **_karras(c), **same, "solver": solver, "style": "dpm", "order": c["solver_order"]}


def _flow(c: Config) -> dict[str, Any]:
    return {
        "noise": "flow",
        "spacing": "linspace",
        "prediction": "flow_prediction",
        "solver": "euler",
        "style": "flow",
        "shift": float(c["shift"]),
        "num_train_timesteps": c["num_train_timesteps"],
    }


_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": tuple(BETAS),
    "trained_betas": None,
    "prediction_type": ("epsilon", "v_prediction", "sample"), "timestep_spacing": ("linspace", "leading", "trailing"),
    "steps_offset": 0, "rescale_betas_zero_snr": False,
}  # fmt: skip
_LEADING = {**_BETAS, "timestep_spacing": ("leading", "trailing", "linspace")}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": (False,), "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_OFF = (False, None)
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": _OFF, "use_beta_sigmas": _OFF}
_FINAL = {"final_sigmas_type": ("zero", "sigma_min")}

CLASSES = {
    "DDIMScheduler": Class({**_LEADING, **_CLIP, **_THRESHOLD, "set_alpha_to_one": True}, _ddim),
    "DDPMScheduler": Class(
        {**_LEADING, **_CLIP, **_THRESHOLD, "variance_type": ("fixed_small", "fixed_large", "fixed_small_log")}, _ddpm
    ),
    "PNDMScheduler": Class(
        {**_LEADING, "set_alpha_to_one": False, "skip_prk_steps": (True,)}, _pndm, needs=("skip_prk_steps",)
    ),
    "EulerDiscreteScheduler": Class(
        {**_BETAS, **_SIGMAS, **_FINAL, "interpolation_type": ("linear",), "timestep_type": ("discrete",),
         "sigma_min": (None,), "sigma_max": (None,)},
        _euler,
    ),
    "EulerAncestralDiscreteScheduler": Class(_BETAS, _ancestral),
    "HeunDiscreteScheduler": Class(
        {**_BETAS, **_SIGMAS, **_CLIP, "clip_sample": False, "beta_start": 0.00085, "beta_end": 0.012}, _heun
    ),
    "DPMSolverMultistepScheduler": Class(
        {**_BETAS, **_SIGMAS, **_FINAL, **_THRESHOLD, "solver_order": (2, 1), "lower_order_final": True,
         "euler_at_final": False, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
         "solver_type": ("midpoint", "logrho", "bh1", "bh2"), "use_lu_lambdas": _OFF, "use_flow_sigmas": _OFF,
         "flow_shift": 1.0, "lambda_min_clipped": (-math.inf,), "use_dynamic_shifting": (False,),
         "time_shift_type": ("exponential",), "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large")},
        _dpm,
    ),
    FLOW: Class(
        {"num_train_timesteps": 1000, "shift": 1.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
         "max_image_seq_len": 4096, "time_shift_type": ("exponential", "linear"), "use_dynamic_shifting": (False,),
         "invert_sigmas": (False,), "shift_terminal": (None,), "stochastic_sampling": (False,),
         **_SIGMAS, "use_karras_sigmas": _OFF},
        _flow,
    ),
}  # fmt: skip

# Where a solver's options are kept in diffusers, and the keys that pick it there.
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}

# A saved config carries the keys of classes that its folder went through; a class passes over those of others.
FOREIGN = {key for name, known in CLASSES.items() if name != FLOW for key in known.keys} | {
    "predict_x0", "solver_p", "disable_corrector", "noise_sampler_seed", "lower_order_second", "s_noise",
}  # fmt: skip
