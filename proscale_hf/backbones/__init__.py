"""What is changed in the backbones of transformers and timm: faster layers, and windows for any image size."""
