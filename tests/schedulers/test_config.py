"""diffusers' scheduler configs: what is read, what is refused and how it says so, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from genkit import InputError
from genkit.rows.plans import plan_for, scheduler_options
from genkit.schedulers import SOLVERS, Scheduler
from genkit.schedulers.diffusers_config import CLASSES

EMOJI = Path(__file__).parents[2] / "genkit" / "components" / "embedded" / "emoji" / "scheduler"
DDIM, DPM = {"_class_name": "DDIMScheduler"}, {"_class_name": "DPMSolverMultistepScheduler"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({**DDIM, "beta_strat": 0.1}, "'beta_strat': unknown key of DDIMScheduler (did you mean 'beta_start'?)"),
    ({"_class_name": "DDIMSchedular"}, "'DDIMSchedular' is not supported (did you mean 'DDIMScheduler'?)"),
    ({"_class_name": "os.system"}, "_class_name: 'os.system' is not supported; supported: DDIMScheduler,"),
    ({"_class_name": ["DDIMScheduler"]}, "is not supported"),
    ({}, "_class_name: None is not supported"),
    ({**DDIM, "_private": 1}, "'_private': unknown key"),
    (
        {**DDIM, "prediction_type": "banana"},
        "prediction_type: 'banana' is not supported for DDIMScheduler; 'epsilon' or",
    ),
    ({**DDIM, "timestep_spacing": "Leading"}, "timestep_spacing: 'Leading' is not supported"),
    ({**DDIM, "thresholding": "yes"}, "thresholding: 'yes' is not of the kind of False"),
    (
        {**DDIM, "thresholding": True, "dynamic_thresholding_ratio": 1.5},
        "threshold: 1.5 is not a number from 1e-06 to 1",
    ),
    ({**DDIM, "beta_schedule": "laplace"}, "beta_schedule: 'laplace' is not supported"),
    ({**DDIM, "beta_start": 0.5, "beta_end": 0.1}, "beta_end: 0.1 is less than beta_start 0.5"),
    ({**DDIM, "beta_start": -0.1}, "beta_start: -0.1 is not a number"),
    ({**DDIM, "beta_end": 1.5}, "beta_end: 1.5 is not a number"),
    ({**DDIM, "beta_end": float("nan")}, "beta_end: nan"),
    (
        {**DDIM, "num_train_timesteps": 3, "trained_betas": [0.1, -0.2, 0.3]},
        "betas: must be at least two numbers between 0 and 1",
    ),
    ({**DDIM, "beta_end": 10**400}, "beta_end: "),
    ({**DDIM, "clip_sample_range": 10**400}, "clip_sample_range: "),
    ({**DDIM, "_use_default_values": 5}, "'_use_default_values': unknown key"),
    ({**DDIM, "trained_betas": [0.1, 0.2]}, "trained_betas: 2 for num_train_timesteps 1000"),
    ({**DDIM, "trained_betas": ["a"] * 1000}, "trained_betas: "),
    ({**DDIM, "num_train_timesteps": 2**31}, "num_train_timesteps: 2147483648 is not a whole number from 2 to 100000"),
    ({**DDIM, "num_train_timesteps": 1000.5}, "num_train_timesteps: 1000.5"),
    ({**DDIM, "clip_sample": "yes"}, "clip_sample: 'yes'"),
    ({**DPM, "solver_order": 4}, "solver_order: 4 is not supported for DPMSolverMultistepScheduler; 2 or 1 or 3 is"),
    (
        {**DPM, "solver_order": 3, "algorithm_type": "sde-dpmsolver"},
        "solver_order: 3 is not supported for sde-dpmsolver",
    ),
    ({**DPM, "lambda_min_clipped": -5.1}, "lambda_min_clipped: -5.1 is not supported"),
    ({**DPM, "algorithm_type": "dpmsolverr"}, "algorithm_type: 'dpmsolverr' is not supported"),
    ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, "disable_corrector: [0] is not supported"),
    ({"_class_name": "IPNDMScheduler"}, "'IPNDMScheduler' is not supported (did you mean 'PNDMScheduler'?)"),
    (
        {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
        "variance_type: 'learned_range' is not supported",
    ),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas: True is not supported"),
    ({"_class_name": "PNDMScheduler"}, "skip_prk_steps: missing"),
    ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "skip_prk_steps: False is not supported"),
]


@pytest.mark.parametrize(("config", "words"), BAD, ids=[words[:50] for _, words in BAD])
def test_a_bad_config_is_one_line_that_says_what_and_what_instead(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        Scheduler.from_config(config)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("[]", "not a JSON object"), ('{"a": 1, "a": 2}', "'a': key is given twice"),
     ('{"beta_end": NaN}', "NaN is not JSON"), ("[" * 100_000, "nested too deeply"),
     ("x" * 2**21, "has 2097152 bytes")],
    ids=["empty", "list", "twice", "nan", "deep", "large"],
)  # fmt: skip
def test_a_bad_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        Scheduler.from_config(tmp_path)
    assert "scheduler_config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, "a\x00b"):
        with pytest.raises(InputError):
            Scheduler.from_config(path)


@pytest.mark.parametrize("name", CLASSES)
def test_what_diffusers_saves_is_read_and_written_back(name: str, tmp_path: Path) -> None:
    """Every class's own file, with all of its keys, among them DPM-Solver's -Infinity; and its object's config."""
    made = getattr(diffusers, name)(**({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
    made.save_pretrained(tmp_path)
    scheduler = Scheduler.from_config(tmp_path)
    assert scheduler == Scheduler.from_config(dict(made.config))
    written = scheduler.to_config()
    assert Scheduler.from_config(json.loads(json.dumps(written))) == scheduler
    again = getattr(diffusers, name).from_config(written)
    assert public(again) == public(made)


def public(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("options", [
    {"solver": "dpmpp_2m", "spacing": "karras", "order": 1, "euler_at_final": True, "final": "sigma_min"},
    {"solver": "sde-dpmpp_2m", "lower_order_final": False}, {"solver": "ddim", "clip": 2.5, "final": "sigma_min"},
    {"solver": "ddpm", "variance": "fixed_large"}, {"solver": "heun", "clip": 1.5}, {"solver": "pndm"},
    {"solver": "euler", "spacing": "karras"}, {"solver": "euler_ancestral"}, {"solver": "dpm2"},
    {"solver": "lms", "spacing": "exponential"}, {"solver": "dpm2_ancestral", "spacing": "beta"},
    {"solver": "dpmpp_sde"}, {"solver": "deis", "final": "sigma_min"},
    {"solver": "deis", "order": 3, "final": "sigma_min"}, {"solver": "unipc", "order": 3, "solver_type": "bh1"},
    {"solver": "unipc", "predict_eps": True, "threshold": (0.9, 2.0)}, {"solver": "dpmpp_3m", "solver_type": "heun"},
    {"solver": "sa", "order": 3, "corrector_order": 4, "final": "sigma_min"},
    {"solver": "dpmsolver_2m", "spacing": "lu"},
    {"solver": "dpmpp_2s", "spacing": "karras"}, {"solver": "dpmpp_3s", "spacing": "linspace", "solver_type": "heun"},
])  # fmt: skip
def test_to_config_round_trips(options: dict[str, Any]) -> None:
    common: dict[str, Any] = {"noise": "cosine", "prediction": "v_prediction", "zero_snr": True, "steps_offset": 1}
    for start in (Scheduler(**common), Scheduler.from_config(EMOJI)):
        scheduler = start.with_options(**options)
        again = Scheduler.from_config(scheduler.to_config())
        same = scheduler.with_options(style=again.style, ends=again.ends)
        assert np.array_equal(again.plan(10).table, same.plan(10).table)


FLOW = {"noise": "flow", "prediction": "flow_prediction", "spacing": "linspace"}


@pytest.mark.parametrize(
    ("options", "field"),
    [({"eta": 0.5}, "eta"), ({"spacing": "karras"}, "spacing"), ({"solver": "euler", "clip": 1.0}, "clip"),
     ({**FLOW, "solver": "euler", "spacing": "karras"}, "spacing"),
     ({"order": 3, "solver": "unipc", "corrector": False}, "corrector")],
)  # fmt: skip
def test_to_config_refuses_what_diffusers_cannot_say(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"{field}: .* cannot be said"):
        Scheduler(**options).to_config()


def test_all_solvers_run_on_the_embedded_model() -> None:
    for solver in SOLVERS:
        for spacing in ("trailing", "leading", "karras"):
            plan = Scheduler.from_config(EMOJI).with_options(**scheduler_options(f"{solver}_{spacing}")).plan(20)
            assert plan.alphas[0] < 1e-3 or spacing == "leading"


def test_names_that_users_type() -> None:
    assert scheduler_options("dpmpp_2m_karras") == {"solver": "dpmpp_2m", "spacing": "karras"}
    assert scheduler_options("euler_a") == {"solver": "euler_ancestral"}
    assert scheduler_options("dpm++_2m_sde_karras") == {"solver": "sde-dpmpp_2m", "spacing": "karras"}
    assert scheduler_options({"solver": "ddim", "eta": 0.5}) == {"solver": "ddim", "eta": 0.5}
    assert scheduler_options({"spacing": "karras"}) == {"spacing": "karras"}


@pytest.mark.parametrize(("value", "words"), [
    ("banana", "'banana': no solver; there are ddim"), ("EULLER", "did you mean 'euler'"),
    ("eular", "did you mean 'euler'"), ("", "no solver"), ({"solver": ["ddim"]}, "no solver"),
    ({"solver": "ddim", "etta": 1}, "did you mean 'eta'"), ({"eta": 2}, "eta: 2 is not"),
    ({"solver": "ddim_karras", "spacing": "leading"}, "spacing: 'leading' and the solver's name says karras"),
    ({"prediction": "epsilon"}, "'prediction': no option of a solver"), (7, "7: is neither"), ({3: 4}, "3: no option"),
    ({"solver": "ddim", "threshold": 0.9}, "threshold: 0.9 is not a quantile and a bound"),
    ({"solver": "ddim", "threshold": [0.9]}, "threshold: .0.9,. is not a quantile"),
    ({"timesteps": 5}, "timesteps: 5 is not a list of numbers"), ({"sigmas": False}, "sigmas: False is not a list"),
    ({"solver": "ddim", "spacing": float("nan")}, "spacing: nan is not one of"),
])  # fmt: skip
def test_names_that_are_none(value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        scheduler_options(value)


@pytest.mark.parametrize(("value", "words"), [
    ({"solver": "dpmpp_2m", "eta": 1.0}, "scheduler: eta: 1.0: dpmpp_2m does not read it; it reads lower_order_final"),
    ({"eta": 0.5}, "scheduler: eta: 0.5: pndm does not read it$"),
    ({"solver": "euler", "original_inference_steps": 20}, "original_inference_steps: 20: is read with spacing 'lcm'"),
])  # fmt: skip
def test_an_option_that_changes_nothing_is_refused(value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan_for(Scheduler(solver="pndm"), value, 10)
    plan_for(Scheduler(solver="pndm"), {"eta": 0.0, "clip": 1.0}, 10)  # the default, and what acts with any solver
