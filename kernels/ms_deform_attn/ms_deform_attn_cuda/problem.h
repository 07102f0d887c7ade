// What a launch needs to know, free of torch and of CUDA, so that the kernels compile without either.
//
// Names: `tokens` are the rows of the value, map after map; a `level` is one map; a `sample` is one point of one
// level; a `unit` is one (image, query, head), the piece of work that a few lanes of a warp share.

#pragma once

#include <cstdint>

namespace ms_deform_attn::cuda {

constexpr int kMaxLevels = 8;
constexpr int64_t kMaxCount = (int64_t(1) << 30) - 1;  // of queries, samples of a unit, or channels of all heads

// Plain: `positions` are sampling locations and `scores` attention weights, without references. Points and boxes are the
// fused forms: `scores` are logits of a softmax over levels * points, and `positions` offsets. Offsets from a point are
// in pixels; from the centre of a box, they are in units of half its size, divided by the number of points.
enum class Form : int { kPlain = 0, kPoints = 1, kBoxes = 2 };

enum class ElementType : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

struct Level {
  int height;
  int width;
  int first_token;
};

// Pointers are 16-byte aligned and, the value apart, contiguous.
struct Problem {
  int64_t batch;
  int64_t tokens;
  int queries;
  int heads;
  int head_dim;  // a multiple of 8
  int levels;
  int points;
  Level level[kMaxLevels];

  // (batch, tokens, heads, head_dim), channels adjacent; strides in vectors of 16 bytes, an image below 2^31 of them.
  ElementType value_type;
  const void* value;
  int64_t value_image_stride;
  int64_t value_head_stride;
  int value_token_stride;

  Form form;
  const float* reference_points;  // (1 or batch, queries, 1 or levels, 2 or 4): x, y and, for boxes, width, height
  int reference_images;
  int reference_levels;
  ElementType position_type;
  const void* positions;  // (batch, queries, heads, levels, points, 2)
  ElementType score_type;
  const void* scores;  // (batch, queries, heads, levels, points)

  void* output;  // forward: (batch, queries, heads, head_dim) in the value's type

  // Backward.
  const void* grad_output;    // (batch, queries, heads, head_dim) in the value's type
  void* grad_sums;            // (batch, tokens, heads, head_dim), zeros at first; float32, or int64 if deterministic
  void* grad_positions;       // like positions
  void* grad_scores;          // like scores
  float* grad_weights;        // float32 room of the scores' size, may be grad_scores itself; used by the fused forms
  const float* grad_bound;    // deterministic: the largest |grad_output|, on the device
  const float* weight_bound;  // deterministic: no |attention weight| is larger, on the device
};

}  // namespace ms_deform_attn::cuda
