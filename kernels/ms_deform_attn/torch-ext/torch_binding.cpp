#include <torch/library.h>

#include "registration.h"
#include "torch_binding.h"

TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  ops.def(
      "ms_deform_attn_forward(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor",
      tags);
  ops.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights, bool deterministic) -> (Tensor, Tensor, Tensor)",
      tags);
  ops.def(
      "fused_ms_deform_attn_forward(Tensor value, SymInt[] spatial_shapes, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits) -> Tensor",
      tags);
  ops.def(
      "fused_ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, bool deterministic) "
      "-> (Tensor, Tensor, Tensor)",
      tags);

  // A build for CUDA runs on the CPU as well.
  namespace cpu = ms_deform_attn::cpu;
  ops.impl("ms_deform_attn_forward", c10::kCPU, &cpu::forward);
  ops.impl("ms_deform_attn_backward", c10::kCPU, &cpu::backward);
  ops.impl("fused_ms_deform_attn_forward", c10::kCPU, &cpu::fused_forward);
  ops.impl("fused_ms_deform_attn_backward", c10::kCPU, &cpu::fused_backward);
#if defined(CUDA_KERNEL)
  namespace cuda = ms_deform_attn::cuda;
  ops.impl("ms_deform_attn_forward", c10::kCUDA, &cuda::forward);
  ops.impl("ms_deform_attn_backward", c10::kCUDA, &cuda::backward);
  ops.impl("fused_ms_deform_attn_forward", c10::kCUDA, &cuda::fused_forward);
  ops.impl("fused_ms_deform_attn_backward", c10::kCUDA, &cuda::fused_backward);
#endif
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
