"""Multi-scale deformable attention (https://arxiv.org/abs/2010.04159) in one pass, on the CPU and on CUDA.

Two forms, both with gradients: `ms_deform_attn` takes sampling locations and attention weights, and
`fused_ms_deform_attn` what a model's projections give: offsets from points or boxes, and logits. The layers for
`kernels.kernelize` are in `layers`, the same in plain PyTorch in `reference`.
"""

from . import layers, reference
from .operators import fused_ms_deform_attn, ms_deform_attn


__all__ = ["fused_ms_deform_attn", "layers", "ms_deform_attn", "reference"]
