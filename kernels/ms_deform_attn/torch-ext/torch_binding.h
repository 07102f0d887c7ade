// The operators' C++ functions, one set per device. `docs` of every argument: torch-ext/ms_deform_attn/__init__.py.
//
// Every function checks its arguments with TORCH_CHECK before it reads any of them.

#pragma once

#include <tuple>

#include <ATen/ATen.h>

namespace ms_deform_attn::cpu {

at::Tensor forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
                   const at::Tensor& attention_weights);

// -> gradients for value, sampling_locations, attention_weights
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef spatial_shapes,
                                                        const at::Tensor& sampling_locations,
                                                        const at::Tensor& attention_weights, bool deterministic);

at::Tensor fused_forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& reference_points,
                         const at::Tensor& sampling_offsets, const at::Tensor& attention_logits);

// -> gradients for value, sampling_offsets, attention_logits
std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                              at::IntArrayRef spatial_shapes,
                                                              const at::Tensor& reference_points,
                                                              const at::Tensor& sampling_offsets,
                                                              const at::Tensor& attention_logits, bool deterministic);

}  // namespace ms_deform_attn::cpu

namespace ms_deform_attn::cuda {

at::Tensor forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
                   const at::Tensor& attention_weights);

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef spatial_shapes,
                                                        const at::Tensor& sampling_locations,
                                                        const at::Tensor& attention_weights, bool deterministic);

at::Tensor fused_forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& reference_points,
                         const at::Tensor& sampling_offsets, const at::Tensor& attention_logits);

std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                              at::IntArrayRef spatial_shapes,
                                                              const at::Tensor& reference_points,
                                                              const at::Tensor& sampling_offsets,
                                                              const at::Tensor& attention_logits, bool deterministic);

}  // namespace ms_deform_attn::cuda
