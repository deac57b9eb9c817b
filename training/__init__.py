"""Training of diffusion models: recipes, tasks, the loop, exact resume, evaluation, and the data doctor."""
