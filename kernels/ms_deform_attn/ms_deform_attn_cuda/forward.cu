#include "launch.cuh"

namespace ms_deform_attn::cuda {

cudaError_t launch_forward(const Problem& problem, int multiprocessors, cudaStream_t stream) {
  return with_type_and_lanes(problem, [&](auto scalar, auto lanes) {
    using Scalar = decltype(scalar);
    constexpr int kLanes = decltype(lanes)::value;
    return with_form(problem, [&](auto form) {
      return launch_tiled<kLanes>(forward_kernel<Scalar, kLanes, decltype(form)::value>, problem, multiprocessors,
                                  stream);
    });
  });
}

}  // namespace ms_deform_attn::cuda
