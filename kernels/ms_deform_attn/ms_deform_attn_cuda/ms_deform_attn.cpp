// The operators on CUDA tensors: checks, memory, and a launch on the current stream.

#include "../torch-ext/torch_binding.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <limits>

#include "launch.h"

namespace ms_deform_attn::cuda {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr int64_t kVectorBytes = 16;

ElementType element_type(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ElementType::kFloat32;
    case at::kHalf:
      return ElementType::kFloat16;
    case at::kBFloat16:
      return ElementType::kBfloat16;
    default:
      TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, not ", tensor.scalar_type());
  }
}

bool aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0;
}

at::Tensor contiguous_and_aligned(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  return aligned(contiguous) ? contiguous : contiguous.clone();
}

// The value as the kernels can read it: itself where its channels are adjacent and its strides whole vectors.
at::Tensor readable_value(const at::Tensor& value) {
  const int64_t vector = kVectorBytes / value.element_size();
  bool readable = value.stride(3) == 1 && aligned(value) && value.size(1) * value.stride(1) / vector <= kMaxInt;
  for (int64_t dim = 0; dim < 3; ++dim) {
    readable = readable && value.stride(dim) % vector == 0;
  }
  return readable ? value : contiguous_and_aligned(value);
}

// Arguments of one call, checked, and the tensors that its problem points into.
struct Call {
  Problem problem = {};
  at::Tensor value, reference_points, positions, scores;

