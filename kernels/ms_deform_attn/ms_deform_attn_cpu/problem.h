// What the kernels need to know, free of torch, and the table of kernels that each instruction set provides.
//
// Names: `tokens` are the rows of the value, map after map; a `level` is one map; a `sample` is one point of one level;
// a `unit` is one (image, query, head).

#pragma once

#include <cstdint>

namespace ms_deform_attn::cpu {

constexpr int kMostLanes = 16;  // floats in the widest vector of any instruction set; arrays of samples are padded to it

enum class Type : int { kFloat32, kFloat16, kBfloat16 };

// What all units share, one entry per sample. Entries beyond the last sample make a harmless map of one token.
struct SampleTable {
  const int32_t* level;            // the sample's level
  const int32_t* first_token;      // of the level
  const int32_t* row;              // tokens from one row of the level to the next
  const int32_t *last_x, *last_y;  // width - 1, height - 1
  const float *width, *height;     // of the level
};

struct Problem {
  int64_t images, tokens, queries, heads, head_dim;  // head_dim: a multiple of 8
  int64_t samples, padded_samples;  // levels * points, and that rounded up to kMostLanes
  SampleTable table;

  // (images, tokens, heads, head_dim), channels adjacent; strides in elements.
  Type value_type;
  const void* value;
  int64_t value_image_stride, value_token_stride, value_head_stride;

  // Plain form: `positions` are sampling locations and `scores` attention weights; no reference_points.
  // Fused form: `positions` are offsets and `scores` logits of a softmax over the samples. Offsets from a point are in
  // pixels; from the centre of a box, they are in units of half its size, divided by the number of points.
  bool fused;
  const float* reference_points;  // (1 or images, queries, 1 or levels, 2 or 4): x, y and, for boxes, width, height
  int64_t reference_image_stride, reference_levels, reference_numbers;
  float box_step;  // 0.5 / points
  Type position_type;
  const void* positions;  // (images, queries, heads, samples, 2)
  Type score_type;
  const void* scores;  // (images, queries, heads, samples)

  void* output;  // forward: (images, queries, heads, head_dim) in the value's type

  // Backward.
  const void* grad_output;  // (images, queries, heads, head_dim) in the value's type
  void* grad_value;         // (images, tokens, heads, head_dim) in the value's type
  void* grad_positions;     // like positions
  void* grad_scores;        // like scores
};

// `memory` is room for memory_floats(problem) numbers that no other thread uses meanwhile.
struct Kernels {
  const char* name;

  // Writes the output of all heads of the given queries, counted through all images.
  void (*forward)(const Problem& problem, int64_t first_query, int64_t last_query, float* memory);

  // Copies one head of one image of the value to (tokens, head_dim) float32: rows a power of two apart would share
  // few of the cache's sets.
  void (*load_value)(const Problem& problem, int64_t image, int64_t head, float* rows);

  // Writes the gradients of positions and scores of the given queries of one head of one image; adds the gradient of
  // `value` to `grad_value`, both (tokens, head_dim) float32.
  void (*backward)(const Problem& problem, int64_t image, int64_t head, int64_t first_query, int64_t last_query,
                   const float* value, float* grad_value, float* memory);

  // Writes the sum of `count` buffers, (tokens, head_dim) float32 each, into one head of problem.grad_value.
  void (*store_grad_value)(const Problem& problem, int64_t image, int64_t head, const float* const* buffers,
                           int64_t count, int64_t first_token, int64_t last_token);
};

inline int64_t memory_floats(const Problem& problem) {
  const int64_t arrays = 4 + (8 + 5) + 3 + 3;  // frame, samples, copies, gradients
  return arrays * problem.padded_samples + problem.head_dim + kMostLanes;
}

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace ms_deform_attn::cpu
