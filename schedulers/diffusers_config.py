"""diffusers' scheduler_config.json: a closed list of classes and keys, read into Options and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.errors import InputError, nearest, shown
from genkit.files import place, read_json
from genkit.schedulers.options import Options
from genkit.schedulers.solvers import SOLVERS

Config = Mapping[str, Any]
DEFAULTED = "_use_default_values"  # the keys that diffusers filled in from its own defaults
META = ("_class_name", "_diffusers_version", "_name_or_path")
# Of each class its default solver, its style (see STYLES), and its keys with their defaults.
CLASSES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("diffusers_classes.json").read_bytes())
KEYS: dict[str, dict[str, Any]] = {name: known["keys"] for name, known in CLASSES.items()}
FLOW, HEUN, PNDM = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "PNDMScheduler"
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
SIGMAS = {
    "use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
}  # fmt: skip
# Keys whose value is that of an option: {key: option}.
SAME = {
    "num_train_timesteps": "num_train_timesteps", "beta_start": "beta_start", "beta_end": "beta_end",
    "prediction_type": "prediction", "rescale_betas_zero_snr": "zero_snr", "steps_offset": "steps_offset",
    "final_sigmas_type": "final", "lower_order_final": "lower_order_final", "euler_at_final": "euler_at_final",
    "shift": "shift", "original_inference_steps": "original_inference_steps", "corrector_order": "corrector_order",
}  # fmt: skip
# A key takes its default; besides, those in ANY take any value of the default's type, those in VALUES the ones listed.
ANY = {
    *SAME, *SIGMAS, "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio",
    "sample_max_value", "set_alpha_to_one", "use_flow_sigmas", "flow_shift", "predict_x0", "use_dynamic_shifting",
    "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
}  # fmt: skip
VALUES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": (*BETAS,), "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"), "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"), "skip_prk_steps": (True,),
    "solver_order": (1, 2, 3), "predictor_order": (1, 2, 3, 4), "corrector_order": (1, 2, 3, 4),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"), "sigma_schedule": ("karras", "exponential"),
    "time_shift_type": ("exponential", "linear"),
}  # fmt: skip
# Keys of other classes, which saved configs still carry after a change of class: ignored.
FOREIGN = {key for name in KEYS if name not in (FLOW, HEUN) for key in KEYS[name]} | {"lower_order_second", "s_noise"}
# Of each solver its diffusers class, and the keys that select it there.
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{k["solver"]: (name, {}) for name, k in reversed(CLASSES.items()) if k["style"] not in ("edm", "flow")},
    "pndm": (PNDM, {"skip_prk_steps": True}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}),
    "sa": ("SASolverScheduler", {"algorithm_type": "data_prediction"}),
}
for _solver in (name for name in SOLVERS if "dpm" in name and name[-2:] in ("2m", "3m", "2s", "3s")):
    _kind = {"algorithm_type": _solver[:-3].replace("dpmpp", "dpmsolver++"), "solver_order": int(_solver[-2])}
    DIFFUSERS[_solver] = (MULTI if _solver[-1] == "m" else SINGLE, _kind)


def read_config(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (values of Options by name, the config without diffusers' defaults); config: see Scheduler.from_config.

    Raises InputError, naming file and key.
    """
    if hasattr(config, "config"):  # a diffusers scheduler: its config names the class only after it was saved
        config = {**config.config, "_class_name": type(config).__name__}
    if isinstance(config, Mapping):
        defaulted = config.get(DEFAULTED)  # another class takes its own defaults for these
        dropped = {DEFAULTED, *map(str, defaulted)} if isinstance(defaulted, list | tuple) else set()
        stated = {key: value for key, value in config.items() if key not in dropped}
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

    Keys that the config states stay, others take the new class's default. A solver without a diffusers class takes
    those of DPM-Solver.
    """
    if CLASSES[str(source["_class_name"])]["style"] in ("edm", "flow"):
        return {**_options(source), "solver": solver}
    name, keys = DIFFUSERS.get(solver, DIFFUSERS["dpmpp_2m"])
    style = {} if solver in DIFFUSERS else {"style": SOLVERS[solver].style}
    return {**_options({**source, "_class_name": name, **keys}), "solver": solver, **style}


def write_config(s: Options) -> dict[str, Any]:
    """Return the diffusers config of these options. Raises InputError for an option that diffusers has no key for."""
    if s.solver not in DIFFUSERS:
        raise InputError(f"solver: diffusers has no class for {s.solver!r}")
    name, keys = DIFFUSERS[s.solver]
    if s.noise == "flow" and s.solver in ("euler", "heun"):
        name, keys = (FLOW if s.solver == "euler" else HEUN), {}
    elif s.noise == "edm":
        name = "EDMEulerScheduler" if s.solver == "euler" else "EDMDPMSolverMultistepScheduler"
    values = {**keys, **_values(s)} if s.order else {**_values(s), **keys}
    full = {**KEYS[name], **{key: value for key, value in values.items() if key in KEYS[name]}}
    stated = {*(s.source or full)} - {"lambda_min_clipped"}  # whose -Infinity is not JSON
    config = {"_class_name": name, **{k: v for k, v in full.items() if k in stated or v != KEYS[name][k]}}
    config |= {"skip_prk_steps": True} if name == PNDM else {}
    config |= {"rescale_betas_zero_snr": True} if s.zero_snr else {}  # also where diffusers has no key for it
    back = Options(**_options(config))
    solver_options = {option for solver in SOLVERS.values() for option in solver.options}
    # options that do not change the plan, or only in diffusers' style
    unread = {"style", "ends", "source", "solver", "order"} | solver_options - {*SOLVERS[s.solver].options}
    unread |= set() if s.spacing == "leading" else {"steps_offset"}
    same = {"order_or_default"} if back.solver == s.solver else {"solver"}
    for field in sorted({f.name for f in dataclasses.fields(s)} - unread | same):
        if getattr(s, field) != getattr(back, field):
            raise InputError(f"{field}: {shown(getattr(s, field))} cannot be said in the config of a {name}")
    return config


def _values(s: Options) -> dict[str, Any]:
    """Return the values of all keys that express an option, whichever class they are for."""
    base, most, few, many, kind = s.dynamic_shift or (0.5, 1.15, 256, 4096, "exponential")
    quantile, bound = s.threshold or (0.995, 1.0)
    return {
        **{key: getattr(s, option) for key, option in SAME.items()},
        "beta_schedule": {new: old for old, new in BETAS.items()}.get(s.noise, "linear"),
        "trained_betas": None if s.trained_betas is None else list(s.trained_betas),
        "prediction_type": {"edm": "epsilon", "edm_v": "v_prediction"}.get(s.prediction, s.prediction),
        "timestep_spacing": s.spacing if s.spacing in VALUES["timestep_spacing"] else s.ends,
        **{key: s.spacing == spacing for key, spacing in SIGMAS.items()}, "sigma_schedule": s.spacing,
        "use_flow_sigmas": s.noise == "flow", "flow_shift": s.shift, "set_alpha_to_one": s.final == "zero",
        "clip_sample": s.clip is not None, "clip_sample_range": 1.0 if s.clip is None else s.clip,
        "thresholding": s.threshold is not None, "dynamic_thresholding_ratio": quantile, "sample_max_value": bound,
        "solver_order": s.order_or_default, "predictor_order": s.order_or_default, "predict_x0": not s.predict_eps,
        **({"solver_type": s.solver_type} if s.solver_type else {}),
        **({"sigma_min": s.sigma_min, "sigma_max": s.sigma_max} if s.noise == "edm" else {}),
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
        elif key == "rescale_betas_zero_snr" and "beta_schedule" in known:  # how the network was trained, in any class
            full[key] = _checked("DDIMScheduler", key, value)
        elif key not in FOREIGN and key not in META:
            raise InputError(f"{shown(key)}: unknown key of {name}{nearest(key, [*known, *META])}")
    if name == PNDM and "skip_prk_steps" not in config:
        raise InputError(f"skip_prk_steps: missing, and the default of {name} is not supported; True is")
    own = {"solver": CLASSES[name]["solver"], "style": CLASSES[name]["style"]}
    return {**own, **_common_options(full), **_class_options(name, full)}


def _checked(name: str, key: str, value: Any) -> Any:
    """Return the value of a class's key. Raises InputError for one that is not supported."""
    default = KEYS[name][key]
    known = (True,) if key == "skip_prk_steps" else (default, *(v for v in VALUES.get(key, ()) if v != default))
    if value is None and default is False:
        return False
    if any(value == v and type(value) is type(v) for v in known):
        return value
    if key == "trained_betas":
        good = isinstance(value, list | tuple) and all(isinstance(b, float) for b in value)
    elif key in VALUES or not (key in ANY or (key in ("sigma_min", "sigma_max") and default)):
        raise InputError(f"{key}: {shown(value)} is not supported for {name}; {' or '.join(map(repr, known))} is")
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    else:
        good = type(value) is type(default)
    if not good:
        raise InputError(f"{key}: {shown(value)} is not of the kind of {default!r}")
    return value


