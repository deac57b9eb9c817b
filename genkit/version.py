"""The version of genkit: pyproject.toml reads it from here."""

__version__ = "0.1.0"
