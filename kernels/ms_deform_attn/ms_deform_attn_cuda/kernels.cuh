// The kernels. A unit (image, query, head) is shared by kLanes neighbouring lanes of a warp, each holding 16 bytes of
// the head's channels, so that the lanes of a unit read a corner of a sample in one coalesced access. What is the same
// for all channels (softmax, position, bilinear weights) is worked out once, one sample per lane, and handed to the
// other lanes.
//
// Every lane of a warp walks through the same levels and rounds of samples, active or not: the exchanges need all of
// them. The file compiles as plain C++ too (see simulation/).

#pragma once

#include "memory.cuh"

namespace ms_deform_attn::cuda {

constexpr int kMaxThreads = 256;
constexpr int kForwardBlocks = 4;   // per multiprocessor: 64 registers a thread
constexpr int kBackwardBlocks = 2;  // 128 registers
constexpr unsigned int kAllLanes = 0xffffffffu;

// ---- Which unit a thread works on ----------------------------------------------------------------------------------

// The queries of self-attention are the tokens of the maps. A block takes a tile of one map with all its heads: what
// neighbouring queries sample overlaps, so the block finds most of it in its multiprocessor's cache. Other queries are
// taken for one map of a single row.
struct QueryMap {
  int height;
  int width;
  int first_query;
  int first_block;
  int tiles_per_row;
};

struct QueryTiles {
  int width_log2;
  int height_log2;
  int maps;
  QueryMap map[kMaxLevels];
};

struct Unit {
  int64_t image;
  int query;
  int head;
  bool active;  // an inactive one is a copy of another and must not write

  __device__ __forceinline__ int64_t index(const Problem& problem) const {
    return (image * problem.queries + query) * problem.heads + head;
  }
};

template <int kLanes, typename Body>
__device__ __forceinline__ void for_each_unit(const Problem& problem, const QueryTiles& tiles, const Body& body) {
  const int block = static_cast<int>(blockIdx.x);
  int map_index = 0;
  while (map_index + 1 < tiles.maps && block >= tiles.map[map_index + 1].first_block) {
    ++map_index;
  }
  const QueryMap map = tiles.map[map_index];
  const int tile = block - map.first_block;
  const int tile_row = tile / map.tiles_per_row;
  const int tile_column = tile - tile_row * map.tiles_per_row;
  const int tile_units = problem.heads << (tiles.width_log2 + tiles.height_log2);
  const int units_at_once = static_cast<int>(blockDim.x) / kLanes;

  for (int64_t image = blockIdx.y; image < problem.batch; image += gridDim.y) {
    for (int first = 0; first < tile_units; first += units_at_once) {
      const int unit = first + static_cast<int>(threadIdx.x) / kLanes;
      const int place = unit / problem.heads;
      const int x = (tile_column << tiles.width_log2) + (place & ((1 << tiles.width_log2) - 1));
      const int y = (tile_row << tiles.height_log2) + (place >> tiles.width_log2);
      const bool active = unit < tile_units && x < map.width && y < map.height;
      if (__any_sync(kAllLanes, active)) {
        const int query = active ? map.first_query + y * map.width + x : map.first_query;
        body(Unit{image, query, unit - place * problem.heads, active});
      }
    }
  }
}

// ---- Among the lanes of a unit -------------------------------------------------------------------------------------

template <int kLanes, typename Number>
__device__ __forceinline__ Number from_lane(Number number, int lane) {
  return __shfl_sync(kAllLanes, number, lane, kLanes);
}

template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float number) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    number += __shfl_xor_sync(kAllLanes, number, distance, kLanes);
  }
  return number;
}

template <int kLanes>
__device__ __forceinline__ float maximum_of_lanes(float number) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    number = fmaxf(number, __shfl_xor_sync(kAllLanes, number, distance, kLanes));
  }
  return number;
}

// ---- Attention weights ---------------------------------------------------------------------------------------------

// Attention weights of one unit: the scores themselves, or (fused) their softmax.
template <int kLanes, Form kForm>
struct Weights {
  static constexpr bool kFused = kForm != Form::kPlain;

  const Problem& problem;
  int64_t first;  // the unit's first sample among all
  int samples;
  float maximum = 0.0f;
  float inverse_sum = 1.0f;

