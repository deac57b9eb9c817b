"""diffusers' scheduler_config.json: a closed list of classes and keys, read into a Scheduler's options and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.errors import InputError, nearest, shown
from genkit.files import place, read_json
from genkit.schedulers.solvers import SOLVERS

if TYPE_CHECKING:
    from genkit.schedulers.scheduler import Scheduler

Config = Mapping[str, Any]
UNSTATED = "_use_default_values"
META = ("_class_name", "_diffusers_version", "_name_or_path")
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
# The keys of each class with its defaults.
KEYS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("diffusers_classes.json").read_bytes())
FLOW, HEUN, PNDM = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "PNDMScheduler"
SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
# What keys may be besides their default, in classes that have them; keys of no entry here may not.
VALUES: dict[str, tuple[Any, ...] | type] = {
    "num_train_timesteps": int, "beta_start": float, "beta_end": float, "beta_schedule": (*BETAS,),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"), "steps_offset": int, "rescale_betas_zero_snr": bool,
    "clip_sample": bool, "clip_sample_range": float, "thresholding": bool, "dynamic_thresholding_ratio": float,
    "sample_max_value": float, "set_alpha_to_one": bool, "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"), "skip_prk_steps": (True,),
    **dict.fromkeys(SIGMAS, bool),
    "use_lu_lambdas": bool, "use_flow_sigmas": bool, "flow_shift": float, "shift": float,
    "solver_order": (1, 2, 3), "predictor_order": (1, 2, 3, 4), "corrector_order": (1, 2, 3, 4),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"), "lower_order_final": bool, "euler_at_final": bool,
    "predict_x0": bool, "original_inference_steps": int, "sigma_min": float, "sigma_max": float,
    "sigma_schedule": ("karras", "exponential"), "use_dynamic_shifting": bool, "base_shift": float, "max_shift": float,
    "base_image_seq_len": int, "max_image_seq_len": int, "time_shift_type": ("exponential", "linear"),
}  # fmt: skip
# A saved config carries the keys of classes that its folder went through; a class passes over those of others.
FOREIGN = {key for name, keys in KEYS.items() if name not in (FLOW, HEUN) for key in keys} | {
    "lower_order_second", "s_noise",
}  # fmt: skip


def read_config(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (options of a Scheduler, the keys that the config states). Raises InputError, naming file and key."""
    if hasattr(config, "config"):  # a scheduler of diffusers, whose config names its class only once it was saved
        config = {**config.config, "_class_name": type(config).__name__}
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

    What the config states stays; what it leaves open takes the new class's default. A solver that no class has takes
    the rest of DPM-Solver's.
    """
    name = str(source["_class_name"])
    if name in (FLOW, HEUN) or name.startswith("EDM"):
        return {**_options(source), "solver": solver}
    name, keys = DIFFUSERS.get(solver, DIFFUSERS["dpmpp_2m"])
    found = {"solver": solver} if solver not in DIFFUSERS else {}
    return {**_options({**source, "_class_name": name, **keys}), **found}


def write_config(scheduler: Scheduler) -> dict[str, Any]:
    """Return the diffusers config of a scheduler. Raises InputError for an option that diffusers has no key for."""
    s = scheduler
    if s.solver not in DIFFUSERS:
        raise InputError(f"solver: diffusers has no class for {s.solver!r}")
    name, keys = DIFFUSERS[s.solver]
    if s.noise == "flow" and s.solver in ("euler", "heun"):
        name, keys = (FLOW if s.solver == "euler" else HEUN), {}
    elif s.noise == "edm":
        name = "EDMEulerScheduler" if s.solver == "euler" else "EDMDPMSolverMultistepScheduler"
    said = {**keys, **_said(s)} if s.order else {**_said(s), **keys}
    full = {**KEYS[name], **{key: value for key, value in said.items() if key in KEYS[name]}}
    stated = {*(s.source or full)} - {"lambda_min_clipped"}  # whose -Infinity is not JSON
    config = {"_class_name": name, **{k: v for k, v in full.items() if k in stated or v != KEYS[name][k]}}
    config |= {"skip_prk_steps": True} if name == PNDM else {}
    config |= {"rescale_betas_zero_snr": True} if s.zero_snr else {}  # also where diffusers has no key for it
    back = type(s)(**_options(config))
    solver_options = {option for solver in SOLVERS.values() for option in solver.options}
    # what does not say which numbers come out, or only in diffusers' style
    unread = {"style", "ends", "source", "solver", "order"} | solver_options - {*SOLVERS[s.solver].options}
    unread |= set() if s.spacing == "leading" else {"steps_offset"}
    same = {"order_or_default"} if back.solver == s.solver else {"solver"}
    for field in sorted({f.name for f in dataclasses.fields(s)} - unread | same):
        if getattr(s, field) != getattr(back, field):
            raise InputError(f"{field}: {shown(getattr(s, field))} cannot be said in the config of a {name}")
    return config


def _said(s: Scheduler) -> dict[str, Any]:
    """Return every key that says something of a scheduler, whichever class it is for."""
    in_t = s.spacing in ("leading", "trailing", "linspace")
    base, most, few, many, kind = s.dynamic_shift or (0.5, 1.15, 256, 4096, "exponential")
    edm = {"edm": "epsilon", "edm_v": "v_prediction"}
    return {
        "num_train_timesteps": s.num_train_timesteps, "beta_start": s.beta_start, "beta_end": s.beta_end,
        "beta_schedule": {new: old for old, new in BETAS.items()}.get(s.noise, "linear"),
        "trained_betas": None if s.trained_betas is None else list(s.trained_betas),
        "prediction_type": edm.get(s.prediction, s.prediction), "timestep_spacing": s.spacing if in_t else s.ends,
        "steps_offset": s.steps_offset, "rescale_betas_zero_snr": s.zero_snr,
        **{key: s.spacing == spacing for key, spacing in SIGMAS.items()}, "use_lu_lambdas": s.spacing == "lu",
        "use_flow_sigmas": s.noise == "flow", "flow_shift": s.shift, "shift": s.shift,
        "set_alpha_to_one": s.final == "zero", "final_sigmas_type": s.final, "clip_sample": s.clip is not None,
        "clip_sample_range": 1.0 if s.clip is None else s.clip, "thresholding": s.threshold is not None,
        "dynamic_thresholding_ratio": (s.threshold or (0.995,))[0], "sample_max_value": (s.threshold or (0, 1.0))[1],
        "solver_order": s.order_or_default, "predictor_order": s.order_or_default, "corrector_order": s.corrector_order,
        "lower_order_final": s.lower_order_final, "euler_at_final": s.euler_at_final, "predict_x0": not s.predict_eps,
        **({"solver_type": s.solver_type} if s.solver_type else {}),
        **({"sigma_min": s.sigma_min, "sigma_max": s.sigma_max} if s.noise == "edm" else {}),
        "sigma_schedule": s.spacing, "original_inference_steps": s.original_inference_steps,
        **({"variance_type": s.variance} if s.solver == "ddpm" else {}),
        "use_dynamic_shifting": s.dynamic_shift is not None, "base_shift": base, "max_shift": most,
        "base_image_seq_len": few, "max_image_seq_len": many, "time_shift_type": kind,
    }  # fmt: skip


def _options(config: Config) -> dict[str, Any]:
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise InputError(
            f"_class_name: {shown(name)} is not supported{nearest(name, CLASSES)}; supported: {', '.join(CLASSES)}"
        )
    known = KEYS[name]
    full = dict(known)
    for key, value in config.items():
        if key in known:
            full[key] = _checked(name, key, value)
        elif key == "rescale_betas_zero_snr" and "beta_schedule" in known:  # what the network was trained with stays
            full[key] = _checked("DDIMScheduler", key, value)
        elif key not in FOREIGN and key not in META:
            raise InputError(f"{shown(key)}: unknown key of {name}{nearest(key, [*known, *META])}")
    if name == PNDM and "skip_prk_steps" not in config:
        raise InputError(f"skip_prk_steps: missing, and the default of {name} is not supported; True is")
    found = {"num_train_timesteps": full["num_train_timesteps"], **_axes(full), **CLASSES[name](full)}
    return found


def _checked(name: str, key: str, value: Any) -> Any:
    default, known = KEYS[name][key], VALUES.get(key, ())
    if name == PNDM and key == "skip_prk_steps":
        known, default = (True,), True
    if value is None and default is False:
        return False
    if value == default and type(value) is type(default):
        return value
    if key == "trained_betas":
        good = isinstance(value, list | tuple) and all(isinstance(b, float) for b in value)
    elif isinstance(known, tuple):
        some = (default, *(v for v in known if v != default))
        if not any(value == v and type(value) is type(v) for v in some):
            raise InputError(f"{key}: {shown(value)} is not supported for {name}; {' or '.join(map(repr, some))} is")
        return value
    elif known is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    else:
        good = type(value) is known
    if not good:
        raise InputError(f"{key}: {shown(value)} is not of the kind of {default!r}")
    return value


def _axes(c: Config) -> dict[str, Any]:
    """The options that keys say whatever the class."""
    found: dict[str, Any] = {}
    if "beta_schedule" in c:
        betas = c["trained_betas"]
        found = {
            "noise": BETAS[c["beta_schedule"]], "beta_start": c["beta_start"], "beta_end": c["beta_end"],
            "trained_betas": None if betas is None else tuple(betas), "prediction": c["prediction_type"],
            "zero_snr": bool(c.get("rescale_betas_zero_snr")), "steps_offset": c.get("steps_offset", 0),
        }  # fmt: skip
        plain = c.get("timestep_spacing", "linspace")
        in_k = [spacing for key, spacing in SIGMAS.items() if c.get(key)] + ["lu"] * bool(c.get("use_lu_lambdas"))
        found |= {"spacing": (in_k or [plain])[0], "ends": plain}
    if c.get("thresholding"):
        found["threshold"] = (float(c["dynamic_thresholding_ratio"]), float(c["sample_max_value"]))
    elif c.get("clip_sample"):
        found["clip"] = float(c["clip_sample_range"])
    for key, option in (("final_sigmas_type", "final"), ("lower_order_final", "lower_order_final"),
                        ("euler_at_final", "euler_at_final")):  # fmt: skip
        if key in c:
            found[option] = c[key]
    if "set_alpha_to_one" in c:
        found["final"] = "zero" if c["set_alpha_to_one"] else "sigma_min"
    if c.get("use_flow_sigmas"):
        found |= {"noise": "flow", "shift": float(c["flow_shift"]), "spacing": "linspace", "style": "flow-dpm"}
    return found


def _ddpm(c: Config) -> dict[str, Any]:
    # for fixed_small the logarithm is taken and undone
    return {"solver": "ddpm", "style": "ddpm", "variance": c["variance_type"].removesuffix("_log")}


def _styled(c: Config, style: str) -> dict[str, Any]:
    return {} if c.get("use_flow_sigmas") else {"style": style}


def _dpm(c: Config, letter: str = "m", style: str = "dpm") -> dict[str, Any]:
    kind = str(c["algorithm_type"]).replace("deis", "dpmsolver++").replace("dpmsolver++", "dpmpp")
    solver = f"{kind}_{max(2, c['solver_order'])}{letter}"
    if solver not in SOLVERS:
        raise InputError(f"solver_order: {c['solver_order']} is not supported for {c['algorithm_type']}; 1 or 2 is")
    order = {"order": 1} if c["solver_order"] == 1 else {}
    return {
        "solver": solver,
        **order,
        "solver_type": "heun" if c["solver_type"] == "heun" else None,
        **_styled(c, style),
    }


def _deis(c: Config) -> dict[str, Any]:
    # with spacings in sigma diffusers ends at the last level, called at twice; flow's is far from the picture
    final = "zero" if c["use_flow_sigmas"] else "sigma_min"
    return {"solver": "deis", "order": c["solver_order"], "final": final, **_styled(c, "dpm")}


def _unipc(c: Config) -> dict[str, Any]:
    flow = {"style": "flow-unipc"} if c["use_flow_sigmas"] else {"style": "dpm"}
    kind = {"solver_type": "bh1"} if c["solver_type"] == "bh1" else {}
    return {"solver": "unipc", "order": c["solver_order"], "predict_eps": not c["predict_x0"], **kind, **flow}


def _sa(c: Config) -> dict[str, Any]:
    final = "zero" if c["use_flow_sigmas"] else "sigma_min"
    orders = {"order": c["predictor_order"], "corrector_order": c["corrector_order"]}
    return {"solver": "sa", **orders, "final": final, **_styled(c, "dpm")}


def _edm(c: Config) -> dict[str, Any]:
    prediction = "edm_v" if c["prediction_type"] == "v_prediction" else "edm"
    ends = {"sigma_min": float(c["sigma_min"]), "sigma_max": float(c["sigma_max"])}
    return {"noise": "edm", "prediction": prediction, "spacing": c["sigma_schedule"], **ends}


def _flow(c: Config) -> dict[str, Any]:
    found = {"noise": "flow", "spacing": "linspace", "prediction": "flow_prediction", "style": "flow"}
    if not c.get("use_dynamic_shifting"):
        return {**found, "solver": "euler", "shift": float(c["shift"])}
    ends = (float(c["base_shift"]), float(c["max_shift"]), c["base_image_seq_len"], c["max_image_seq_len"])
    return {**found, "solver": "euler", "shift": float(c["shift"]), "dynamic_shift": (*ends, c["time_shift_type"])}


def _plain(solver: str, style: str, **more: Any) -> Callable[[Config], dict[str, Any]]:
    return lambda c: {"solver": solver, "style": style, **more}


def _lcm(solver: str, **more: Any) -> Callable[[Config], dict[str, Any]]:
    return lambda c: {
        "solver": solver, "style": "lcm", "spacing": "lcm", "final": "zero",
        "original_inference_steps": c["original_inference_steps"], **more,
    }  # fmt: skip


CLASSES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "DDIMScheduler": _plain("ddim", "ddim"),
    "DDIMParallelScheduler": _plain("ddim", "ddim"),
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    PNDM: _plain("pndm", "ddim"),
    "EulerDiscreteScheduler": _plain("euler", "euler"),
    "EulerAncestralDiscreteScheduler": _plain("euler_ancestral", "euler"),
    "HeunDiscreteScheduler": _plain("heun", "euler"),
    "LMSDiscreteScheduler": _plain("lms", "euler"),
    "KDPM2DiscreteScheduler": _plain("dpm2", "dpm2"),
    "KDPM2AncestralDiscreteScheduler": _plain("dpm2_ancestral", "dpm2"),
    "DPMSolverSDEScheduler": _plain("dpmpp_sde", "euler"),
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSinglestepScheduler": lambda c: _dpm(c, "s", "singlestep"),
    "DEISMultistepScheduler": _deis,
    "UniPCMultistepScheduler": _unipc,
    "SASolverScheduler": _sa,
    "LCMScheduler": _lcm("lcm"),
    "TCDScheduler": _lcm("tcd", eta=0.3, clip=None, threshold=None),  # it has the keys and does not read them
    "EDMEulerScheduler": lambda c: {**_edm(c), "solver": "euler", "style": "edm"},
    "EDMDPMSolverMultistepScheduler": lambda c: {**_dpm({**c, "use_flow_sigmas": False}), **_edm(c), "style": "edm"},
    FLOW: _flow,
    HEUN: lambda c: {**_flow(c), "solver": "heun"},
}

_MULTI, _SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
# Where a solver's options are kept in diffusers, and the keys that pick it there.
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": (PNDM, {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "sa": ("SASolverScheduler", {"algorithm_type": "data_prediction"}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    **{
        f"{kind}_{order}{letter}": (
            _MULTI if letter == "m" else _SINGLE,
            {"algorithm_type": kind.replace("dpmpp", "dpmsolver++"), "solver_order": order},
        )
        for kind in ("dpmpp", "dpmsolver", "sde-dpmpp", "sde-dpmsolver")
        for order in (2, 3)
        for letter in "ms"
        if f"{kind}_{order}{letter}" in SOLVERS
    },
}
