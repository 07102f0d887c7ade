"""The compiled operators as differentiable functions."""

import torch

from . import reference
from ._ops import add_op_namespace_prefix, ops


SUPPORTED_TYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIM_STEP = 8  # what the compiled code takes head sizes in

Shapes = list[tuple[int, int]]


def devices_with_kernel() -> list[str]:
    """Device types that this build has compiled code for; "meta" has the shapes of the results."""
    name = add_op_namespace_prefix("ms_deform_attn_forward")
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return ["meta", *(kind for kind, key in keys.items() if torch._C._dispatch_has_kernel_for_dispatch_key(name, key))]


DEVICES = devices_with_kernel()


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: Shapes,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """
    Sample values at given locations of several maps and add them up with given weights.

    Sampling is bilinear, as `grid_sample(align_corners=False, padding_mode="zeros")`. Locations, weights and sums are
    float32 whatever the value's type.

    Args:
        value: (batch, tokens, heads, head_dim), map after map, float32, float16 or bfloat16. It may be a view of
            something larger, as long as channels are adjacent. Other types, and a head_dim that is no multiple of 8,
            take the path in PyTorch.
        spatial_shapes: (height, width) of each map.
        sampling_locations: (batch, queries, heads, levels, points, 2), (x, y) with 0 and 1 at the map's edges. What
            lies outside adds nothing; so does what is not a number.
        attention_weights: (batch, queries, heads, levels, points).

    Returns:
        (batch, queries, heads * head_dim), in the type of `value`.

    Raises:
        RuntimeError: shapes, types or devices do not fit together.
    """
    if not has_kernel(value, sampling_locations, attention_weights):
        return reference.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)
    return ops.ms_deform_attn_forward(value, flat(spatial_shapes), sampling_locations.float(), attention_weights)


def fused_ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: Shapes,
    reference_points: torch.Tensor,
    sampling_offsets: torch.Tensor,
    attention_logits: torch.Tensor,
) -> torch.Tensor:
    """
    [`ms_deform_attn`] with softmax and locations in the same pass.

    Args:
        value: (batch, tokens, heads, head_dim), as in [`ms_deform_attn`].
        spatial_shapes: (height, width) of each map.
        reference_points: (1 or batch, queries, 1 or levels, 2 or 4) float32, points (x, y) or boxes (x and y of the
            centre, width, height), with 0 and 1 at the map's edges. Queries and tokens may differ in number.
        sampling_offsets: (batch, queries, heads, levels, points, 2), (x, y). From a point, they are in pixels of their
            level. From a box, `points` of them make half its size: location = centre + offset / points * size / 2.
        attention_logits: (batch, queries, heads, levels * points); the softmax is over the last axis, in float32.

    Returns:
        (batch, queries, heads * head_dim), in the type of `value`.

    Raises:
        RuntimeError: shapes, types or devices do not fit together.
    """
    if not has_kernel(value, sampling_offsets, attention_logits):
        return reference.fused_ms_deform_attn(
            value, spatial_shapes, reference_points, sampling_offsets, attention_logits
        )
    return ops.fused_ms_deform_attn_forward(
        value, flat(spatial_shapes), reference_points.float(), sampling_offsets, attention_logits
    )


