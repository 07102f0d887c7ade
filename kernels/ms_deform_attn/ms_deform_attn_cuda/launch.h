// Starts the kernels on a stream. Nothing here waits for the device.

#pragma once

#ifdef MS_DEFORM_ATTN_SIMULATION
#include "simulation/cuda_on_cpu.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "problem.h"

namespace ms_deform_attn::cuda {

// Writes problem.output.
cudaError_t launch_forward(const Problem& problem, int multiprocessors, cudaStream_t stream);

// Writes grad_positions and grad_scores, and adds to grad_sums, in an order of its own (see memory.cuh). If
// `deterministic` these are fixed-point numbers.
cudaError_t launch_backward(const Problem& problem, bool deterministic, int multiprocessors, cudaStream_t stream);

// Writes the value's gradient, in its type, from grad_sums. Where the sums are the gradient already nothing needs to
// run.
bool needs_finish(const Problem& problem, bool deterministic);
cudaError_t launch_finish(const Problem& problem, bool deterministic, void* grad_value, cudaStream_t stream);

}  // namespace ms_deform_attn::cuda