  __device__ __forceinline__ Weights(const Problem& problem, int64_t unit, int lane)
      : problem(problem), first(unit * problem.levels * problem.points), samples(problem.levels * problem.points) {
    if constexpr (kFused) {
      maximum = -INFINITY;
#pragma unroll 1
      for (int sample = lane; sample < samples; sample += kLanes) {
        maximum = fmaxf(maximum, score(sample));
      }
      maximum = maximum_of_lanes<kLanes>(maximum);
    }
  }

  // Makes the weights of the fused form add up to 1; without it they are larger by a common factor.
  __device__ __forceinline__ void normalize(int lane) {
    if constexpr (kFused) {
      float sum = 0.0f;
#pragma unroll 1
      for (int sample = lane; sample < samples; sample += kLanes) {
        sum += (*this)[sample];
      }
      inverse_sum = 1.0f / sum_of_lanes<kLanes>(sum);
    }
  }

  __device__ __forceinline__ float operator[](int sample) const {
    return kFused ? __expf(score(sample) - maximum) * inverse_sum : score(sample);
  }

  __device__ __forceinline__ float score(int sample) const {
    return load_element(problem.scores, first + sample, problem.score_type);
  }
};

// ---- Positions -----------------------------------------------------------------------------------------------------

// The place of a sample in its map, whose pixels have their centres at whole numbers.
struct Place {
  int column;  // of the pixel to the upper left, -1 at least
  int row;
  float right;  // how far to the right of it, 0 to 1
  float down;
  bool on_map;  // near enough to be touched by a pixel; false for what is not a number

  // Corners: left and right in one row, then the same in the row below.
  __device__ __forceinline__ float share(int corner) const {
    return (corner & 1 ? right : 1.0f - right) * (corner & 2 ? down : 1.0f - down);
  }

  // Bit i: corner i is a pixel of the map.
  __device__ __forceinline__ unsigned int corners_on_map(const Level& level) const {
    const unsigned int columns = (column >= 0 ? 5u : 0u) | (column + 1 < level.width ? 10u : 0u);
    const unsigned int rows = (row >= 0 ? 3u : 0u) | (row + 1 < level.height ? 12u : 0u);
    return on_map ? columns & rows : 0u;
  }
};

// The reference of a unit in one level: float2 for a point, float4 for a box.
template <typename Reference>
__device__ __forceinline__ Reference load_reference(const Problem& problem, const Unit& unit, int level_index) {
  const int64_t image = problem.reference_images == 1 ? 0 : unit.image;
  const int reference_level = problem.reference_levels == 1 ? 0 : level_index;
  const int64_t index = (image * problem.queries + unit.query) * problem.reference_levels + reference_level;
  return __ldg(reinterpret_cast<const Reference*>(problem.reference_points) + index);
}

// How many pixels an offset of 1 from the centre of a box is.
__device__ __forceinline__ float2 step_of_box(const Problem& problem, const float4& box, const Level& level) {
  const float share = 0.5f / problem.points;
  return make_float2(box.z * level.width * share, box.w * level.height * share);
}

template <Form kForm>
__device__ __forceinline__ Place find_place(const Problem& problem, const Unit& unit, int level_index,
                                            const Level& level, int64_t sample) {
  const float2 position = load_pair(problem.positions, sample, problem.position_type);
  const float width = static_cast<float>(level.width), height = static_cast<float>(level.height);
  float x, y;
  if constexpr (kForm == Form::kPoints) {
    const float2 reference = load_reference<float2>(problem, unit, level_index);
    x = fmaf(reference.x, width, position.x) - 0.5f;
    y = fmaf(reference.y, height, position.y) - 0.5f;
  } else if constexpr (kForm == Form::kBoxes) {
    const float4 box = load_reference<float4>(problem, unit, level_index);
    const float2 step = step_of_box(problem, box, level);
    x = fmaf(position.x, step.x, fmaf(box.x, width, -0.5f));
    y = fmaf(position.y, step.y, fmaf(box.y, height, -0.5f));
  } else {
    x = fmaf(position.x, width, -0.5f);
    y = fmaf(position.y, height, -0.5f);
  }
  if (!(x > -1.0f && x < width && y > -1.0f && y < height)) {
    return Place{0, 0, 0.0f, 0.0f, false};
  }
  const float column = floorf(x), row = floorf(y);
  return Place{static_cast<int>(column), static_cast<int>(row), x - column, y - row, true};
}

// ---- Forward -------------------------------------------------------------------------------------------------------

