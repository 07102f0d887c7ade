"""Measures of segmentation quality."""
