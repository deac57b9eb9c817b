"""The `genkit` command: arguments in, one call, an exit code out. Nothing here imports torch."""

from genkit.cli import choose, evaluate, generate, models, replay, score, train  # noqa: F401  # they add commands
from genkit.cli.app import main, run

__all__ = ["main", "run"]