// A sample as the forward pass needs it: where its four corners' channels lie, in vectors from the first token, and
// what each counts. A corner beyond the edge has no weight and repeats its neighbour, so that every address is a good
// one. A sample that touches no pixel has a negative first address: weight 0 alone would let a value that is no number
// through.
struct Sample {
  int4 corners;
  float4 factors;
};

__device__ __forceinline__ Sample weigh_corners(const Place& place, const Level& level, int token_stride,
                                                float weight) {
  const unsigned int on_map = place.corners_on_map(level);
  const int left = max(place.column, 0), right = min(place.column + 1, level.width - 1);
  const int top = level.first_token + max(place.row, 0) * level.width;
  const int bottom = level.first_token + min(place.row + 1, level.height - 1) * level.width;
  return Sample{
      make_int4(on_map ? (top + left) * token_stride : -1, (top + right) * token_stride,
                (bottom + left) * token_stride, (bottom + right) * token_stride),
      make_float4(on_map & 1u ? weight * place.share(0) : 0.0f, on_map & 2u ? weight * place.share(1) : 0.0f,
                  on_map & 4u ? weight * place.share(2) : 0.0f, on_map & 8u ? weight * place.share(3) : 0.0f)};
}

template <typename Scalar>
__device__ __forceinline__ void add_corner(const uint4& bits, float factor, float (&sums)[kVectorSize<Scalar>]) {
  float channels[kVectorSize<Scalar>];
  widen(bits, channels, Scalar());
#pragma unroll
  for (int c = 0; c < kVectorSize<Scalar>; ++c) {
    sums[c] = fmaf(factor, channels[c], sums[c]);
  }
}

template <typename Scalar, int kLanes, Form kForm>
__global__ void __launch_bounds__(kMaxThreads, kForwardBlocks)
    forward_kernel(const Problem problem, const QueryTiles tiles) {
  constexpr int kSize = kVectorSize<Scalar>;
  __shared__ Sample shared_samples[kMaxThreads];
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  Sample* const own_sample = shared_samples + threadIdx.x;
  const Sample* const unit_samples = own_sample - lane;

  for_each_unit<kLanes>(problem, tiles, [&](const Unit& unit) {
    const int64_t unit_index = unit.index(problem);
    const Weights<kLanes, kForm> weights(problem, unit_index, lane);

    for (int first_channel = 0; first_channel < problem.head_dim;
         first_channel += kLanes * kSize) {  // once, if not wide
      const bool has_channels = first_channel + lane * kSize < problem.head_dim;
      const int channel = has_channels ? first_channel + lane * kSize : first_channel;
      const uint4* values = static_cast<const uint4*>(problem.value) + unit.image * problem.value_image_stride +
                            unit.head * problem.value_head_stride + channel / kSize;
      float sums[kSize] = {};
      float sum_of_weights = 0.0f;  // of this lane's samples

      for (int level_index = 0; level_index < problem.levels; ++level_index) {
        const Level level = problem.level[level_index];
        for (int first_point = 0; first_point < problem.points; first_point += kLanes) {
          if (first_point + lane < problem.points) {
            const int sample = level_index * problem.points + first_point + lane;
            const float weight = weights[sample];
            sum_of_weights += weight;
            *own_sample = weigh_corners(find_place<kForm>(problem, unit, level_index, level, weights.first + sample),
                                        level, problem.value_token_stride, weight);
          }
          __syncwarp();
          const int count = min(kLanes, problem.points - first_point);
#pragma unroll 4
          for (int i = 0; i < count; ++i) {
            const int4 corners = unit_samples[i].corners;
            if (corners.x >= 0) {
              const float4 factors = unit_samples[i].factors;
              const uint4 bits[4] = {load_vector(values, corners.x), load_vector(values, corners.y),
                                     load_vector(values, corners.z), load_vector(values, corners.w)};
              add_corner<Scalar>(bits[0], factors.x, sums);
              add_corner<Scalar>(bits[1], factors.y, sums);
              add_corner<Scalar>(bits[2], factors.z, sums);
              add_corner<Scalar>(bits[3], factors.w, sums);
            }
          }
          __syncwarp();
        }
      }

      if constexpr (kForm != Form::kPlain) {
        const float scale = 1.0f / sum_of_lanes<kLanes>(sum_of_weights);
#pragma unroll
        for (int c = 0; c < kSize; ++c) {
          sums[c] *= scale;
        }
      }
      if (unit.active && has_channels) {
        Scalar* output = static_cast<Scalar*>(problem.output) + unit_index * problem.head_dim + channel;
        __stcs(reinterpret_cast<uint4*>(output), narrow(sums, Scalar()));
      }
    }
  });
}

