// The kernels for any processor.

#include <cstdint>
#include <type_traits>
#include <utility>

#include "problem.h"

namespace ms_deform_attn::cpu {
namespace baseline {

constexpr int kLanes = 4;
#include "vectors.inl"
// vectors.inl comes first
#include "kernels.inl"

}  // namespace baseline

const Kernels kBaseline = {"baseline", baseline::forward, baseline::load_value, baseline::backward, baseline::store_grad_value};

}  // namespace ms_deform_attn::cpu
