"""The `genkit` command: arguments in, one call, an exit code out. Nothing here imports torch."""

# each adds its commands to the app
from genkit.cli import choose, evaluate, generate, models, replay, score, search, senses, serve, train  # noqa: F401
from genkit.cli.app import main, run

__all__ = ["main", "run"]
