"""Scheduler.from_config against the diffusers classes themselves: every network input of a trajectory, and its end.

The cases and the loop of diffusers' pipelines are benchmarks/scheduler_parity.py's.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from genkit.schedulers import Scheduler
from genkit.schedulers.diffusers_config import CLASSES, DIFFUSERS, KEYS
from tests.grids import thinned


def _load() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "scheduler_parity.py"
    spec = importlib.util.spec_from_file_location("scheduler_parity", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


parity = _load()
SD, ZERO, gap, ours, theirs = parity.SD, parity.ZERO, parity.gap, parity.ours, parity.theirs
# Image-to-image is left alone where diffusers' PNDM tells the network a level that x is not at, and where its LMS
# weighs one prediction as the newest of four, of which three are missing
WHOLE = {"PNDMScheduler", "LMSDiscreteScheduler"}
FIRST = {case[0]: case for case in reversed(parity.CASES) if not parity.reason(case)}  # of each class


@pytest.mark.parametrize("case", thinned(parity.CASES, 7, keep=FIRST.values()), ids=parity.label)
def test_from_config_equals_the_class(case: Any) -> None:
    name, options = case
    if parity.reason(case):
        plan = Scheduler.from_config({"_class_name": name, **options}).plan(25)
        assert np.isfinite(ours(plan)[-1][1].numpy()).all()
        return
    found = {steps: parity.compare(case, steps) for steps in parity.STEPS[:2]}  # the benchmark has the longest as well
    # Euler ancestral's sigma_down is the root of a difference of two squares, in single precision
    assert max(found.values()) <= (2e-5 if name == "EulerAncestralDiscreteScheduler" else 1e-5), found


@pytest.mark.parametrize("case", [c for c in FIRST.values() if c[0] not in WHOLE], ids=lambda c: c[0])
def test_image_to_image_equals_the_class(case: Any) -> None:
    found = {(n, s): parity.compare(case, n, s) for n, s in ((10, 0.6), (15, 0.3), (25, 0.6))}
    assert max(found.values()) <= (2e-5 if "Ancestral" in case[0] else 1e-5), found


def test_there_are_enough_cases_and_no_class_is_left_out() -> None:
    assert len(parity.CASES) >= 150 and {name for name, _ in parity.CASES} == {*CLASSES}


def test_the_keys_and_defaults_are_those_of_diffusers() -> None:
    for name, keys in KEYS.items():
        made = getattr(diffusers, name)()
        there = {k: v for k, v in made.config.items() if not k.startswith("_")}
        assert there == keys, name


def test_another_solver_on_a_folder_is_what_diffusers_makes_of_it() -> None:
    """Other.from_config(old.config) keeps what the folder states and takes the new class's default for the rest."""
    stable_diffusion_1 = {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **SD, "num_train_timesteps": 1000,
        "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None,
    }  # fmt: skip
    xl = {
        "_class_name": "EulerDiscreteScheduler", **SD, "clip_sample": False, "interpolation_type": "linear",
        "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
    }  # fmt: skip
    emoji = {
        "_class_name": "DDIMScheduler", **ZERO, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1,
        "thresholding": False, "dynamic_thresholding_ratio": 0.995, "timestep_spacing": "trailing",
    }  # fmt: skip
    pixels = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "clip_sample": True}
    for config, solver in itertools.product((stable_diffusion_1, xl, emoji, pixels), DIFFUSERS):
        name, keys = DIFFUSERS[solver]
        old = getattr(diffusers, str(config["_class_name"])).from_config(config)
        if solver.startswith(("dpmsolver", "sde-dpmsolver")):
            keys = {**keys, "final_sigmas_type": "sigma_min"}  # diffusers refuses to end these at zero
        new = getattr(diffusers, name).from_config(old.config, **keys)
        if config is emoji and "rescale_betas_zero_snr" not in KEYS[name]:
            continue  # diffusers' have no zero SNR and would ask a network of another noise schedule
        if parity.reason((name, {"algorithm_type": new.config.get("algorithm_type"), **keys})):
            continue
        final = {"final": "sigma_min"} if "final_sigmas_type" in keys else {}
        plan = Scheduler.from_config(config).with_options(solver=solver, **final).plan(20)
        # Zero SNR begins at sigma 4096, where diffusers' single precision rounds differently on each processor.
        assert gap(ours(plan), theirs(new, 20)) <= (5e-5 if config is emoji else 2e-5), (config["_class_name"], solver)


def test_options_chosen_before_a_swap_stay_when_the_new_solver_has_them() -> None:
    base = Scheduler.from_config({"_class_name": "DDIMScheduler", **SD})
    swapped = base.with_options(spacing="karras", eta=0.5, clip=3.0).with_options(solver="heun")
    assert (swapped.spacing, swapped.eta, swapped.clip, swapped.style) == ("karras", 0.0, 3.0, "euler")
    assert swapped.with_options(solver="ddim").clip == 3.0
