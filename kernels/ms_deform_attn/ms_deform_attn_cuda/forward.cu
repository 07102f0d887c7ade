#include "launch.cuh"

namespace ms_deform_attn::cuda {

cudaError_t launch_forward(const Problem& problem, int multiprocessors, cudaStream_t stream) {
  return with_type_and_lanes(problem, [&](auto scalar, auto lanes) {
    using Scalar = decltype(scalar);
    constexpr int kLanes = decltype(lanes)::value;
    const auto kernel = problem.reference_points != nullptr ? forward_kernel<Scalar, kLanes, true>
                                                            : forward_kernel<Scalar, kLanes, false>;
    return launch_tiled<kLanes>(kernel, problem, multiprocessors, stream);
  });
}

}  // namespace ms_deform_attn::cuda
