// The kernels for processors with AVX2, FMA and F16C.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "problem.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace ms_deform_attn::cpu {
namespace avx2 {

#define MS_DEFORM_ATTN_AVX2
constexpr int kLanes = 8;
#include "vectors.inl"
// vectors.inl comes first
#include "kernels.inl"

}  // namespace avx2

const Kernels kAvx2 = {"avx2", avx2::forward, avx2::load_value, avx2::backward, avx2::store_grad_value};

}  // namespace ms_deform_attn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
