"""Suites of prompts with what a right picture shows: evaluate a model on one, and compare models."""
