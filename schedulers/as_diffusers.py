"""Plans behind the interface of diffusers' schedulers, for diffusers' own pipelines. Needs diffusers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from genkit.errors import InputError
from genkit.schedulers.diffusers_config import write_config
from genkit.schedulers.options import Options
from genkit.schedulers.plan import HISTORY, Plan, step
from genkit.schedulers.planning import make_plan


class PlanScheduler(SchedulerMixin, ConfigMixin):
    """Follows the plans of a genkit Scheduler, whose options (eta, clip, …) pipelines cannot change.

    Samples are in (alpha, sigma) scale. Saving writes the config of the equivalent diffusers class; raises InputError
    where there is none.
    """

    config_name: Any = "scheduler_config.json"
    num_inference_steps: int
    _history: torch.Tensor | None

    def __init__(self, options: Options) -> None:
        self._options, self.order = options, 1 + (make_plan(options, 3, 1.0, None).nfe > 4)
        try:
            config = write_config(options)
        except InputError:
            config = {}
        self._internal_dict = FrozenDict({"steps_offset": 1, "clip_sample": False, **config})
        self.set_timesteps(len(options.timesteps or options.sigmas or ()) or 50)

    def to_json_string(self) -> str:
        return json.dumps(write_config(self._options), indent=2, sort_keys=True) + "\n"

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None,
        timesteps: list[float] | None = None, sigmas: list[float] | None = None,
    ) -> None:  # fmt: skip
        """Make the plan of `num_inference_steps` steps, or of the given timesteps or sigmas (less a last 0)."""
        options = self._options
        if timesteps is not None:
            given = tuple(float(t) for t in timesteps)
            options = dataclasses.replace(options, spacing="timesteps", timesteps=given, sigmas=None)
        elif sigmas is not None:
            given = tuple(float(s) for s in sigmas if s > 0)
            options = dataclasses.replace(options, spacing="sigmas", sigmas=given, timesteps=None)
        self._current, self._device = options, device
        self._follow(make_plan(options, None if timesteps or sigmas else num_inference_steps, 1.0, None))
        self.num_inference_steps = num_inference_steps or len(options.timesteps or options.sigmas or ())

    def _follow(self, plan: Plan) -> None:
        self.plan, self._index, self._history = plan, 0, None
        t = torch.from_numpy(plan.timesteps)
        whole = bool((t == t.round()).all())
        self.timesteps = (t.round().long() if whole else t.float()).to(self._device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at timesteps[begin_index], from a noised image."""
        if begin_index:
            n = self.num_inference_steps
            self._follow(make_plan(self._current, n, (n - begin_index // self.order + 0.5) / n, None))

    @property
    def init_noise_sigma(self) -> float:
        return self.plan.start[1] if self.plan.start[0] == 0 else 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        scaled: torch.Tensor = sample * float(self.plan["c_in"][min(self._index, self.plan.nfe - 1)])
        return scaled

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return alpha * original_samples + sigma * noise at the plan's level with the timestep timesteps[0]."""
        at = int(abs(self.plan.timesteps - float(timesteps.flatten()[0])).argmin())
        mixed: torch.Tensor = float(self.plan.alphas[at]) * original_samples + float(self.plan.sigmas[at]) * noise
        return mixed

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None, return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:  # fmt: skip
        """Take the plan's next step. Raises ValueError for a timestep that is not the plan's next one."""
        line = self.plan.table[self._index] if self._index < self.plan.nfe else None
        if line is None or abs(float(timestep) - line[0]) > 1e-2:
            raise ValueError(f"timestep {float(timestep)} is not the next of the plan; call set_timesteps first")
        x = sample.float()
        if self._history is None:
            self._history = x.new_zeros(HISTORY, *x.shape)
        rows = torch.from_numpy(line).to(x.device, torch.float32).view(-1, *[1] * x.ndim)
        noise: torch.Tensor | float = 0.0
        if self.plan.consumes_noise[self._index]:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x, new = step(x, model_output.float(), rows, self._history, noise, self.plan.threshold)
        self._history = torch.cat([new[None], self._history[:-1]])
        self._index += 1
        x = x.to(model_output.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def __len__(self) -> int:
        return self._options.num_train_timesteps
