"""`genkit serve`: the slot engine behind HTTP interfaces that people already call, and a page."""
