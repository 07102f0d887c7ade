// Reading and writing: 16-byte vectors of channels, small tensors whose element type is known at run time only, and
// additions to memory that many threads share.

#pragma once

#ifdef MS_DEFORM_ATTN_SIMULATION
#include "simulation/cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "problem.h"

namespace ms_deform_attn::cuda {

// ---- 16 bytes of channels ------------------------------------------------------------------------------------------

template <typename Scalar>
constexpr int kVectorSize = 16 / static_cast<int>(sizeof(Scalar));

// The vector base[index]. The address is one multiply-add this way; by itself the compiler takes the sum apart into
// four.
__device__ __forceinline__ uint4 load_vector(const uint4* base, int index) {
#ifdef __CUDA_ARCH__
  const uint4* address;
  asm("mad.wide.s32 %0, %1, 16, %2;" : "=l"(address) : "r"(index), "l"(base));
  return __ldg(address);
#else
  return __ldg(base + index);
#endif
}

// The 16 bytes at `address`, or zeros where they are not wanted: nothing is read then. Written as one predicated
// instruction, because around a branch the compiler would wait for each load before it starts the next.
__device__ __forceinline__ uint4 load_if(bool wanted, const uint4* address) {
  uint4 bits = make_uint4(0, 0, 0, 0);
#ifdef __CUDA_ARCH__
  asm("{\n"
      "  .reg .pred wanted;\n"
      "  setp.ne.b32 wanted, %5, 0;\n"
      "  @wanted ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w)
      : "l"(address), "r"(static_cast<int>(wanted)));
#else
  if (wanted) {
    bits = __ldg(address);
  }
#endif
  return bits;
}

__device__ __forceinline__ void widen(const uint4& bits, float (&channels)[4], float) {
  channels[0] = __uint_as_float(bits.x);
  channels[1] = __uint_as_float(bits.y);
  channels[2] = __uint_as_float(bits.z);
  channels[3] = __uint_as_float(bits.w);
}

__device__ __forceinline__ void widen(const uint4& bits, float (&channels)[8], __nv_bfloat16) {
  const unsigned int pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    channels[2 * i] = __uint_as_float(pairs[i] << 16);
    channels[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void widen(const uint4& bits, float (&channels)[8], __half) {
  const unsigned int pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    channels[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(pairs[i])));
    channels[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(pairs[i] >> 16)));
  }
}

__device__ __forceinline__ uint4 narrow(const float (&channels)[4], float) {
  return make_uint4(__float_as_uint(channels[0]), __float_as_uint(channels[1]), __float_as_uint(channels[2]),
                    __float_as_uint(channels[3]));
}

__device__ __forceinline__ unsigned short narrow_one(float number, __nv_bfloat16) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(number));
}

__device__ __forceinline__ unsigned short narrow_one(float number, __half) {
  return __half_as_ushort(__float2half_rn(number));
}

template <typename Scalar>
__device__ __forceinline__ uint4 narrow(const float (&channels)[8], Scalar type) {
  unsigned int pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned int low = narrow_one(channels[2 * i], type);
    const unsigned int high = narrow_one(channels[2 * i + 1], type);
    pairs[i] = low | high << 16;
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// ---- Elements of a type known at run time --------------------------------------------------------------------------
// Positions and scores are read once per sample, not once per channel: a branch that the whole warp takes costs
// little, and saves compiling every kernel for every mix of types.

__device__ __forceinline__ float load_element(const void* data, int64_t index, ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return __ldg(static_cast<const float*>(data) + index);
    case ElementType::kFloat16:
      return __half2float(__ushort_as_half(__ldg(static_cast<const unsigned short*>(data) + index)));
    default:
      return __uint_as_float(static_cast<unsigned int>(__ldg(static_cast<const unsigned short*>(data) + index)) << 16);
  }
}

__device__ __forceinline__ float2 load_pair(const void* data, int64_t index, ElementType type) {
  if (type == ElementType::kFloat32) {
    return __ldg(static_cast<const float2*>(data) + index);
  }
  const unsigned int bits = __ldg(static_cast<const unsigned int*>(data) + index);
  if (type == ElementType::kFloat16) {
    return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(bits))),
                       __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16))));
  }
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

__device__ __forceinline__ void store_element(void* data, int64_t index, float number, ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      static_cast<float*>(data)[index] = number;
      break;
    case ElementType::kFloat16:
      static_cast<unsigned short*>(data)[index] = narrow_one(number, __half());
      break;
    default:
      static_cast<unsigned short*>(data)[index] = narrow_one(number, __nv_bfloat16());
  }
}

// ---- Sums that many threads add to ---------------------------------------------------------------------------------
// The sums of a head do not lie in the order of its channels: what the lanes of a unit add in one instruction lies
// side by side, so that it travels in full 32-byte sectors. float32 is added by fours, 64-bit integers one by one.

template <typename Accumulator>
constexpr int kAddedAtOnce = sizeof(Accumulator) == 4 ? 4 : 1;

// Where in its head's sums channel i of vector `vector` lies. In float32 with vectors of four this is the channel
// itself.
template <typename Accumulator>
__device__ __forceinline__ int slot(int vector, int vectors, int i) {
  constexpr int kAtOnce = kAddedAtOnce<Accumulator>;
  return (i / kAtOnce * vectors + vector) * kAtOnce + i % kAtOnce;
}

// Adds factor * channels to the sums of a head.
template <int kSize>
__device__ __forceinline__ void add_to(float* sums, int vector, int vectors, float factor,
                                       const float (&channels)[kSize], float) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    float* const address = sums + slot<float>(vector, vectors, i);
    const float4 part = make_float4(factor * channels[i], factor * channels[i + 1], factor * channels[i + 2],
                                    factor * channels[i + 3]);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    atomicAdd(reinterpret_cast<float4*>(address), part);
#else
    atomicAdd(address, part.x);
    atomicAdd(address + 1, part.y);
    atomicAdd(address + 2, part.z);
    atomicAdd(address + 3, part.w);
#endif
  }
}

// The same in fixed point. Integers add up to the same sum in any order, which is what makes it deterministic.
template <int kSize>
__device__ __forceinline__ void add_to(int64_t* sums, int vector, int vectors, float factor,
                                       const float (&channels)[kSize], float scale) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const long long steps = __float2ll_rn(factor * channels[i] * scale);
    atomicAdd(reinterpret_cast<unsigned long long*>(sums + slot<int64_t>(vector, vectors, i)),
              static_cast<unsigned long long>(steps));
  }
}

}  // namespace ms_deform_attn::cuda
