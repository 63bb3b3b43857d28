// The plan of a GEMM with more than a few tokens on Hopper (cuda/sm90/prefill.cuh): host C++, no CUDA,
// no torch.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "plan/plan.h"
#include "plan/runs.h"

namespace marlin::plan {

struct PrefillTile {
  int tokens, row_blocks, stage_blocks;
  bool sparse = false;  // 2:4: a block of 64 x 64 stored weights covers 128 columns

  static constexpr int kLeastPeriod = 32;  // the least columns between scales

  constexpr int rows() const { return 64 * row_blocks; }
  constexpr int consumers() const { return 128 * row_blocks; }  // a warpgroup per row block
  constexpr int threads() const { return consumers() + 128; }
  constexpr int stage_k() const { return (sparse ? 128 : 64) * stage_blocks; }

  // A stage in shared memory; offsets in bytes. The activations come first: their swizzle wants
  // 1024-byte alignment.
  constexpr int input_bytes() const { return tokens * stage_k() * 2; }
  constexpr int weight_bytes() const { return row_blocks * stage_blocks * 2048; }
  constexpr int meta_at() const { return input_bytes() + weight_bytes(); }
  constexpr int meta_bytes() const { return sparse ? row_blocks * stage_blocks * 1024 : 0; }
  constexpr int scales_at() const { return meta_at() + meta_bytes(); }
  constexpr int zeros_at() const { return scales_at() + rows() * (stage_k() / kLeastPeriod) * 2; }
  constexpr int stage_bytes() const {
    return (zeros_at() + rows() * (stage_k() / kLeastPeriod) + 1023) / 1024 * 1024;
  }

  // After the stages: the finished outputs [rows / 64][tokens][64], on their way to global memory, and
  // the barriers.
  constexpr int output_bytes() const { return tokens * rows() * 2; }
  // That a block leaves of a shared tile.
  constexpr int partial_floats() const { return tokens * rows(); }
  constexpr int stages() const {
    const int room = kSharedBytes - output_bytes() - kBarrierBytes - kAlignment;
    return room / stage_bytes();
  }
  constexpr int output_at() const { return stages() * stage_bytes(); }
  constexpr int barriers_at() const { return output_at() + output_bytes(); }
  constexpr int shared_bytes() const { return barriers_at() + kBarrierBytes + kAlignment; }

  static constexpr int kSharedBytes = 227 * 1024;  // that a block may have on sm_90
  static constexpr int kBarrierBytes = 2 * 8 * 16, kAlignment = 1024;
};

// The order of whole tiles in which those that are done at the same time share weights and activations, which then
// come from the L2 cache: group by group of token tiles, in a group row tile by row tile.
//
//     token tile   0   1   2       3 token tiles, 2 row tiles, groups of two
//     row tile 0   0   1   4
//     row tile 1   2   3   5
// `P`: what has token_group, row_tiles and token_tiles, a plan or what a kernel is told of it.
template <typename P>
struct TileOfOrder {
  const P& p;
  int number;

  constexpr int group() const { return number / (p.token_group * p.row_tiles); }
  constexpr int in_group() const { return number % (p.token_group * p.row_tiles); }
  constexpr int group_size() const {  // in token tiles
    const int left = p.token_tiles - group() * p.token_group;
    return p.token_group < left ? p.token_group : left;
  }
  constexpr int row_tile() const { return in_group() / group_size(); }
  constexpr int token_tile() const { return group() * p.token_group + in_group() % group_size(); }
};
namespace example {  // the picture above
struct Order {
  int token_group, row_tiles, token_tiles;
};
inline constexpr Order kOrder{2, 2, 3};
constexpr bool is_at(int number, int row_tile, int token_tile) {
  const TileOfOrder<Order> tile{kOrder, number};
  return tile.row_tile() == row_tile && tile.token_tile() == token_tile;
}
static_assert(is_at(0, 0, 0) && is_at(1, 0, 1) && is_at(4, 0, 2));
static_assert(is_at(2, 1, 0) && is_at(3, 1, 1) && is_at(5, 1, 2));
}  // namespace example

struct PrefillKernel {
  int id;  // its place in the table
  PrefillTile tile;
  double us_of_stage;  // on an H200, for the model of time
  const char* reason;
  std::string name() const;
};

// For dense weights, or for sparse ones.
std::span<const PrefillKernel> prefill_kernels(bool sparse = false);

// The tiles, in the order of TileOfOrder. Where they go round, each block does every so-many-th, whole. Elsewhere
// blocks share the first tiles, equal runs of stages each of one to two tiles, or less where tiles are fewer than
// blocks; and then do as many whole ones as the others.
//
//     tile      0      1      2      3      4    5    6       7 tiles of 4 stages for 3 blocks: 16 stages shared,
//     block     0000   0011   1112   2222   0    1    2       6, 5 and 5, and then a tile each
struct PrefillPlan {
  PrefillKernel kernel;
  int period;  // columns between scales: 32, 64, or 128 for all longer groups
  int row_tiles, token_tiles, token_group;
  int stages;  // of a tile
  int blocks;
  int shared_tiles;

  constexpr int tiles() const { return row_tiles * token_tiles; }
  constexpr StageRuns stage_runs() const { return StageRuns::of(blocks, shared_tiles, stages); }
  // Where blocks share tiles: the sums that each leaves, and a flag for each row block.
  constexpr int64_t partial_bytes() const {
    if (!stage_runs().share_tiles()) return 0;
    return int64_t{blocks} * (kernel.tile.partial_floats() * 4 + kernel.tile.row_blocks * 8);
  }
};

// The number of a block's whole tile, the `index`-th of them.
constexpr int whole_tile(int shared_tiles, int blocks, int block, int index) {
  return shared_tiles + index * blocks + block;
}

namespace example {  // the picture above
inline constexpr PrefillPlan kSharing = [] {
  PrefillPlan plan{};
  plan.row_tiles = 7, plan.token_tiles = 1, plan.stages = 4, plan.blocks = 3, plan.shared_tiles = 4;
  return plan;
}();
static_assert(kSharing.tiles() == 7 && kSharing.stage_runs().begin(1) == 6);
static_assert(kSharing.stage_runs().begin(2) == 11 && kSharing.stage_runs().begin(3) == 16);
static_assert(whole_tile(4, 3, 1, 0) == 5);
}  // namespace example

// Nothing where another kernel must run: a device or build without wgmma.
std::optional<PrefillPlan> select_prefill(const Problem& problem);

// `shares`: whether blocks share tiles where these do not go round.
PrefillPlan prefill_plan_with(const PrefillKernel& kernel, bool shares, const Problem& problem);

// A model of a plan's time, to compare plans of one problem: microseconds, fitted to an H200. `limit`: power_limit of
// the problem (plan/common.h).
double estimated_us(const PrefillPlan& plan, double limit);

}  // namespace marlin::plan