def _common_options(c: Config) -> dict[str, Any]:
    """Return the options whose keys mean the same in every class."""
    found = {option: c[key] for key, option in SAME.items() if key in c}
    if "beta_schedule" in c:
        betas, plain = c["trained_betas"], c.get("timestep_spacing", "linspace")
        in_sigma = [spacing for key, spacing in SIGMAS.items() if c.get(key)]
        found |= {"noise": BETAS[c["beta_schedule"]], "trained_betas": None if betas is None else tuple(betas)}
        found |= {"spacing": (in_sigma or [plain])[0], "ends": plain}
    if c.get("thresholding"):
        found["threshold"] = (float(c["dynamic_thresholding_ratio"]), float(c["sample_max_value"]))
    elif c.get("clip_sample"):
        found["clip"] = float(c["clip_sample_range"])
    if "set_alpha_to_one" in c:
        found["final"] = "zero" if c["set_alpha_to_one"] else "sigma_min"
    if c.get("use_flow_sigmas"):
        found |= {"noise": "flow", "shift": float(c["flow_shift"]), "spacing": "linspace", "style": "flow-dpm"}
    return found


def _class_options(name: str, c: Config) -> dict[str, Any]:
    """Return the options that depend on the class, or whose keys are its own."""
    solver, style, flow = CLASSES[name]["solver"], CLASSES[name]["style"], bool(c.get("use_flow_sigmas"))
    if solver == "ddpm":  # for fixed_small the logarithm is taken and undone
        return {"variance": c["variance_type"].removesuffix("_log")}
    if style == "lcm":  # TCD has keys for a clip and does not read them
        tcd = {"eta": 0.3, "clip": None, "threshold": None} if solver == "tcd" else {}
        return {"spacing": "lcm", "final": "zero", **tcd}
    if style == "flow":
        ends = [c.get(key) for key in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")]
        dynamic = {"dynamic_shift": (*ends, c["time_shift_type"])} if c.get("use_dynamic_shifting") else {}
        return {"noise": "flow", "spacing": "linspace", "prediction": "flow_prediction", **dynamic}
    if solver in ("deis", "sa"):
        # with spacings in sigma diffusers ends at the level of the last call; flow's is far from sigma 0
        return {"order": c.get("solver_order") or c["predictor_order"], "final": "zero" if flow else "sigma_min"}
    if solver == "unipc":
        near = {"style": "flow-unipc"} if flow else {}
        kind = {"solver_type": "bh1"} if c["solver_type"] == "bh1" else {}
        return {"order": c["solver_order"], "predict_eps": not c["predict_x0"], **kind, **near}
    found = _dpm_options(solver[-1], c) if "solver_order" in c else {}
    if style == "edm":
        prediction = "edm_v" if c["prediction_type"] == "v_prediction" else "edm"
        ends_of = {"sigma_min": float(c["sigma_min"]), "sigma_max": float(c["sigma_max"])}
        found |= {"noise": "edm", "prediction": prediction, "spacing": c["sigma_schedule"], **ends_of}
    return found


def _dpm_options(letter: str, c: Config) -> dict[str, Any]:
    """Return the options of DPM-Solver; letter: m for multistep, s for singlestep."""
    kind = str(c["algorithm_type"]).replace("deis", "dpmsolver++").replace("dpmsolver++", "dpmpp")
    solver = f"{kind}_{max(2, c['solver_order'])}{letter}"
    if solver not in SOLVERS:
        raise InputError(f"solver_order: {c['solver_order']} is not supported for {c['algorithm_type']}; 1 or 2 is")
    order = {"order": 1} if c["solver_order"] == 1 else {}
    return {"solver": solver, **order, "solver_type": "heun" if c["solver_type"] == "heun" else None}
