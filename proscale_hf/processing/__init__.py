"""Pixels, sizes, labels and results: pure functions, without a model."""
