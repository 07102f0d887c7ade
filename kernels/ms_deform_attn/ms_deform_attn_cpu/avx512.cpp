// The kernels for processors with AVX512 F, BW, DQ and VL.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "problem.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace ms_deform_attn::cpu {
namespace avx512 {

#define MS_DEFORM_ATTN_AVX2
#define MS_DEFORM_ATTN_AVX512
constexpr int kLanes = 16;
#include "vectors.inl"
// vectors.inl comes first
#include "kernels.inl"

}  // namespace avx512

const Kernels kAvx512 = {"avx512", avx512::forward, avx512::load_value, avx512::backward, avx512::store_grad_value};

}  // namespace ms_deform_attn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