  // reference_points: undefined in the plain form.
  Call(const at::Tensor& value_, at::IntArrayRef spatial_shapes, const at::Tensor& reference_points_,
       const at::Tensor& positions_, const at::Tensor& scores_) {
    const bool fused = reference_points_.defined();
    TORCH_CHECK(value_.is_cuda(), "value must be a CUDA tensor, it is on ", value_.device());
    for (const at::Tensor* tensor : {&reference_points_, &positions_, &scores_}) {
      TORCH_CHECK(!tensor->defined() || tensor->device() == value_.device(), "all tensors must be on ", value_.device(),
                  ", one is on ", tensor->device());
    }
    TORCH_CHECK(value_.dim() == 4, "value must be (batch, tokens, heads, head_dim), not ", value_.sizes());
    TORCH_CHECK(value_.size(3) % 8 == 0 && value_.size(3) > 0, "head_dim must be a multiple of 8, not ", value_.size(3));
    const int64_t levels = static_cast<int64_t>(spatial_shapes.size()) / 2;
    TORCH_CHECK(spatial_shapes.size() % 2 == 0 && levels >= 1 && levels <= kMaxLevels,
                "spatial_shapes must hold height and width of 1 to ", kMaxLevels, " levels, not ", spatial_shapes);
    TORCH_CHECK(positions_.dim() == 6 && positions_.size(5) == 2 && positions_.size(0) == value_.size(0) &&
                    positions_.size(2) == value_.size(2) && positions_.size(3) == levels,
                fused ? "sampling_offsets" : "sampling_locations",
                " must be (batch, queries, heads, levels, points, 2) = (", value_.size(0), ", queries, ", value_.size(2),
                ", ", levels, ", points, 2), not ", positions_.sizes());
    const at::IntArrayRef sizes = positions_.sizes();
    if (fused) {
      TORCH_CHECK(scores_.sizes() == at::IntArrayRef({sizes[0], sizes[1], sizes[2], sizes[3] * sizes[4]}),
                  "attention_logits must be (batch, queries, heads, levels * points), not ", scores_.sizes());
      TORCH_CHECK(reference_points_.dim() == 4 && (reference_points_.size(0) == 1 || reference_points_.size(0) == sizes[0]) &&
                      reference_points_.size(1) == sizes[1] &&
                      (reference_points_.size(2) == 1 || reference_points_.size(2) == levels) &&
                      reference_points_.size(3) == 2,
                  "reference_points must be (1 or batch, queries, 1 or levels, 2), not ", reference_points_.sizes());
    } else {
      TORCH_CHECK(scores_.sizes() == sizes.slice(0, 5),
                  "attention_weights must be (batch, queries, heads, levels, points), not ", scores_.sizes());
    }
    TORCH_CHECK(sizes[1] <= kMaxInt && value_.size(2) * value_.size(3) <= kMaxInt && sizes[3] * sizes[4] <= kMaxInt,
                "too many queries, channels or points");

    value = readable_value(value_);
    // Locations want float32 in any case: bfloat16 could not tell neighbouring pixels apart.
    positions = contiguous_and_aligned(fused ? positions_ : positions_.to(at::kFloat));
    scores = contiguous_and_aligned(scores_);

    const int64_t vector = kVectorBytes / value.element_size();
    problem.batch = value.size(0);
    problem.tokens = value.size(1);
    problem.queries = static_cast<int>(sizes[1]);
    problem.heads = static_cast<int>(value.size(2));
    problem.head_dim = static_cast<int>(value.size(3));
    problem.levels = static_cast<int>(levels);
    problem.points = static_cast<int>(sizes[4]);
    problem.value_type = element_type(value, "value");
    problem.value = value.const_data_ptr();
    problem.value_image_stride = value.stride(0) / vector;
    problem.value_token_stride = static_cast<int>(value.stride(1) / vector);
    problem.value_head_stride = value.stride(2) / vector;
    problem.position_type = element_type(positions, "sampling_offsets");
    problem.positions = positions.const_data_ptr();
    problem.score_type = element_type(scores, fused ? "attention_logits" : "attention_weights");
    problem.scores = scores.const_data_ptr();
    if (fused) {
      reference_points = contiguous_and_aligned(reference_points_.to(at::kFloat));
      problem.reference_points = reference_points.const_data_ptr<float>();
      problem.reference_images = static_cast<int>(reference_points.size(0));
      problem.reference_levels = static_cast<int>(reference_points.size(2));
    }

    int64_t tokens = 0;
    for (int64_t i = 0; i < levels; ++i) {
      const int64_t height = spatial_shapes[2 * i], width = spatial_shapes[2 * i + 1];
      TORCH_CHECK(height >= 0 && width >= 0 && height <= kMaxInt && width <= kMaxInt, "level ", i, " is ", height, " x ", width);
      problem.level[i] = {static_cast<int>(height), static_cast<int>(width), static_cast<int>(tokens)};
      tokens += height * width;
      TORCH_CHECK(tokens <= value.size(1), "spatial_shapes ", spatial_shapes, " need more than the ", value.size(1),
                  " tokens of value");
    }
    TORCH_CHECK(tokens == value.size(1), "spatial_shapes ", spatial_shapes, " make ", tokens, " tokens, value has ",
                value.size(1));
    TORCH_CHECK(tokens * problem.value_token_stride <= kMaxInt, "value is too large: ", value_.sizes());
  }

  // Nothing to sample, or nobody to sample for.
  bool empty() const { return positions.numel() == 0 || value.numel() == 0; }
};

int multiprocessors(const at::Tensor& tensor) {
  int count;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device()));
  return count;
}

