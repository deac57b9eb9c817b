"""Training objective of a diffusion network: noised pictures, targets, and loss weights by noise level."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from genkit.errors import InputError
from genkit.schedulers import Scheduler
from genkit.schedulers.diffusers_config import KEYS
from genkit.schedulers.prediction import PREDICTIONS
from genkit.training.recipe import Objective

MOST_SNR = 1000.0  # upper bound of the SNR in debiased weights, which is infinite without noise


class Noised(NamedTuple):
    """Noised pictures x (B, C, H, W), timesteps t for the network (B,), its target, and loss weights (B,)."""

    x: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


def objective_scheduler(scheduler: Scheduler, objective: Objective) -> Scheduler:
    """Return the scheduler of the trained network, with the recipe's prediction and zero_snr.

    With zero_snr it starts at pure noise, and is of a class that supports this in diffusers too.
    """
    asked = {"prediction": objective.prediction, "zero_snr": objective.zero_snr}
    made = scheduler.with_options(**{key: value for key, value in asked.items() if value is not None})
    if not objective.zero_snr:
        return made
    if "rescale_betas_zero_snr" not in KEYS[made.to_config()["_class_name"]]:
        made = made.with_options(solver="ddim", clip=None)  # replaces PNDM, which does not clip either
    early = {"spacing": "trailing"} if made.spacing == "leading" else {}
    return made.with_options(**early, **({"ends": "trailing"} if made.ends == "leading" else {}))


class Noising:
    """A scheduler's noise levels and a recipe's objective, as tables over the training timesteps 0 … N-1."""

    def __init__(self, scheduler: Scheduler, objective: Objective, device: torch.device) -> None:
        self.objective, self.prediction = objective, PREDICTIONS[scheduler.prediction]
        self.count = scheduler.num_train_timesteps
        levels = scheduler.levels(np.arange(self.count))
        if scheduler.prediction == "epsilon" and (scheduler.zero_snr or not levels.alpha.all()):
            raise InputError(
                "objective.prediction: epsilon says nothing about the picture at pure noise (zero_snr, or flow)"
            )
        weight = loss_weights(levels.alpha, levels.sigma, scheduler.prediction, objective)
        scale = self.prediction.c_in(levels.alpha, levels.sigma)
        columns = (levels.alpha, levels.sigma, levels.t, scale, weight)
        self.table = torch.from_numpy(np.stack(columns)).to(device, torch.float32)

    def draw(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Draw timesteps (B,) int64 from the objective's density."""
        where = generator.device
        if self.objective.density == "logit_normal":  # Esser et al. 2024, equation 19
            normal = torch.randn(batch, generator=generator, device=where)
            fraction = torch.sigmoid(self.objective.mean + self.objective.std * normal)
            return (fraction * self.count).long().clamp(max=self.count - 1)
        return torch.randint(self.count, (batch,), generator=generator, device=where)

    def __call__(
        self, x0: torch.Tensor, generator: torch.Generator, timesteps: torch.Tensor | None = None, plain: bool = False
    ) -> Noised:
        """Noise x0 (B, C, H, W) in float32, at drawn or given timesteps (B,), with noise from `generator`.

        plain: without offset noise, input perturbation and loss weights, for a validation loss.
        """
        t = self.draw(len(x0), generator) if timesteps is None else timesteps
        alpha, sigma, timestep, scale, weight = (column.view(-1, 1, 1, 1) for column in self.table[:, t])
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        mixed = eps
        if not plain and self.objective.offset_noise:
            channels = torch.randn((*x0.shape[:2], 1, 1), generator=generator, device=x0.device)
            mixed = eps = eps + self.objective.offset_noise * channels
        if not plain and self.objective.input_perturbation:
            extra = torch.randn(x0.shape, generator=generator, device=x0.device)
            mixed = eps + self.objective.input_perturbation * extra
        target = self.prediction.target(x0, eps, alpha, sigma)
        ones = torch.ones_like(weight)
        return Noised(
            (alpha * x0 + sigma * mixed) * scale, timestep.flatten(), target, (ones if plain else weight).flatten()
        )


def loss_weights(alpha: np.ndarray, sigma: np.ndarray, prediction: str, objective: Objective) -> np.ndarray:
    """Return the weight of the squared error of the network's output at each level.

    With x0 = px x + pm output, an error of the output is pm times one of x0; so weights w(SNR) of x0 errors become
    w pm^2, whatever the prediction: min(SNR, gamma) of Hang et al. 2023, SNR^(1/2) of Yu et al. 2024.
    """
    if objective.snr_gamma is None and not objective.debiased:
        return np.ones_like(alpha)
    with np.errstate(divide="ignore"):
        snr = np.minimum((alpha / sigma) ** 2, 1e12)
    slope = PREDICTIONS[prediction].to_x0(alpha, sigma)[1] ** 2
    gamma = objective.snr_gamma
    return slope * (np.sqrt(np.minimum(snr, MOST_SNR)) if gamma is None else np.minimum(snr, gamma))
