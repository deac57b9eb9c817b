"""Evaluation suites: prompts with expressions that a correct picture satisfies; evaluating and comparing models."""
