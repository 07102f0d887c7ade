// The operators on CUDA tensors: checks, memory, and a launch on the current stream.

#include "../torch-ext/arguments.h"
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

ElementType element_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat  ? ElementType::kFloat32
         : tensor.scalar_type() == at::kHalf ? ElementType::kFloat16
                                             : ElementType::kBfloat16;
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

  // reference_points: undefined in the plain form. grad_output: null in the forward pass.
  Call(const at::Tensor& value_, at::IntArrayRef spatial_shapes, const at::Tensor& reference_points_,
       const at::Tensor& positions_, const at::Tensor& scores_, const at::Tensor* grad_output = nullptr) {
    const bool fused = reference_points_.defined();
    const Sizes sizes = fused ? check_fused_arguments(value_, spatial_shapes, reference_points_, positions_, scores_)
                              : check_arguments(value_, spatial_shapes, positions_, scores_);
    TORCH_CHECK(sizes.levels <= kMaxLevels, "the CUDA kernel takes ", kMaxLevels, " levels at most, not ",
                sizes.levels);
    TORCH_CHECK(sizes.queries <= kMaxCount && sizes.levels * sizes.points <= kMaxCount &&
                    sizes.heads * sizes.head_dim <= kMaxCount,
                "the CUDA kernel takes fewer than 2^30 queries, points and channels: positions have the shape ",
                positions_.sizes(), ", value ", value_.sizes());
    if (grad_output != nullptr) {
      check_grad_output(*grad_output, value_, sizes);
    }

    value = readable_value(value_);
    positions = contiguous_and_aligned(positions_);
    scores = contiguous_and_aligned(scores_);

    const int64_t vector = kVectorBytes / value.element_size();
    problem.batch = sizes.batch;
    problem.tokens = sizes.tokens;
    problem.queries = static_cast<int>(sizes.queries);
    problem.heads = static_cast<int>(sizes.heads);
    problem.head_dim = static_cast<int>(sizes.head_dim);
    problem.levels = static_cast<int>(sizes.levels);
    problem.points = static_cast<int>(sizes.points);
    problem.value_type = element_type(value);
    problem.value = value.const_data_ptr();
    problem.value_image_stride = value.stride(0) / vector;
    problem.value_token_stride = static_cast<int>(value.stride(1) / vector);
    problem.value_head_stride = value.stride(2) / vector;
    problem.position_type = element_type(positions);
    problem.positions = positions.const_data_ptr();
    problem.score_type = element_type(scores);
    problem.scores = scores.const_data_ptr();
    problem.form = Form::kPlain;
    if (fused) {
      problem.form = reference_points_.size(3) == 4 ? Form::kBoxes : Form::kPoints;
      reference_points = contiguous_and_aligned(reference_points_);
      problem.reference_points = reference_points.const_data_ptr<float>();
      problem.reference_images = static_cast<int>(reference_points.size(0));
      problem.reference_levels = static_cast<int>(reference_points.size(2));
    }

    int first_token = 0;
    for (int i = 0; i < problem.levels; ++i) {
      problem.level[i] = {static_cast<int>(spatial_shapes[2 * i]), static_cast<int>(spatial_shapes[2 * i + 1]),
                          first_token};
      first_token += problem.level[i].height * problem.level[i].width;
    }
    TORCH_CHECK(sizes.tokens * value.stride(1) / vector <= kMaxInt,
                "one image of value is too large for the CUDA kernel: ", value_.sizes());
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
  const bool fused = call.reference_points.defined();
  if (call.empty()) {
    return {at::zeros(call.value.sizes(), call.value.options()), at::zeros_like(call.positions),
            at::zeros_like(call.scores)};
  }
  const at::Tensor grad_output = contiguous_and_aligned(grad_output_);
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
    if (fused) {
      // 1, or not a number: the weights of a softmax are numbers only if its largest logit is finite.
      const at::Tensor largest = call.scores.amax(-1);
      weight_bound = (largest - largest).amax().to(at::kFloat) + 1;
    } else {
      weight_bound = call.scores.abs().amax().to(at::kFloat);
    }
    problem.grad_bound = grad_bound.const_data_ptr<float>();
    problem.weight_bound = weight_bound.const_data_ptr<float>();
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
  const Call call(value, spatial_shapes, at::Tensor(), sampling_locations, attention_weights, &grad_output);
  return run_backward(call, grad_output, deterministic);
}

at::Tensor fused_forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& reference_points,
                         const at::Tensor& sampling_offsets, const at::Tensor& attention_logits) {
  return run_forward(Call(value, spatial_shapes, reference_points, sampling_offsets, attention_logits));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                              at::IntArrayRef spatial_shapes,
                                                              const at::Tensor& reference_points,
                                                              const at::Tensor& sampling_offsets,
                                                              const at::Tensor& attention_logits, bool deterministic) {
  const Call call(value, spatial_shapes, reference_points, sampling_offsets, attention_logits, &grad_output);
  return run_backward(call, grad_output, deterministic);
}

}  // namespace ms_deform_attn::cuda
