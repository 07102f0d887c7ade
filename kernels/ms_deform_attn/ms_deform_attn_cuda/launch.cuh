// From a problem to a launch: tiles, block size, and the kernel compiled for its type and head size.

#pragma once

#include <type_traits>

#include "kernels.cuh"
#include "launch.h"

namespace ms_deform_attn::cuda {

constexpr int kMaxGridHeight = 65535;
constexpr int kLargestTileLog2 = 4;  // 4 x 4 queries
constexpr int kBlocksToFillOne = 4;  // per multiprocessor, before tiles are made smaller

#ifndef MS_DEFORM_ATTN_SIMULATION
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  kernel<<<grid, threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}
#endif

inline int ceil_divide(int a, int b) { return (a + b - 1) / b; }

// Cuts the queries into tiles of 2^tile_log2 and counts the tiles.
inline int cut_into_tiles(const Problem& problem, int tile_log2, QueryTiles& tiles) {
  int64_t map_tokens = 0;
  for (int i = 0; i < problem.levels; ++i) {
    map_tokens += static_cast<int64_t>(problem.level[i].height) * problem.level[i].width;
  }
  const bool queries_are_tokens = map_tokens == problem.queries;
  tiles.maps = queries_are_tokens ? problem.levels : 1;
  tiles.height_log2 = queries_are_tokens ? tile_log2 / 2 : 0;
  tiles.width_log2 = tile_log2 - tiles.height_log2;
  int blocks = 0;
  for (int i = 0; i < tiles.maps; ++i) {
    QueryMap& map = tiles.map[i];
    map.height = queries_are_tokens ? problem.level[i].height : 1;
    map.width = queries_are_tokens ? problem.level[i].width : problem.queries;
    map.first_query = queries_are_tokens ? problem.level[i].first_token : 0;
    map.first_block = blocks;
    map.tiles_per_row = ceil_divide(map.width, 1 << tiles.width_log2);
    blocks += map.tiles_per_row * ceil_divide(map.height, 1 << tiles.height_log2);
  }
  return blocks;
}

// The largest tile (for the cache) that still gives every multiprocessor several blocks.
inline int choose_tiles(const Problem& problem, int multiprocessors, QueryTiles& tiles) {
  int tile_log2 = kLargestTileLog2;
  int blocks = cut_into_tiles(problem, tile_log2, tiles);
  while (tile_log2 > 0 && blocks * problem.batch < static_cast<int64_t>(kBlocksToFillOne) * multiprocessors) {
    blocks = cut_into_tiles(problem, --tile_log2, tiles);
  }
  return blocks;
}

// Calls start(Scalar()) with the value's type.
template <typename Start>
cudaError_t with_type(const Problem& problem, const Start& start) {
  switch (problem.value_type) {
    case ElementType::kFloat32:
      return start(float());
    case ElementType::kFloat16:
      return start(__half());
    default:
      return start(__nv_bfloat16());
  }
}

// Calls start(std::integral_constant<Form, form>()) with the problem's form.
template <typename Start>
cudaError_t with_form(const Problem& problem, const Start& start) {
  switch (problem.form) {
    case Form::kPlain:
      return start(std::integral_constant<Form, Form::kPlain>());
    case Form::kPoints:
      return start(std::integral_constant<Form, Form::kPoints>());
    default:
      return start(std::integral_constant<Form, Form::kBoxes>());
  }
}

// Calls start(Scalar(), lanes) with the smallest power of two of lanes that holds a head, 32 at most.
template <typename Start>
cudaError_t with_type_and_lanes(const Problem& problem, const Start& start) {
  return with_type(problem, [&](auto scalar) {
    const int vectors = problem.head_dim / kVectorSize<decltype(scalar)>;
    if (vectors <= 2) return start(scalar, std::integral_constant<int, 2>());
    if (vectors <= 4) return start(scalar, std::integral_constant<int, 4>());
    if (vectors <= 8) return start(scalar, std::integral_constant<int, 8>());
    if (vectors <= 16) return start(scalar, std::integral_constant<int, 16>());
    return start(scalar, std::integral_constant<int, 32>());
  });
}

template <int kLanes, typename Kernel>
cudaError_t launch_tiled(Kernel kernel, const Problem& problem, int multiprocessors, cudaStream_t stream) {
  QueryTiles tiles = {};
  const int blocks = choose_tiles(problem, multiprocessors, tiles);
  const int64_t tile_threads = static_cast<int64_t>(problem.heads) * kLanes << (tiles.width_log2 + tiles.height_log2);
  const int threads = tile_threads < kMaxThreads ? ceil_divide(static_cast<int>(tile_threads), 32) * 32 : kMaxThreads;
  const dim3 grid(blocks, problem.batch < kMaxGridHeight ? static_cast<int>(problem.batch) : kMaxGridHeight);
  return launch(kernel, grid, threads, stream, problem, tiles);
}

}  // namespace ms_deform_attn::cuda
