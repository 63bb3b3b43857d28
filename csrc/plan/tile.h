// The geometry of an sm80 tile and its shared memory, the same for the kernel and for the plan.
#pragma once

#include <cstdint>

namespace marlin::plan {

// Columns, here and in everything named k, are those of the activations. A block of a dense weight has
// 64 of them; one of a 2:4 sparse weight stands for 128, with its 64 survivors and 1024 bytes of
// metadata that say which (layout/sparse.h).
struct Tile {
  int tokens, row_blocks, warps_k, k_blocks, stages;
  bool sparse = false;

  constexpr int rows() const { return 64 * row_blocks; }
  constexpr int block_k() const { return sparse ? 128 : 64; }
  constexpr int warp_k() const { return block_k() * k_blocks; }  // of a stage, one warp's share
  constexpr int stage_k() const { return warp_k() * warps_k; }
  constexpr int threads() const { return 128 * warps_k; }

  // A stage in shared memory: weights, metadata, activations, scales, zero points, in this order. There
  // is room for a row of scales every 32 columns, the shortest group.
  constexpr int blocks() const { return warps_k * k_blocks * row_blocks; }
  constexpr int scale_rows() const { return stage_k() / 32; }
  constexpr int weight_bytes() const { return blocks() * 2048; }
  constexpr int meta_bytes() const { return sparse ? blocks() * 1024 : 0; }
  constexpr int input_bytes() const { return tokens * stage_k() * 2; }
  constexpr int scale_bytes() const { return scale_rows() * rows() * 2; }
  constexpr int zero_bytes() const { return scale_rows() * rows(); }
  constexpr int stage_bytes() const {
    return weight_bytes() + meta_bytes() + input_bytes() + scale_bytes() + zero_bytes();
  }

  // The epilogue sums the warps' accumulators through a [tokens][rows + 4] fp32 buffer, at most 32
  // tokens at a time. 4 floats of padding spread a fragment's rows over all banks.
  constexpr int epilogue_tokens() const { return tokens < 32 ? tokens : 32; }
  constexpr int epilogue_stride() const { return rows() + 4; }
  constexpr int epilogue_bytes() const { return epilogue_tokens() * epilogue_stride() * 4; }

  constexpr int shared_bytes() const { return stages * stage_bytes() + epilogue_bytes(); }
};

// How the work of one launch is dealt out. A unit is one stage of one tile; units are numbered tile
// by tile, k fastest, tokens next, rows last; block b does units [b, b + 1) * units_per_block.
struct Partition {
  int row_tiles, token_tiles, units_per_tile;
  int64_t units_per_block;  // fits an int
  int blocks;

  constexpr int64_t tiles() const { return static_cast<int64_t>(row_tiles) * token_tiles; }
  constexpr int64_t units() const { return tiles() * units_per_tile; }
  // Whether some tile is shared by several blocks, which then leave partial sums to be added up.
  constexpr bool splits_tiles() const { return units_per_block % units_per_tile != 0; }

  // The blocks that share a tile, in the order of k: first_block ..= last_block.
  constexpr int64_t first_block(int64_t tile) const {
    return tile * units_per_tile / units_per_block;
  }
  constexpr int64_t last_block(int64_t tile) const {
    return ((tile + 1) * units_per_tile - 1) / units_per_block;
  }
  // A block has room for two partial tiles: slot 0 for the tile it starts in, slot 1 for the one it
  // ends in where that is another. Whatever lies between it does whole.
  constexpr int slot(int64_t block, int64_t tile) const {
    return block * units_per_block / units_per_tile == tile ? 0 : 1;
  }
};

}  // namespace marlin::plan
