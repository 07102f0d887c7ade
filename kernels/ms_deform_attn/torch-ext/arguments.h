// What both devices ask of their arguments, in one line that names the argument.

#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include <ATen/ATen.h>

namespace ms_deform_attn {

struct Sizes {
  int64_t batch, tokens, heads, head_dim, queries, levels, points;
};

inline bool is_supported_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kHalf ||
         tensor.scalar_type() == at::kBFloat16;
}

inline void check_tensor(const at::Tensor& tensor, const char* name, const at::Tensor& value,
                         at::IntArrayRef expected) {
  TORCH_CHECK(tensor.device() == value.device(), name, " is on ", tensor.device(), ", value on ", value.device());
  TORCH_CHECK(is_supported_type(tensor), name, " must be float32, float16 or bfloat16, is ", tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == expected, name, " must have the shape ", expected, ", has ", tensor.sizes());
}

// `samples` is sampling_locations or sampling_offsets.
inline Sizes check_value(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& samples,
                         const char* samples_name) {
  TORCH_CHECK(value.dim() == 4, "value must be (batch, tokens, heads, head_dim), has the shape ", value.sizes());
  TORCH_CHECK(samples.dim() == 6 && samples.size(5) == 2, samples_name,
              " must be (batch, queries, heads, levels, points, 2), has the shape ", samples.sizes());
  const Sizes sizes = {value.size(0),   value.size(1),   value.size(2),  value.size(3),
                       samples.size(1), samples.size(3), samples.size(4)};
  TORCH_CHECK(is_supported_type(value), "value must be float32, float16 or bfloat16, is ", value.scalar_type());
  TORCH_CHECK(sizes.head_dim > 0 && sizes.head_dim % 8 == 0, "value's head_dim must be a multiple of 8, is ",
              sizes.head_dim);
  TORCH_CHECK(sizes.levels > 0 && sizes.points > 0, samples_name, " has no levels or no points: ", samples.sizes());
  TORCH_CHECK(int64_t(spatial_shapes.size()) == 2 * sizes.levels, "spatial_shapes must hold height and width of ",
              sizes.levels, " levels, holds ", spatial_shapes.size(), " numbers");
  int64_t tokens = 0;
  for (int64_t level = 0; level < sizes.levels; level++) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    // Coordinates are float32: exact up to 2^24.
    TORCH_CHECK(height > 0 && width > 0 && height <= (1 << 24) && width <= (1 << 24),
                "spatial_shapes must be between 1 and 2^24, are ", spatial_shapes);
    tokens += height * width;
    TORCH_CHECK(tokens <= std::numeric_limits<int32_t>::max(), "spatial_shapes make more than 2^31 tokens: ",
                spatial_shapes);
  }
  TORCH_CHECK(sizes.tokens == tokens, "value has ", sizes.tokens, " tokens, spatial_shapes make ", tokens);
  check_tensor(samples, samples_name, value,
               {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points, 2});
  return sizes;
}

inline Sizes check_arguments(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                             const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Sizes sizes = check_value(value, spatial_shapes, sampling_locations, "sampling_locations");
  TORCH_CHECK(sampling_locations.scalar_type() == at::kFloat, "sampling_locations must be float32, are ",
              sampling_locations.scalar_type());
  check_tensor(attention_weights, "attention_weights", value,
               {sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points});
  return sizes;
}

inline Sizes check_fused_arguments(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                                   const at::Tensor& reference_points, const at::Tensor& sampling_offsets,
                                   const at::Tensor& attention_logits) {
  const Sizes sizes = check_value(value, spatial_shapes, sampling_offsets, "sampling_offsets");
  check_tensor(attention_logits, "attention_logits", value,
               {sizes.batch, sizes.queries, sizes.heads, sizes.levels * sizes.points});
  TORCH_CHECK(reference_points.scalar_type() == at::kFloat, "reference_points must be float32, are ",
              reference_points.scalar_type());
  TORCH_CHECK(reference_points.dim() == 4 && (reference_points.size(0) == 1 || reference_points.size(0) == sizes.batch) &&
                  (reference_points.size(2) == 1 || reference_points.size(2) == sizes.levels) &&
                  (reference_points.size(3) == 2 || reference_points.size(3) == 4),
              "reference_points must be (1 or batch, queries, 1 or levels, 2 or 4), have the shape ",
              reference_points.sizes());
  check_tensor(reference_points, "reference_points", value,
               {reference_points.size(0), sizes.queries, reference_points.size(2), reference_points.size(3)});
  return sizes;
}

inline void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Sizes& sizes) {
  check_tensor(grad_output, "grad_output", value, {sizes.batch, sizes.queries, sizes.heads * sizes.head_dim});
  TORCH_CHECK(grad_output.scalar_type() == value.scalar_type(), "grad_output is ", grad_output.scalar_type(),
              ", value ", value.scalar_type());
}

}  // namespace ms_deform_attn