// ---- Backward ------------------------------------------------------------------------------------------------------

// Fixed point for the gradient of the value: a sum of `count` products of at most `grad_bound` and `weight_bound`
// stays below 2^61, so that 64-bit integers hold it, in steps far below what float32 would round each addition to.
__device__ __forceinline__ int fixed_point_exponent(const Problem& problem) {
  int grad_exponent, weight_exponent, count_exponent;
  frexpf(*problem.grad_bound, &grad_exponent);
  frexpf(*problem.weight_bound, &weight_exponent);
  frexpf(static_cast<float>(problem.queries) * problem.levels * problem.points, &count_exponent);
  return max(-126, min(126, 61 - grad_exponent - weight_exponent - count_exponent));
}

// Accumulator is float, or int64_t for the order-independent sum.
template <typename Scalar, int kLanes, Form kForm, typename Accumulator>
__global__ void __launch_bounds__(kMaxThreads, kBackwardBlocks)
    backward_kernel(const Problem problem, const QueryTiles tiles) {
  constexpr int kSize = kVectorSize<Scalar>;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int vectors = problem.head_dim / kSize;
  const int64_t grad_token_stride = static_cast<int64_t>(problem.heads) * problem.head_dim;
  float scale = 1.0f;
  if constexpr (sizeof(Accumulator) == 8) {
    scale = ldexpf(1.0f, fixed_point_exponent(problem));
  }

  for_each_unit<kLanes>(problem, tiles, [&](const Unit& unit) {
    const int64_t unit_index = unit.index(problem);
    Weights<kLanes, kForm> weights(problem, unit_index, lane);
    weights.normalize(lane);
    const uint4* values = static_cast<const uint4*>(problem.value) + unit.image * problem.value_image_stride +
                          unit.head * problem.value_head_stride + lane;
    const uint4* grad_outputs = static_cast<const uint4*>(problem.grad_output) + unit_index * vectors + lane;
    Accumulator* grad_values = static_cast<Accumulator*>(problem.grad_sums) +
                               (unit.image * problem.tokens * problem.heads + unit.head) * problem.head_dim;
    const uint4 first_grad_bits = load_if(unit.active && lane < vectors, grad_outputs);
    float weighted_sum = 0.0f;  // of weight * its gradient, over this lane's samples

    for (int level_index = 0; level_index < problem.levels; ++level_index) {
      const Level level = problem.level[level_index];
      const int row_stride = level.width * problem.value_token_stride;

      for (int first_point = 0; first_point < problem.points; first_point += kLanes) {
        const bool owns_sample = first_point + lane < problem.points;
        const int sample = level_index * problem.points + first_point + lane;
        Place own = {0, 0, 0.0f, 0.0f, false};
        float own_weight = 0.0f, own_grad_weight = 0.0f, own_grad_x = 0.0f, own_grad_y = 0.0f;
        if (owns_sample) {
          own = find_place<kForm>(problem, unit, level_index, level, weights.first + sample);
          own_weight = weights[sample];
        }
        const int own_token = level.first_token + own.row * level.width + own.column;  // means nothing off the map
        const unsigned int own_corners = own.corners_on_map(level);

        const int count = min(kLanes, problem.points - first_point);
        for (int owner = 0; owner < count; ++owner) {
          const int first_token = from_lane<kLanes>(own_token, owner);
          const unsigned int corners = from_lane<kLanes>(own_corners, owner);
          const float right = from_lane<kLanes>(own.right, owner), left = 1.0f - right;
          const float down = from_lane<kLanes>(own.down, owner), up = 1.0f - down;
          const float weight = from_lane<kLanes>(own_weight, owner);
          const float shares[4] = {left * up, right * up, left * down, right * down};
          const int first_corner = first_token * problem.value_token_stride;
          float products[4] = {};  // grad_output . corner, over this lane's channels

          for (int vector = 0; vector < vectors; vector += kLanes) {  // once, if the head is not wide
            const bool wanted = unit.active && vector + lane < vectors;
            float grads[kSize];
            widen(vector == 0 ? first_grad_bits : load_if(wanted, grad_outputs + vector), grads, Scalar());

            const bool wanted_corner[4] = {wanted && corners & 1u, wanted && corners & 2u, wanted && corners & 4u,
                                           wanted && corners & 8u};
            const uint4* const corner_values = values + vector + first_corner;
            const uint4 bits[4] = {
                load_if(wanted_corner[0], corner_values),
                load_if(wanted_corner[1], corner_values + problem.value_token_stride),
                load_if(wanted_corner[2], corner_values + row_stride),
                load_if(wanted_corner[3], corner_values + row_stride + problem.value_token_stride),
            };
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float channels[kSize];
              widen(bits[i], channels, Scalar());
#pragma unroll
              for (int c = 0; c < kSize; ++c) {
                products[i] = fmaf(grads[c], channels[c], products[i]);
              }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float factor = weight * shares[i];
              if (wanted_corner[i] && factor != 0.0f) {
                const int64_t token = first_token + (i & 1) + (i & 2 ? level.width : 0);
                add_to(grad_values + token * grad_token_stride, vector + lane, vectors, factor, grads, scale);
              }
            }
          }

          const float grad_weight = sum_of_lanes<kLanes>(shares[0] * products[0] + shares[1] * products[1] +
                                                         shares[2] * products[2] + shares[3] * products[3]);
          const float grad_x =
              sum_of_lanes<kLanes>(up * (products[1] - products[0]) + down * (products[3] - products[2]));
          const float grad_y =
              sum_of_lanes<kLanes>(left * (products[2] - products[0]) + right * (products[3] - products[1]));
          if (lane == owner) {
            own_grad_weight = grad_weight;
            own_grad_x = weight * grad_x;
            own_grad_y = weight * grad_y;
          }
        }

        if (owns_sample && unit.active) {
          if constexpr (kForm == Form::kBoxes) {  // off the map the step may be infinite
            const float2 step = step_of_box(problem, load_reference<float4>(problem, unit, level_index), level);
            own_grad_x = own.on_map ? own_grad_x * step.x : 0.0f;
            own_grad_y = own.on_map ? own_grad_y * step.y : 0.0f;
          }
          if constexpr (kForm != Form::kPlain) {
            weighted_sum = fmaf(own_weight, own_grad_weight, weighted_sum);
            problem.grad_weights[weights.first + sample] = own_grad_weight;
          } else {
            own_grad_x *= level.width;
            own_grad_y *= level.height;
            store_element(problem.grad_scores, weights.first + sample, own_grad_weight, problem.score_type);
          }
          store_element(problem.grad_positions, 2 * (weights.first + sample), own_grad_x, problem.position_type);
          store_element(problem.grad_positions, 2 * (weights.first + sample) + 1, own_grad_y, problem.position_type);
        }
      }
    }

    if constexpr (kForm != Form::kPlain) {  // through the softmax; each lane comes back to the samples it wrote itself
      const float mean = sum_of_lanes<kLanes>(weighted_sum);
      for (int level_index = 0; level_index < problem.levels; ++level_index) {
        for (int point = lane; point < problem.points; point += kLanes) {
          const int sample = level_index * problem.points + point;
          if (unit.active) {
            const float grad = weights[sample] * (problem.grad_weights[weights.first + sample] - mean);
            store_element(problem.grad_scores, weights.first + sample, grad, problem.score_type);
          }
        }
      }
    }
  });
}

