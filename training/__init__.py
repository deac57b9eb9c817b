"""Training of diffusion models. Empty so far: the training loop is the next part of the house."""
