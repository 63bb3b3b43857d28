// What a prefill kernel (prefill.cuh) is told, its shape, and the order of its tiles.
#pragma once

#include "cuda/sm90/layer.h"
#include "cuda/sm90/step.cuh"
#include "layout/sparse.h"
#include "plan/prefill.h"

namespace marlin::cuda::sm90 {

template <typename Element>
struct PrefillParams : LayerParams<Element> {
  int period_log2;               // of the columns between scales: 5, 6 or 7
  int groups_per_block;          // rows of scales from 64 columns of a stage to the next: 0 or 1
  int row_tiles, token_tiles;    // of a cluster
  int runs, pieces_per_cluster;  // of a token tile; row blocks of each. Or, where not 0:
  int token_group;               // clusters do whole tiles, in groups of so many token tiles
  int stages, stages_per_block;
  int k_shares, input_shares;  // blocks of a cluster that share a tile's k, and its activations
  // The outputs {n, m}, for the copy engine, in boxes of 64 features by a tile's tokens; not used where
  // copies_output is false: rows that are no multiple of 16 bytes.
  CUtensorMap output_map;
  bool copies_output;
};

template <int kTokens_, int kRowBlocks_, int kStageBlocks_, int kPeriod_, bool kSparse_>
struct PrefillShape {
  static constexpr plan::PrefillTile kTile{kTokens_, kRowBlocks_, kStageBlocks_, kSparse_};
  static constexpr int kTokens = kTokens_, kStageBlocks = kStageBlocks_;
  static constexpr int kPeriod = kPeriod_;  // 32: columns between scales. 64: or more
  static constexpr bool kSparse = kSparse_;
  static constexpr int kSets = 4 * kStepColumns<kSparse> / kPeriod;  // of scales, for a block
  static constexpr int kRowBlocks = kRowBlocks_, kRows = kTile.rows();
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kStages = kTile.stages(), kStageBytes = kTile.stage_bytes();
  static constexpr int kRowBlockBytes = kStageBlocks * layout::kBytesPerBlock;
  static constexpr int kMetaBytes = kStageBlocks * layout::kMetaBytesPerBlock;  // of a row block
  static constexpr int kInputAt = 0, kWeightsAt = kTile.input_bytes(), kMetaAt = kTile.meta_at();
  static constexpr int kScalesAt = kTile.scales_at(), kZerosAt = kTile.zeros_at();
  static constexpr int kOutputAt = kTile.output_at(), kBarriersAt = kTile.barriers_at();
  static constexpr int kSumStride = kTile.sum_stride();
  // Per thread; together, what the block's threads have at its launch.
  static constexpr int kProducerRegisters = kRowBlocks == 4 ? 32 : 40;
  static constexpr int kConsumerRegisters = kRowBlocks == 4 ? 112 : 232;
  // A stage has one row of scales where they are 128 columns or more apart; and every stage of sparse
  // weights is whole, so that none is multiplied without places.
  static_assert(kTile.stage_k() <= 128 && (!kSparse || kStageBlocks == 1));
  static_assert(kTile.weight_bytes() == kRowBlocks * kRowBlockBytes);
  static_assert(!kSparse || kTile.meta_bytes() == kRowBlocks * kMetaBytes);
  static_assert(kStages >= 3 && kStages <= 16 && kTokens % 16 == 0);
  static_assert(kTokens * kSumStride * 4 <= kOutputAt);
  // Where tensor copies find the outputs of a warpgroup, [kTokens][64], a pattern of the swizzle begins.
  static_assert(kOutputAt % 1024 == 0 && kTokens % 8 == 0 && kTokens <= 256);
};

// Where a block stands in its cluster: `input_shares` neighbours have the same k.
struct ClusterPlace {
  int k_shares, input_shares, rank;

  template <typename Element>
  __device__ explicit ClusterPlace(const PrefillParams<Element>& p)
      : k_shares(p.k_shares),
        input_shares(p.input_shares),
        rank(static_cast<int>(blockIdx.x) % (p.k_shares * p.input_shares)) {}
  __device__ int size() const { return k_shares * input_shares; }
  __device__ int k_rank() const { return rank / input_shares; }
  __device__ int row_rank() const { return rank % input_shares; }
  // The ranks of those that share this block's activations, or its rows.
  __device__ int with_input(int i) const { return k_rank() * input_shares + i; }
  __device__ int with_rows(int i) const { return i * input_shares + row_rank(); }
};

// The tiles of this block's cluster, in turn, and this block's part of each: neighbouring row blocks
// where several share activations, a range of k where several share that. What can be computed is not
// kept: registers are short.
// Few pieces: a run of neighbours within one token tile.
// Many: every so-many-th whole tile of an order in which those that are done at the same time share
// weights and activations, which then come from the L2 cache.
template <typename Element, typename S>
struct TileCursor {
  const PrefillParams<Element>& p;
  int at;  // a piece of a run (row blocks of the first token tile, then of the next), or a tile

  __device__ explicit TileCursor(const PrefillParams<Element>& params) : p(params) {
    at = p.token_group ? cluster() : first_of_run();
  }
  __device__ ClusterPlace place() const { return ClusterPlace(p); }
  __device__ int cluster() const { return static_cast<int>(blockIdx.x) / place().size(); }
  __device__ int first_of_run() const {
    return cluster() / p.runs * p.n_blocks + cluster() % p.runs * p.pieces_per_cluster;
  }
  __device__ int last() const {
    if (p.token_group) return p.row_tiles * p.token_tiles;
    return min(first_of_run() + p.pieces_per_cluster, (cluster() / p.runs + 1) * p.n_blocks);
  }
  __device__ bool valid() const { return at < last(); }
  __device__ void advance() {
    at += p.token_group ? static_cast<int>(gridDim.x) / place().size() : cluster_pieces();
  }
  // Of the group of token tiles that a whole tile is in: its first, and how many it has.
  __device__ int group_first() const { return at / (p.token_group * p.row_tiles) * p.token_group; }
  __device__ int group_size() const { return min(p.token_group, p.token_tiles - group_first()); }
  // Of the cluster's tile: the first row block, and how many there are.
  __device__ int cluster_row_block() const {
    if (!p.token_group) return at % p.n_blocks;
    return at % (p.token_group * p.row_tiles) / group_size() * S::kRowBlocks * p.input_shares;
  }
  __device__ int cluster_pieces() const {
    return min(S::kRowBlocks * p.input_shares,
               p.token_group ? p.n_blocks - cluster_row_block() : last() - at);
  }
  // Of these, the ones before those of a rank.
  __device__ int before(int row_rank) const {
    return (cluster_pieces() * row_rank + p.input_shares - 1) / p.input_shares;
  }
  __device__ int row_block() const { return cluster_row_block() + before(place().row_rank()); }
  __device__ int token() const {
    if (!p.token_group) return at / p.n_blocks * S::kTokens;
    return (group_first() + at % (p.token_group * p.row_tiles) % group_size()) * S::kTokens;
  }
  // What the tile holds: the last of several begins early enough to be full, and does some tokens that
  // the one before it stores.
  __device__ int first_token() const { return max(min(token(), p.m - S::kTokens), 0); }
  __device__ int pieces() const {
    return before(place().row_rank() + 1) - before(place().row_rank());
  }
  __device__ int first_stage() const { return place().k_rank() * p.stages_per_block; }
  __device__ int stages() const { return min(p.stages_per_block, p.stages - first_stage()); }
};

}  // namespace marlin::cuda::sm90
