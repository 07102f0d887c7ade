"""Matching and losses, on numbers and tensors."""
