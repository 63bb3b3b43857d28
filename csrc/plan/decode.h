// The plan of a GEMM with few tokens on Hopper (cuda/sm90/decode.cuh): host C++, no CUDA, no torch.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "plan/plan.h"

namespace marlin::plan {

struct DecodeTile {
  int tokens, row_tiles, splits, stage_blocks;

  constexpr int rows() const { return 64 * row_tiles; }
  constexpr int stage_k() const { return 64 * stage_blocks; }
  constexpr int consumers() const { return 128 * row_tiles * splits; }
  constexpr int threads() const { return consumers() + 64; }  // and two producer warps

  // A stage in shared memory, with scales every `period` columns; offsets in bytes. The activations
  // come first: their swizzle wants 1024-byte alignment.
  constexpr int input_bytes() const { return tokens * stage_k() * 2; }
  constexpr int weight_bytes() const { return rows() * stage_k() / 2; }
  constexpr int scales_at() const { return input_bytes() + weight_bytes(); }
  constexpr int zeros_at(int period) const {
    return scales_at() + rows() * (stage_k() / period) * 2;
  }
  constexpr int stage_bytes(int period) const {
    return (zeros_at(period) + rows() * (stage_k() / period) + 1023) / 1024 * 1024;
  }

  // The epilogue's fp32 sums [splits][tokens][rows + 4] and the barriers follow the stages. 4 floats
  // of padding spread a fragment's rows over all banks.
  constexpr int sum_stride() const { return rows() + 4; }
  constexpr int sum_bytes() const { return splits * tokens * sum_stride() * 4; }
  constexpr int sums_at(int period) const { return stages(period) * stage_bytes(period); }
  constexpr int barriers_at(int period) const { return sums_at(period) + sum_bytes(); }
  constexpr int shared_bytes(int period) const {
    return barriers_at(period) + kBarrierBytes + kAlignment;
  }

  // As many stages as fit, a multiple of the splits: a slot must always be the same split's.
  static constexpr int kSharedBytes = 227 * 1024;  // that a block may have on sm_90
  static constexpr int kBarrierBytes = 2 * 8 * 16, kAlignment = 1024;
  constexpr int stages(int period) const {
    const int room = kSharedBytes - sum_bytes() - kBarrierBytes - kAlignment;
    const int fit = room / stage_bytes(period) / splits * splits;
    return fit < 16 ? fit : 16;
  }
};

struct DecodeKernel {
  int id;  // its place in the table
  DecodeTile tile;
  int least_tiles;  // of a layer, and
  int least_k;      // its input features, for this kernel to be taken
  const char* reason;
  std::string name() const;
};

std::span<const DecodeKernel> decode_kernels();

struct DecodePlan {
  DecodeKernel kernel;
  int period;            // columns between scales: 32, 64, or 128 for all longer groups
  int row_tiles;         // tiles of the output features
  int cluster;           // blocks that share the k of a tile; where 1, a block does whole tiles
  int stages_per_block;  // of one tile
  int blocks;
};

// Nothing where another kernel must run: too many tokens, or a device or build without wgmma.
std::optional<DecodePlan> select_decode(const Problem& problem);

DecodePlan decode_plan_with(const DecodeKernel& kernel, int cluster, const Problem& problem);

}  // namespace marlin::plan
