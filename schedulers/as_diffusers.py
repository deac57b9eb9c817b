"""A Scheduler's plans behind the interface of diffusers' schedulers, for diffusers' own pipelines. Needs diffusers."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from genkit.errors import InputError
from genkit.schedulers.plan import HISTORY, Plan, step


class PlanScheduler(SchedulerMixin, ConfigMixin):
    """Follows the plans of a genkit Scheduler; eta, clip and the like are its own, pipelines cannot change them.

    Samples are in (alpha, sigma) scale. Saving writes the config of the diffusers class that is meant, and raises
    InputError where none is.
    """

    config_name: Any = "scheduler_config.json"
    num_inference_steps: int
    _history: torch.Tensor | None

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.order = scheduler, 1 + (scheduler.plan(3).nfe > 4)
        try:
            config = scheduler.to_config()
        except InputError:
            config = {}
        self._internal_dict = FrozenDict({"steps_offset": 1, "clip_sample": False, **config})
        self.set_timesteps(scheduler.plan().nfe if scheduler.spacing in ("timesteps", "sigmas") else 50)

    def to_json_string(self) -> str:
        return json.dumps(self.scheduler.to_config(), indent=2, sort_keys=True) + "\n"

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None,
        timesteps: list[float] | None = None, sigmas: list[float] | None = None,
    ) -> None:  # fmt: skip
        """Make the plan of so many steps, or through the given timesteps or sigmas (the last 0 goes without)."""
        following = self.scheduler
        if timesteps is not None:
            following = following.with_options(timesteps=tuple(float(t) for t in timesteps))
        elif sigmas is not None:
            following = following.with_options(sigmas=tuple(float(s) for s in sigmas if s > 0))
        self._following, self._device = following, device
        self._follow(following.plan(None if timesteps or sigmas else num_inference_steps))
        self.num_inference_steps = num_inference_steps or len(following.timesteps or following.sigmas or ())

    def _follow(self, plan: Plan) -> None:
        self.plan, self._index, self._history = plan, 0, None
        told = torch.from_numpy(plan.timesteps)
        whole = bool((told == told.round()).all())
        self.timesteps = (told.round().long() if whole else told.float()).to(self._device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin after so many timesteps, from a noised picture."""
        if begin_index:
            n = self.num_inference_steps
            self._follow(self._following.plan(n, strength=(n - begin_index // self.order + 0.5) / n))

    @property
    def init_noise_sigma(self) -> float:
        return self.plan.start[1] if self.plan.start[0] == 0 else 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        scaled: torch.Tensor = sample * float(self.plan["c_in"][min(self._index, self.plan.nfe - 1)])
        return scaled

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return alpha * original_samples + sigma * noise at the plan's level that is told as timesteps[0]."""
        at = int(abs(self.plan.timesteps - float(timesteps.flatten()[0])).argmin())
        mixed: torch.Tensor = float(self.plan.alphas[at]) * original_samples + float(self.plan.sigmas[at]) * noise
        return mixed

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None, return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:  # fmt: skip
        """Take the plan's next step. Raises ValueError for another timestep than the plan's next one."""
        line = self.plan.table[self._index] if self._index < self.plan.nfe else None
        if line is None or abs(float(timestep) - line[0]) > 1e-2:
            raise ValueError(f"timestep {float(timestep)} is not the next of the plan; call set_timesteps first")
        x = sample.float()
        if self._history is None:
            self._history = x.new_zeros(HISTORY, *x.shape)
        rows = torch.from_numpy(line).to(x.device, torch.float32).view(-1, *[1] * x.ndim)
        noise: torch.Tensor | float = 0.0
        if self.plan.draws[self._index]:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x, left = step(x, model_output.float(), rows, self._history, noise, self.plan.threshold)
        self._history = torch.cat([left[None], self._history[:-1]])
        self._index += 1
        after = x.to(model_output.dtype)
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def __len__(self) -> int:
        return self.scheduler.num_train_timesteps
