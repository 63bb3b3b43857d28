// What an sm80 GEMM kernel is told, and the unit of its work.
#pragma once

#include <cstdint>

#include "plan/tile.h"

namespace marlin::cuda::sm80 {

template <typename Element>
struct Params {
  const Element* input;  // [m, k], rows 16-byte aligned, `input_stride` elements apart
  int64_t input_stride;
  const int32_t* qweight;
  const int32_t* meta;    // of a 2:4 sparse weight
  const Element* scales;  // [groups], rows 16-byte aligned, `scale_stride` elements apart
  const uint8_t* zeros;   // likewise, or null
  int scale_stride;
  const Element* bias;  // or null
  Element* output;
  float* partials;  // [blocks][2][tokens][rows]
  int m, n, k;      // k is a multiple of 8
  int n_blocks, k_blocks;
  int groups, group_shift;  // group of column c: min(c >> group_shift, groups - 1)
  int scale_shift;          // a stage holds a row of scales every 2^scale_shift columns: 5 to 8
  plan::Partition partition;
};

// The kernel's template arguments as a type.
template <int kTokens, int kRowBlocks, int kWarpsK, int kBlocksK, int kStages, bool kSparse>
struct Shape {
  static constexpr plan::Tile kTile{kTokens, kRowBlocks, kWarpsK, kBlocksK, kStages, kSparse};
};

// A unit of work: one stage of one tile.
struct Unit {
  int row_tile, token_tile, stage_of_tile;

  __device__ Unit(const plan::Partition& p, int64_t index) {
    const int64_t tile = index / p.units_per_tile;
    stage_of_tile = static_cast<int>(index - tile * p.units_per_tile);
    row_tile = static_cast<int>(tile / p.token_tiles);
    token_tile = static_cast<int>(tile - int64_t{row_tile} * p.token_tiles);
  }

  __device__ bool ends_tile(const plan::Partition& p) const {
    return stage_of_tile == p.units_per_tile - 1;
  }

  __device__ void advance(const plan::Partition& p) {
    if (++stage_of_tile < p.units_per_tile) return;
    stage_of_tile = 0;
    if (++token_tile < p.token_tiles) return;
    token_tile = 0;
    ++row_tile;
  }
};

}  // namespace marlin::cuda::sm80
