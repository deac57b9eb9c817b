"""The `genkit` command: arguments in, one call, an exit code out. Nothing here imports torch."""

from genkit.cli import choose, generate, models, replay, score, senses, train  # noqa: F401  # each adds its commands to the app
from genkit.cli.app import main, run

__all__ = ["main", "run"]
