"""Benchmarks: models side by side on the same input, in one run, as ratios."""
