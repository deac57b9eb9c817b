"""Schedulers on four axes: noise, spacing, prediction, solver. Needs numpy; torch only where tensors come in."""

from genkit.schedulers.noise import NOISES
from genkit.schedulers.plan import COLUMNS, Plan, sample, step
from genkit.schedulers.prediction import PREDICTIONS
from genkit.schedulers.scheduler import Scheduler
from genkit.schedulers.solvers import HISTORY, SOLVERS
from genkit.schedulers.spacing import SPACINGS

__all__ = [
    "COLUMNS", "HISTORY", "NOISES", "PREDICTIONS", "SOLVERS", "SPACINGS", "Plan", "Scheduler", "sample", "step",
]  # fmt: skip
