"""What `genkit generate` does: check and plan, load, draw, decide, write the gallery."""
