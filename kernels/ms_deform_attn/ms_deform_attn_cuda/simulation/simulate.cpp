// The kernels as a plain library for test_simulation.py: g++ -DMS_DEFORM_ATTN_SIMULATION -I.. simulate.cpp

#include "../backward.cu"
#include "../forward.cu"

using ms_deform_attn::cuda::Problem;

extern "C" {

int problem_bytes() { return sizeof(Problem); }

void set_warp_order_seed(unsigned int seed) { cuda_on_cpu::warp_order_seed = seed; }

int forward(const Problem* problem, int multiprocessors) {
  return ms_deform_attn::cuda::launch_forward(*problem, multiprocessors, nullptr);
}

int backward(const Problem* problem, bool deterministic, int multiprocessors) {
  return ms_deform_attn::cuda::launch_backward(*problem, deterministic, multiprocessors, nullptr);
}

int finish(const Problem* problem, bool deterministic, void* grad_value) {
  if (!ms_deform_attn::cuda::needs_finish(*problem, deterministic)) {
    return -1;
  }
  return ms_deform_attn::cuda::launch_finish(*problem, deterministic, grad_value, nullptr);
}
}