def has_kernel(value: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the compiled code takes these tensors."""
    return (
        value.device.type in DEVICES
        and value.shape[-1] % HEAD_DIM_STEP == 0
        and all(tensor.dtype in SUPPORTED_TYPES for tensor in (value, *others))
    )


def flat(spatial_shapes: Shapes) -> list[int]:
    """[(h0, w0), (h1, w1)] -> [h0, w0, h1, w1], which an operator can take."""
    return [size for shape in spatial_shapes for size in shape]


def _forward_result(value: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    batch, _, heads, head_dim = value.shape
    return value.new_empty((batch, positions.shape[1], heads * head_dim))


def _gradients(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


@torch.library.register_fake(add_op_namespace_prefix("ms_deform_attn_forward"))
def _(value, spatial_shapes, sampling_locations, attention_weights):
    return _forward_result(value, sampling_locations)


@torch.library.register_fake(add_op_namespace_prefix("ms_deform_attn_backward"))
def _(grad_output, value, spatial_shapes, sampling_locations, attention_weights, deterministic):
    return _gradients(value, sampling_locations, attention_weights)


@torch.library.register_fake(add_op_namespace_prefix("fused_ms_deform_attn_forward"))
def _(value, spatial_shapes, reference_points, sampling_offsets, attention_logits):
    return _forward_result(value, sampling_offsets)


@torch.library.register_fake(add_op_namespace_prefix("fused_ms_deform_attn_backward"))
def _(grad_output, value, spatial_shapes, reference_points, sampling_offsets, attention_logits, deterministic):
    return _gradients(value, sampling_offsets, attention_logits)


def _save(ctx, inputs, output):
    value, ctx.spatial_shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _backward(ctx, grad_output):
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = ops.ms_deform_attn_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        sampling_locations,
        attention_weights,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grad_value, None, grad_locations, grad_weights


def _fused_gradients(ctx, grad_output, references, offsets):
    value, _, _, attention_logits = ctx.saved_tensors
    return ops.fused_ms_deform_attn_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        references,
        offsets,
        attention_logits,
        torch.are_deterministic_algorithms_enabled(),
    )


def _fused_backward(ctx, grad_output):
    _, references, offsets, _ = ctx.saved_tensors
    if not ctx.needs_input_grad[2]:
        grad_value, grad_offsets, grad_logits = _fused_gradients(ctx, grad_output, references, offsets)
        return grad_value, None, None, grad_offsets, grad_logits
    # The gradient of a location in pixels is that of an offset from a point. A box is taken for its centre with offsets
    # in pixels: from the offsets in units of a box without width or height, that gradient could not be had.
    centres, sizes = references[..., :2], references[..., 2:]
    if references.shape[-1] == 2:
        grad_value, grad_offsets, grad_logits = _fused_gradients(ctx, grad_output, references, offsets)
        grad_parts = [grad_offsets]
    else:
        levels, points = offsets.shape[3:5]
        steps = _in_pixels(sizes.expand(-1, -1, levels, -1), ctx.spatial_shapes)[:, :, None, :, None] / (2 * points)
        grad_value, grad_pixels, grad_logits = _fused_gradients(ctx, grad_output, centres, offsets * steps)
        grad_offsets = (grad_pixels * steps).to(offsets.dtype)
        grad_parts = [grad_pixels, grad_pixels * offsets.nan_to_num(0, 0, 0) / (2 * points)]
    grad_references = torch.cat(
        [_in_pixels(part.sum((2, 4), dtype=torch.float32), ctx.spatial_shapes) for part in grad_parts], dim=-1
    )
    return grad_value, None, grad_references.sum_to_size(references.shape), grad_offsets, grad_logits


def _in_pixels(numbers, spatial_shapes):
    """(batch, queries, levels, 2) times the (width, height) of each level."""
    levels = [
        torch.stack((level[..., 0] * width, level[..., 1] * height), dim=-1)
        for level, height, width in zip(numbers.unbind(2), spatial_shapes[::2], spatial_shapes[1::2], strict=True)
    ]
    return torch.stack(levels, dim=2)


def _refuse_twice(ctx, *gradients):
    raise NotImplementedError("Deformable attention has no second derivative.")


for _name, _derivative in (("ms_deform_attn", _backward), ("fused_ms_deform_attn", _fused_backward)):
    torch.library.register_autograd(add_op_namespace_prefix(f"{_name}_forward"), _derivative, setup_context=_save)
    torch.library.register_autograd(add_op_namespace_prefix(f"{_name}_backward"), _refuse_twice)
