// The operators on the CPU: checks, choice of instruction set, and division of the work among threads.

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include "../torch-ext/arguments.h"
#include "../torch-ext/torch_binding.h"
#include "problem.h"

namespace ms_deform_attn::cpu {
namespace {

constexpr int64_t kSamplesPerTask = 4096;  // fewer are not worth another thread

// The best that torch itself would use; ATEN_CPU_CAPABILITY=default or avx2 asks for less.
const Kernels& kernels() {
  static const Kernels& best = []() -> const Kernels& {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kAvx512;
    if (capability == "AVX2") return kAvx2;
#endif
    return kBaseline;
  }();
  return best;
}

Type type_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat  ? Type::kFloat32
         : tensor.scalar_type() == at::kHalf ? Type::kFloat16
                                             : Type::kBfloat16;
}

// Keeps what a problem points to.
class Call {
 public:
  Call(const Sizes& sizes, at::IntArrayRef spatial_shapes, const at::Tensor& value, const at::Tensor& positions,
       const at::Tensor& scores, const at::Tensor* reference_points)
      : value_(value.stride(3) == 1 ? value : value.contiguous()),
        positions_(positions.contiguous()),
        scores_(scores.contiguous()) {
    problem_.images = sizes.batch;
    problem_.tokens = sizes.tokens;
    problem_.queries = sizes.queries;
    problem_.heads = sizes.heads;
    problem_.head_dim = sizes.head_dim;
    problem_.samples = sizes.levels * sizes.points;
    problem_.padded_samples = (problem_.samples + kMostLanes - 1) / kMostLanes * kMostLanes;
    fill_table(sizes, spatial_shapes);

    problem_.value_type = type_of(value_);
    problem_.value = value_.const_data_ptr();
    problem_.value_image_stride = value_.stride(0);
    problem_.value_token_stride = value_.stride(1);
    problem_.value_head_stride = value_.stride(2);
    problem_.position_type = type_of(positions_);
    problem_.positions = positions_.const_data_ptr();
    problem_.score_type = type_of(scores_);
    problem_.scores = scores_.const_data_ptr();
    if (reference_points != nullptr) {
      reference_points_ = reference_points->contiguous();
      problem_.fused = true;
      problem_.reference_points = reference_points_.const_data_ptr<float>();
      problem_.reference_levels = reference_points_.size(2);
      problem_.reference_numbers = reference_points_.size(3);
      problem_.box_step = 0.5f / float(sizes.points);
      problem_.reference_image_stride = reference_points_.size(0) == 1 ? 0 : reference_points_.stride(0);
    }
  }

  at::Tensor forward() {
    at::Tensor output =
        at::empty({problem_.images, problem_.queries, problem_.heads * problem_.head_dim}, value_.options());
    problem_.output = output.data_ptr();
    const int64_t grain = std::max<int64_t>(1, kSamplesPerTask / std::max<int64_t>(1, problem_.heads * problem_.samples));
    at::parallel_for(0, problem_.images * problem_.queries, grain, [&](int64_t first_query, int64_t last_query) {
      std::vector<float> memory(memory_floats(problem_));
      kernels().forward(problem_, first_query, last_query, memory.data());
    });
    return output;
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output) {
    const at::Tensor grad = grad_output.contiguous();
    at::Tensor grad_value = at::empty(value_.sizes(), value_.options());
    at::Tensor grad_positions = at::empty(positions_.sizes(), positions_.options());
    at::Tensor grad_scores = at::empty(scores_.sizes(), scores_.options());
    problem_.grad_output = grad.const_data_ptr();
    problem_.grad_value = grad_value.data_ptr();
    problem_.grad_positions = grad_positions.data_ptr();
    problem_.grad_scores = grad_scores.data_ptr();

    // A slice is one head of one image. No two threads add to the same numbers, so the result is the same each time:
    // a thread has a slice for itself, or where there are too few for the threads, each part of its queries has a
    // buffer of its own.
    const int64_t slices = problem_.images * problem_.heads;
    if (slices == 0) return {grad_value, grad_positions, grad_scores};
    const int64_t parts = parts_per_slice(slices);
    const int64_t numbers = problem_.tokens * problem_.head_dim;
    at::Tensor shared = parts > 1 ? at::empty({slices * parts, numbers}, value_.options().dtype(at::kFloat)) : at::Tensor();
    at::parallel_for(0, slices * parts, 1, [&](int64_t first, int64_t last) {
      std::vector<float> memory(memory_floats(problem_));
      std::vector<float> value(numbers), own(parts > 1 ? 0 : numbers);
      for (int64_t task = first; task < last; task++) {
        const int64_t slice = task / parts, part = task % parts;
        const int64_t image = slice / problem_.heads, head = slice % problem_.heads;
        float* buffer = parts > 1 ? shared.data_ptr<float>() + task * numbers : own.data();
        std::fill_n(buffer, numbers, 0.0f);
        if (task == first || part == 0) kernels().load_value(problem_, image, head, value.data());
        kernels().backward(problem_, image, head, problem_.queries * part / parts, problem_.queries * (part + 1) / parts,
                           value.data(), buffer, memory.data());
        if (parts == 1) kernels().store_grad_value(problem_, image, head, &buffer, 1, 0, problem_.tokens);
      }
    });
    if (parts > 1) {
      at::parallel_for(0, problem_.tokens, 512, [&](int64_t first_token, int64_t last_token) {
        std::vector<const float*> buffers(parts);
        for (int64_t slice = 0; slice < slices; slice++) {
          for (int64_t part = 0; part < parts; part++) {
            buffers[part] = shared.const_data_ptr<float>() + (slice * parts + part) * numbers;
          }
          kernels().store_grad_value(problem_, slice / problem_.heads, slice % problem_.heads, buffers.data(), parts,
                                     first_token, last_token);
        }
      });
    }
    return {grad_value, grad_positions, grad_scores};
  }

