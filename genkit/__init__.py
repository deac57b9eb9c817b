"""genkit: a diffusion generation toolbox. A prompt file in; scored, filtered, reproducible images out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from genkit.version import __version__ as __version__

if TYPE_CHECKING:
    from genkit.cluster.generate import generate
    from genkit.errors import HostError, InputError
    from genkit.rows.request import Request
    from genkit.rows.result import Result
    from genkit.sampling.generators import ImageToImage, TextToImage, Unconditional
    from genkit.schedulers import Scheduler
    from genkit.scoring.clip import ClipScorer
    from genkit.studies.interrogate import interrogate
    from genkit.studies.replay import replay
    from genkit.studies.search import search
    from genkit.suites.evaluate import evaluate
    from genkit.suites.leaderboard import leaderboard
    from genkit.vision.classifier import Classifier
    from genkit.vision.detector import Detector

# Where each public name lives: looked up on first use, so that `import genkit` costs nothing and `Request` no torch.
_HOMES = {
    "HostError": "genkit.errors",
    "InputError": "genkit.errors",
    "ImageToImage": "genkit.sampling.generators",
    "TextToImage": "genkit.sampling.generators",
    "Unconditional": "genkit.sampling.generators",
    "generate": "genkit.cluster.generate",
    "Request": "genkit.rows.request",
    "Result": "genkit.rows.result",
    "Scheduler": "genkit.schedulers",
    "ClipScorer": "genkit.scoring.clip",
    "interrogate": "genkit.studies.interrogate",
    "replay": "genkit.studies.replay",
    "Classifier": "genkit.vision.classifier",
    "Detector": "genkit.vision.detector",
    "search": "genkit.studies.search",
    "evaluate": "genkit.suites.evaluate",
    "leaderboard": "genkit.suites.leaderboard",
}
__all__ = [
    "Classifier",
    "ClipScorer",
    "Detector",
    "HostError",
    "ImageToImage",
    "InputError",
    "Request",
    "Result",
    "Scheduler",
    "TextToImage",
    "Unconditional",
    "evaluate",
    "generate",
    "interrogate",
    "leaderboard",
    "replay",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'genkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
