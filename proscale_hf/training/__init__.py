"""Training: recipes, optimisation, and what both training scripts share. Nothing here is part of a model's code."""