// The sums -> the gradient, in the value's type. A bound that is not finite makes all of it not a number.
template <typename Scalar, typename Accumulator>
__global__ void __launch_bounds__(kMaxThreads) finish_kernel(const Problem problem, Scalar* grad_value) {
  constexpr int kSize = kVectorSize<Scalar>;
  float step = 1.0f;
  if constexpr (sizeof(Accumulator) == 8) {
    const bool finite = isfinite(*problem.grad_bound) && isfinite(*problem.weight_bound);
    step = finite ? ldexpf(1.0f, -fixed_point_exponent(problem)) : NAN;
  }
  const int vectors = problem.head_dim / kSize;
  const int64_t all_vectors = problem.batch * problem.tokens * problem.heads * vectors;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < all_vectors; i += threads) {
    const int64_t head = i / vectors;
    const int vector = static_cast<int>(i - head * vectors);
    const Accumulator* sums = static_cast<const Accumulator*>(problem.grad_sums) + head * problem.head_dim;
    float channels[kSize];
#pragma unroll
    for (int c = 0; c < kSize; ++c) {
      channels[c] = static_cast<float>(sums[slot<Accumulator>(vector, vectors, c)]) * step;
    }
    reinterpret_cast<uint4*>(grad_value)[i] = narrow(channels, Scalar());
  }
}

}  // namespace ms_deform_attn::cuda