 private:
  void fill_table(const Sizes& sizes, at::IntArrayRef spatial_shapes) {
    const int64_t count = problem_.padded_samples;
    // Entries beyond the last sample make a map of one token.
    integers_.assign(5 * count, 0);
    floats_.assign(2 * count, 1.0f);
    int32_t* integer_rows[5];
    float* float_rows[2];
    for (int i = 0; i < 5; i++) integer_rows[i] = integers_.data() + i * count;
    for (int i = 0; i < 2; i++) float_rows[i] = floats_.data() + i * count;
    int64_t first_token = 0;
    for (int64_t level = 0; level < sizes.levels; level++) {
      const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
      for (int64_t point = 0; point < sizes.points; point++) {
        const int64_t sample = level * sizes.points + point;
        integer_rows[0][sample] = int32_t(level);
        integer_rows[1][sample] = int32_t(first_token);
        integer_rows[2][sample] = int32_t(width);
        integer_rows[3][sample] = int32_t(width - 1);
        integer_rows[4][sample] = int32_t(height - 1);
        float_rows[0][sample] = float(width);
        float_rows[1][sample] = float(height);
      }
      first_token += height * width;
    }
    problem_.table = {integer_rows[0], integer_rows[1], integer_rows[2], integer_rows[3],
                      integer_rows[4], float_rows[0],   float_rows[1]};
  }

  int64_t parts_per_slice(int64_t slices) const {
    const int64_t threads = at::get_num_threads();
    if (slices % threads == 0) return 1;
    // Several tasks a thread balance well, while filling and adding up buffers must cost less than what goes into them.
    const int64_t wanted = (4 * threads + slices - 1) / slices;
    const int64_t worthwhile = problem_.queries * problem_.samples / (4 * std::max<int64_t>(1, problem_.tokens));
    return std::max<int64_t>(1, std::min(wanted, worthwhile));
  }

  Problem problem_ = {};
  at::Tensor value_, positions_, scores_, reference_points_;
  std::vector<int32_t> integers_;
  std::vector<float> floats_;
};

}  // namespace

at::Tensor forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
                   const at::Tensor& attention_weights) {
  const Sizes sizes = check_arguments(value, spatial_shapes, sampling_locations, attention_weights);
  return Call(sizes, spatial_shapes, value, sampling_locations, attention_weights, nullptr).forward();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                        at::IntArrayRef spatial_shapes,
                                                        const at::Tensor& sampling_locations,
                                                        const at::Tensor& attention_weights, bool) {
  const Sizes sizes = check_arguments(value, spatial_shapes, sampling_locations, attention_weights);
  check_grad_output(grad_output, value, sizes);
  return Call(sizes, spatial_shapes, value, sampling_locations, attention_weights, nullptr).backward(grad_output);
}

at::Tensor fused_forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& reference_points,
                         const at::Tensor& sampling_offsets, const at::Tensor& attention_logits) {
  const Sizes sizes =
      check_fused_arguments(value, spatial_shapes, reference_points, sampling_offsets, attention_logits);
  return Call(sizes, spatial_shapes, value, sampling_offsets, attention_logits, &reference_points).forward();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fused_backward(const at::Tensor& grad_output, const at::Tensor& value,
                                                              at::IntArrayRef spatial_shapes,
                                                              const at::Tensor& reference_points,
                                                              const at::Tensor& sampling_offsets,
                                                              const at::Tensor& attention_logits, bool) {
  const Sizes sizes =
      check_fused_arguments(value, spatial_shapes, reference_points, sampling_offsets, attention_logits);
  check_grad_output(grad_output, value, sizes);
  return Call(sizes, spatial_shapes, value, sampling_offsets, attention_logits, &reference_points)
      .backward(grad_output);
}

}  // namespace ms_deform_attn::cpu