at::Tensor run_forward(const Call& call) {
  const c10::cuda::CUDAGuard guard(call.value.device());
  const std::array<int64_t, 3> sizes = {call.problem.batch, call.problem.queries,
                                        static_cast<int64_t>(call.problem.heads) * call.problem.head_dim};
  if (call.empty()) {
    return at::zeros(sizes, call.value.options());
  }
  at::Tensor output = at::empty(sizes, call.value.options());
  Problem problem = call.problem;
  problem.output = output.mutable_data_ptr();
  C10_CUDA_CHECK(launch_forward(problem, multiprocessors(call.value), c10::cuda::getCurrentCUDAStream()));
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_backward(const Call& call, const at::Tensor& grad_output_,
                                                            bool deterministic) {
  const c10::cuda::CUDAGuard guard(call.value.device());
  const int64_t channels = static_cast<int64_t>(call.problem.heads) * call.problem.head_dim;
  TORCH_CHECK(grad_output_.device() == call.value.device() &&
                  grad_output_.sizes() == at::IntArrayRef({call.problem.batch, call.problem.queries, channels}),
              "grad_output must be (batch, queries, heads * head_dim) on ", call.value.device(), ", not ",
              grad_output_.sizes(), " on ", grad_output_.device());
  const bool fused = call.reference_points.defined();
  if (call.empty()) {
    return {at::zeros(call.value.sizes(), call.value.options()), at::zeros_like(call.positions),
            at::zeros_like(call.scores)};
  }
  const at::Tensor grad_output = contiguous_and_aligned(grad_output_.to(call.value.scalar_type()));
  at::Tensor sums = at::zeros(call.value.sizes(), call.value.options().dtype(deterministic ? at::kLong : at::kFloat));
  at::Tensor grad_positions = at::empty_like(call.positions);
  at::Tensor grad_scores = at::empty_like(call.scores);
  at::Tensor grad_weights = fused && grad_scores.scalar_type() != at::kFloat
                                ? at::empty(grad_scores.sizes(), grad_scores.options().dtype(at::kFloat))
                                : grad_scores;
  at::Tensor grad_bound, weight_bound;

  Problem problem = call.problem;
  problem.grad_output = grad_output.const_data_ptr();
  problem.grad_sums = sums.mutable_data_ptr();
  problem.grad_positions = grad_positions.mutable_data_ptr();
  problem.grad_scores = grad_scores.mutable_data_ptr();
  problem.grad_weights = fused ? grad_weights.mutable_data_ptr<float>() : nullptr;
  if (deterministic) {
    grad_bound = grad_output.abs().amax().to(at::kFloat);
    problem.grad_bound = grad_bound.const_data_ptr<float>();
    if (!fused) {
      weight_bound = call.scores.abs().amax().to(at::kFloat);
      problem.weight_bound = weight_bound.const_data_ptr<float>();
    }
  }
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(launch_backward(problem, deterministic, multiprocessors(call.value), stream));

  at::Tensor grad_value = sums;
  if (needs_finish(problem, deterministic)) {
    grad_value = at::empty(call.value.sizes(), call.value.options());
    C10_CUDA_CHECK(launch_finish(problem, deterministic, grad_value.mutable_data_ptr(), stream));
  }
  return {grad_value, grad_positions, grad_scores};
}

}  // namespace

at::Tensor forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
                   const at::Tensor& attention_weights) {
  return run_forward(Call(value, spatial_shapes, at::Tensor(), sampling_locations, attention_weights));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef spatial_shapes,
                                                        const at::Tensor& sampling_locations,
                                                        const at::Tensor& attention_weights, bool deterministic) {
  const Call call(value, spatial_shapes, at::Tensor(), sampling_locations, attention_weights);
  auto [grad_value, grad_locations, grad_weights] = run_backward(call, grad_output, deterministic);
  return {grad_value, grad_locations.to(sampling_locations.scalar_type()), grad_weights};
}

at::Tensor fused_forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& reference_points,
                         const at::Tensor& sampling_offsets, const at::Tensor& attention_logits) {
  TORCH_CHECK(reference_points.defined(), "reference_points are missing");
  return run_forward(Call(value, spatial_shapes, reference_points, sampling_offsets, attention_logits));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                              at::IntArrayRef spatial_shapes,
                                                              const at::Tensor& reference_points,
                                                              const at::Tensor& sampling_offsets,
                                                              const at::Tensor& attention_logits, bool deterministic) {
  TORCH_CHECK(reference_points.defined(), "reference_points are missing");
  const Call call(value, spatial_shapes, reference_points, sampling_offsets, attention_logits);
  return run_backward(call, grad_output, deterministic);
}

}  // namespace ms_deform_attn::cuda
