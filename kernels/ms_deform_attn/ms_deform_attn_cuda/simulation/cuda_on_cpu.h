// The part of CUDA that the kernels use, for a CPU: a slow but faithful run of their logic where there is no GPU.
//
// The lanes of a warp are contexts of their own on one thread, and run one after the other up to the next exchange
// among lanes (shuffle, vote, __syncwarp); there every lane must arrive, or the program stops, as a GPU would hang or
// go wrong. Warps run in an order drawn from `warp_order_seed`, so that what depends on the order shows.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

struct dim3 {
  unsigned int x, y, z;
  explicit dim3(unsigned int x, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }

// ---- Numbers -------------------------------------------------------------------------------------------------------

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct __half {
  unsigned short bits;
};
struct __nv_bfloat16 {
  unsigned short bits;
};

inline float __uint_as_float(unsigned int bits) { return same_bits<float>(bits); }
inline unsigned int __float_as_uint(float number) { return same_bits<unsigned int>(number); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half number) { return number.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 number) { return number.bits; }
inline float __half2float(__half number) { return static_cast<float>(same_bits<_Float16>(number.bits)); }
inline __half __float2half_rn(float number) { return {same_bits<unsigned short>(static_cast<_Float16>(number))}; }

inline __nv_bfloat16 __float2bfloat16_rn(float number) {
  const unsigned int bits = __float_as_uint(number);
  if (std::isnan(number)) {
    return {0x7fff};
  }
  return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline long long __float2ll_rn(float number) {
  return std::fabs(number) < 0x1p63f ? std::llrint(number)
         : std::isnan(number)        ? INT64_MIN
         : number > 0                ? INT64_MAX
                                     : INT64_MIN;
}

inline float __expf(float number) { return std::exp(number); }
using std::isfinite;

// ---- Memory --------------------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    std::fprintf(stderr, "misaligned read of %zu bytes\n", sizeof(T));
    std::abort();
  }
  return *address;
}

template <typename T>
void __stcs(T* address, const T& what) {
  *address = what;
}

template <typename T>
void atomicAdd(T* address, T what) {
  *address += what;
}

// ---- Threads -------------------------------------------------------------------------------------------------------

inline dim3 threadIdx(0), blockIdx(0), blockDim(1), gridDim(1);

namespace cuda_on_cpu {

inline unsigned int warp_order_seed = 0;

class Warp {
 public:
  static constexpr int kLanes = 32;
  static constexpr size_t kStackBytes = 128 << 10;

  Warp() : stacks_(kLanes * kStackBytes) {}

  // Runs `thread` once per lane, as the threads first_thread, first_thread + 1, ...
  void run(int first_thread, int lanes, const std::function<void()>& thread) {
    current_ = this;
    thread_ = &thread;
    lanes_ = lanes;
    for (int lane = 0; lane < lanes; ++lane) {
      finished_[lane] = false;
      exchanges_[lane] = 0;
      getcontext(&contexts_[lane]);
      contexts_[lane].uc_stack.ss_sp = stacks_.data() + lane * kStackBytes;
      contexts_[lane].uc_stack.ss_size = kStackBytes;
      contexts_[lane].uc_link = &scheduler_;
      makecontext(&contexts_[lane], &Warp::enter, 0);
    }
    while (true) {
      for (lane_ = 0; lane_ < lanes; ++lane_) {
        threadIdx.x = first_thread + lane_;
        swapcontext(&scheduler_, &contexts_[lane_]);
      }
      if (std::all_of(finished_, finished_ + lanes, [](bool finished) { return finished; })) {
        return;
      }
      for (int lane = 1; lane < lanes; ++lane) {
        if (finished_[lane] != finished_[0] || kinds_[lane] != kinds_[0]) {
          std::fprintf(stderr, "lanes 0 and %d of a warp have parted at an exchange\n", lane);
          std::abort();
        }
      }
    }
  }

  // Leaves `bits` for the other lanes, waits for them, and takes what lane `source` left.
  static uint64_t exchange(char kind, uint64_t bits, int source) {
    Warp& warp = *current_;
    const int lane = warp.lane_;
    const int slot = warp.exchanges_[lane]++ % 2;  // the next exchange may begin before all lanes have read this one
    warp.slots_[slot][lane] = bits;
    warp.kinds_[lane] = kind;
    swapcontext(&warp.contexts_[lane], &warp.scheduler_);
    return source < warp.lanes_ ? warp.slots_[slot][source] : 0;
  }

  static int lane() { return current_->lane_; }
  static int lanes() { return current_->lanes_; }
  static uint64_t left_by(int lane) {  // in the exchange that has just ended
    return current_->slots_[(current_->exchanges_[current_->lane_] - 1) % 2][lane];
  }

 private:
  static void enter() {
    (*current_->thread_)();
    current_->finished_[current_->lane_] = true;
  }

  static inline Warp* current_ = nullptr;
  const std::function<void()>* thread_ = nullptr;
  std::vector<char> stacks_;
  ucontext_t scheduler_, contexts_[kLanes];
  bool finished_[kLanes];
  char kinds_[kLanes];
  int exchanges_[kLanes];
  uint64_t slots_[2][kLanes];
  int lane_ = 0, lanes_ = 0;
};

}  // namespace cuda_on_cpu

template <typename Number>
Number __shfl_sync(unsigned int, Number number, int source, int width) {
  const int lane = cuda_on_cpu::Warp::lane();
  const uint64_t bits = same_bits<unsigned int>(number);
  const int from = lane / width * width + source % width;
  return same_bits<Number>(static_cast<unsigned int>(cuda_on_cpu::Warp::exchange('s', bits, from)));
}

template <typename Number>
Number __shfl_xor_sync(unsigned int, Number number, int distance, int width) {
  const int lane = cuda_on_cpu::Warp::lane();
  return __shfl_sync(0, number, (lane % width) ^ distance, width);
}

inline bool __any_sync(unsigned int, bool vote) {
  cuda_on_cpu::Warp::exchange('v', vote, 0);
  bool any = false;
  for (int lane = 0; lane < cuda_on_cpu::Warp::lanes(); ++lane) {
    any = any || cuda_on_cpu::Warp::left_by(lane) != 0;
  }
  return any;
}

inline void __syncwarp() { cuda_on_cpu::Warp::exchange('b', 0, 0); }

namespace ms_deform_attn::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t,
                   const Arguments&... arguments) {
  struct Start {
    unsigned int x, y;
    int first_thread;
  };
  std::vector<Start> starts;
  for (unsigned int y = 0; y < grid.y; ++y) {
    for (unsigned int x = 0; x < grid.x; ++x) {
      for (int first_thread = 0; first_thread < threads; first_thread += cuda_on_cpu::Warp::kLanes) {
        starts.push_back({x, y, first_thread});
      }
    }
  }
  if (cuda_on_cpu::warp_order_seed != 0) {
    std::shuffle(starts.begin(), starts.end(), std::mt19937(cuda_on_cpu::warp_order_seed));
  }
  static cuda_on_cpu::Warp warp;
  gridDim = grid;
  blockDim = dim3(threads);
  for (const Start& start : starts) {
    blockIdx = dim3(start.x, start.y);
    warp.run(start.first_thread, std::min(threads - start.first_thread, cuda_on_cpu::Warp::kLanes),
             [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

}  // namespace ms_deform_attn::cuda
