"""Backbones of transformers and timm, loaded and made faster."""
