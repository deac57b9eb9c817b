"""The training target, its weights and its noise, compared with diffusers' schedulers and the papers' formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from genkit.errors import InputError
from genkit.schedulers import Scheduler
from genkit.training.objective import Noising, objective_scheduler
from genkit.training.recipe import Objective
from tests.tiny import SCHEDULER

CPU = torch.device("cpu")
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False, **BETAS}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def noising(config: dict[str, Any], **objective: Any) -> Noising:
    told = Objective(**objective)
    return Noising(objective_scheduler(Scheduler.from_config(config), told), told, CPU)


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pictures and the noise that a generator of this seed adds to them."""
    x0 = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    return x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))


TIMES = torch.tensor([0, 100, 400, 700, 998, 999])


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_pictures_targets_and_min_snr_are_diffusers(prediction: Any, zero_snr: bool) -> None:
    if prediction == "epsilon" and zero_snr:
        with pytest.raises(InputError, match="says nothing about the picture at pure noise"):
            noising(SCHEDULER, prediction=prediction, zero_snr=True)
        return
    x0, eps = drawn()
    theirs = DDPMScheduler(**BETAS, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    ours = noising(SCHEDULER, prediction=prediction, zero_snr=zero_snr, snr_gamma=5.0)
    x, t, target, weight = ours(x0, torch.Generator().manual_seed(0), TIMES)
    torch.testing.assert_close(x, theirs.add_noise(x0, eps, TIMES), atol=2e-5, rtol=0)
    assert torch.equal(t, TIMES.float())
    wanted = {"epsilon": eps, "sample": x0, "v_prediction": theirs.get_velocity(x0, eps, TIMES)}[prediction]
    torch.testing.assert_close(target, wanted, atol=2e-5, rtol=0)
    snr = compute_snr(theirs, TIMES).double()  # as in diffusers' train_text_to_image.py
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
    torch.testing.assert_close(weight.double(), snr.clamp(max=5.0) / divisor, atol=1e-6, rtol=1e-3)


def test_flow_is_that_of_diffusers_with_its_shift() -> None:
    x0, eps = drawn()
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)  # its timesteps fall
    x, t, target, weight = noising(FLOW, snr_gamma=5.0)(x0, torch.Generator().manual_seed(0), TIMES)
    places = 999 - TIMES
    torch.testing.assert_close(t, theirs.timesteps[places], atol=1e-3, rtol=0)
    torch.testing.assert_close(x, theirs.scale_noise(x0, theirs.timesteps[places], eps), atol=1e-5, rtol=0)
    torch.testing.assert_close(target, eps - x0)
    sigma = theirs.sigmas[places].double()  # an error of the output is sigma times one of x0
    torch.testing.assert_close(
        weight.double(), ((1 - sigma) / sigma).square().clamp(max=5) * sigma**2, atol=1e-5, rtol=1e-3
    )


def test_debiased_weights_are_the_root_of_one_over_snr_for_epsilon() -> None:
    snr = compute_snr(DDPMScheduler(**BETAS), TIMES)
    weight = noising(SCHEDULER, debiased=True)(drawn()[0], torch.Generator(), TIMES).weight
    torch.testing.assert_close(weight[1:], snr[1:].rsqrt(), atol=1e-5, rtol=1e-3)


def test_every_weight_is_one_unless_asked_for_and_in_validation() -> None:
    x0, _ = drawn()
    assert noising(SCHEDULER)(x0, torch.Generator(), TIMES).weight.eq(1).all()
    plain = noising(SCHEDULER, snr_gamma=5.0, offset_noise=0.1, input_perturbation=0.1)(
        x0, torch.Generator().manual_seed(0), TIMES, plain=True
    )
    usual = noising(SCHEDULER)(x0, torch.Generator().manual_seed(0), TIMES)
    assert all(torch.equal(a, b) for a, b in zip(plain, usual, strict=True))


def test_offset_noise_is_part_of_the_target_and_input_perturbation_is_not() -> None:
    x0, eps = drawn()
    alpha, sigma = noising(SCHEDULER).table[:2, TIMES].view(2, -1, 1, 1, 1)
    offset = noising(SCHEDULER, offset_noise=0.5)(x0, torch.Generator().manual_seed(0), TIMES)
    added = offset.target - eps
    assert added.flatten(2).std(dim=2).max() < 1e-6 and 0.3 < float(added.std()) < 0.7  # a number for each channel
    torch.testing.assert_close(offset.x, alpha * x0 + sigma * offset.target)
    rough = noising(SCHEDULER, input_perturbation=0.5)(x0, torch.Generator().manual_seed(0), TIMES)
    assert torch.equal(rough.target, eps)
    extra = ((rough.x - alpha * x0) / sigma - eps)[1:]
    assert 0.45 < float(extra.std()) < 0.55


def test_logit_normal_times_are_as_esser_has_them() -> None:
    made = noising(FLOW, density="logit_normal", mean=0.5, std=1.2)
    share = (made.draw(20_000, torch.Generator().manual_seed(0)).double() + 0.5) / 1000
    logit = torch.log(share / (1 - share))
    assert abs(float(logit.mean()) - 0.5) < 0.03 and abs(float(logit.std()) - 1.2) < 0.03
    flat = noising(FLOW).draw(20_000, torch.Generator().manual_seed(0))
    assert np.bincount(flat // 100, minlength=10).min() > 1800


@pytest.mark.parametrize("config", [PNDM, SCHEDULER])
def test_zero_snr_is_written_so_that_diffusers_begins_at_pure_noise(config: dict[str, Any]) -> None:
    """PNDM has no key for it, and leading spacing would never be told the last timestep (Lin et al. 2024)."""
    told = Objective(prediction="v_prediction", zero_snr=True)
    written = objective_scheduler(Scheduler.from_config(config), told).to_config()
    theirs = DDIMScheduler.from_config(written)
    theirs.set_timesteps(4)
    assert written["_class_name"] == "DDIMScheduler" and not theirs.config["clip_sample"]
    assert int(theirs.timesteps[0]) == 999 and float(theirs.alphas_cumprod[999]) == 0
