#include "launch.cuh"

namespace ms_deform_attn::cuda {

cudaError_t launch_backward(const Problem& problem, bool deterministic, int multiprocessors, cudaStream_t stream) {
  return with_type_and_lanes(problem, [&](auto scalar, auto lanes) {
    using Scalar = decltype(scalar);
    constexpr int kLanes = decltype(lanes)::value;
    return with_form(problem, [&](auto form) {
      constexpr Form kForm = decltype(form)::value;
      const auto kernel =
          deterministic ? backward_kernel<Scalar, kLanes, kForm, int64_t> : backward_kernel<Scalar, kLanes, kForm, float>;
      return launch_tiled<kLanes>(kernel, problem, multiprocessors, stream);
    });
  });
}

bool needs_finish(const Problem& problem, bool deterministic) {
  return deterministic || problem.value_type != ElementType::kFloat32;
}

cudaError_t launch_finish(const Problem& problem, bool deterministic, void* grad_value, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 4096;
  return with_type(problem, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const int64_t vectors = problem.batch * problem.tokens * problem.heads * problem.head_dim / kVectorSize<Scalar>;
    const int64_t blocks = (vectors + kMaxThreads - 1) / kMaxThreads;
    const auto kernel = deterministic ? finish_kernel<Scalar, int64_t> : finish_kernel<Scalar, float>;
    return launch(kernel, dim3(static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks)), kMaxThreads, stream,
                  problem, static_cast<Scalar*>(grad_value));
  });
}

}  // namespace ms_deform_attn::cuda
