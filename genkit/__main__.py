"""`python -m genkit` is the `genkit` command."""

from genkit.cli import main

main()
