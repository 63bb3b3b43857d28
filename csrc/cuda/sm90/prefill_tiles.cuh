// What a prefill kernel (prefill.cuh) is told, its shape, and the order of its tiles.
#pragma once

#include <type_traits>

#include "cuda/sm90/layer.h"
#include "cuda/sm90/partials.cuh"
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
  int stages;                    // of a tile
  int cluster;                   // blocks, which share activations
  // Where blocks share tiles over memory (S::kRuns): the first so many tiles in equal runs, then every block
  // does so many whole ones; and what they leave (PrefillPartials).
  plan::StageRuns stage_runs;
  int shared_tiles, whole_tiles;
  float* partials;
  uint64_t* partial_flags;
  // The outputs {n, m}, for the copy engine, in boxes of 64 features by a tile's tokens; not used where
  // copies_output is false: rows that are no multiple of 16 bytes.
  CUtensorMap output_map;
  bool copies_output;
};

template <int kTokens_, int kRowBlocks_, int kStageBlocks_, bool kRuns_, int kPeriod_,
          bool kSparse_>
struct PrefillShape {
  static constexpr plan::PrefillTile kTile{kTokens_, kRowBlocks_, kStageBlocks_, kSparse_, kRuns_};
  static constexpr int kTokens = kTokens_, kStageBlocks = kStageBlocks_;
  static constexpr int kPeriod = kPeriod_;  // 32: columns between scales. 64: or more
  static constexpr bool kSparse = kSparse_, kRuns = kRuns_;
  static constexpr int kSets = 4 * kStepColumns<kSparse> / kPeriod;  // of scales, for a block
  static constexpr int kRowBlocks = kRowBlocks_, kRows = kTile.rows();
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kStages = kTile.stages(), kStageBytes = kTile.stage_bytes();
  static constexpr int kRowBlockBytes = kStageBlocks * layout::kBytesPerBlock;
  static constexpr int kMetaBytes = kStageBlocks * layout::kMetaBytesPerBlock;  // of a row block
  static constexpr int kInputAt = 0, kWeightsAt = kTile.input_bytes(), kMetaAt = kTile.meta_at();
  static constexpr int kScalesAt = kTile.scales_at(), kZerosAt = kTile.zeros_at();
  static constexpr int kOutputAt = kTile.output_at(), kBarriersAt = kTile.barriers_at();
  static constexpr int kSumsLeft = 1;  // a barrier of the block
  // Per thread; together, what the block's threads have at its launch.
  static constexpr int kProducerRegisters = kRowBlocks == 4 ? 32 : 40;
  static constexpr int kConsumerRegisters = kRowBlocks == 4 ? 112 : 232;
  // A stage has one row of scales where they are 128 columns or more apart; and every stage of sparse
  // weights is whole, so that none is multiplied without places.
  static_assert(kTile.stage_k() <= 128 && (!kSparse || kStageBlocks == 1));
  static_assert(kTile.weight_bytes() == kRowBlocks * kRowBlockBytes);
  static_assert(!kSparse || kTile.meta_bytes() == kRowBlocks * kMetaBytes);
  static_assert(kStages >= 3 && kStages <= 16 && kTokens % 16 == 0);
  // Where tensor copies find the outputs of a warpgroup, [kTokens][64], a pattern of the swizzle begins.
  static_assert(kOutputAt % 1024 == 0 && kTokens % 8 == 0 && kTokens <= 256);
};

// What a tile holds: the last of several begins early enough to be full, and does some tokens that the one
// before it stores.
template <typename S>
__device__ __forceinline__ int first_token_of(int token, int m) {
  return max(min(token, m - S::kTokens), 0);
}

// The tiles of this block's cluster, in turn, and this block's part of each: neighbouring row blocks
// where several share activations. What can be computed is not kept: registers are short.
// Few pieces: a run of neighbours within one token tile. Many: every so-many-th whole tile.
template <typename Element, typename S>
struct PrefillTileCursor {
  const PrefillParams<Element>& p;
  int at;  // a piece of a run (row blocks of the first token tile, then of the next), or a tile

  __device__ explicit PrefillTileCursor(const PrefillParams<Element>& params) : p(params) {
    at = p.token_group ? cluster() : first_of_run();
  }
  __device__ int cluster() const { return static_cast<int>(blockIdx.x) / p.cluster; }
  __device__ int rank() const { return static_cast<int>(blockIdx.x) % p.cluster; }
  __device__ int first_of_run() const {
    return cluster() / p.runs * p.n_blocks + cluster() % p.runs * p.pieces_per_cluster;
  }
  __device__ int last() const {
    if (p.token_group) return p.row_tiles * p.token_tiles;
    return min(first_of_run() + p.pieces_per_cluster, (cluster() / p.runs + 1) * p.n_blocks);
  }
  __device__ bool valid() const { return at < last(); }
  __device__ void advance() {
    at += p.token_group ? static_cast<int>(gridDim.x) / p.cluster : cluster_pieces();
  }
  __device__ plan::TileOfOrder<PrefillParams<Element>> whole() const { return {p, at}; }
  // Of the cluster's tile: the first row block, and how many there are.
  __device__ int cluster_row_block() const {
    if (!p.token_group) return at % p.n_blocks;
    return whole().row_tile() * S::kRowBlocks * p.cluster;
  }
  __device__ int cluster_pieces() const {
    return min(S::kRowBlocks * p.cluster,
               p.token_group ? p.n_blocks - cluster_row_block() : last() - at);
  }
  // Of these, the ones before those of a rank.
  __device__ int before(int other) const {
    return (cluster_pieces() * other + p.cluster - 1) / p.cluster;
  }
  __device__ int row_block() const { return cluster_row_block() + before(rank()); }
  __device__ int pieces() const { return before(rank() + 1) - before(rank()); }
  __device__ int token() const {
    return (p.token_group ? whole().token_tile() : at / p.n_blocks) * S::kTokens;
  }
  __device__ int first_token() const { return first_token_of<S>(token(), p.m); }
  __device__ int first_stage() const { return 0; }
  __device__ int stages() const { return p.stages; }
};

// A block's tiles where any blocks share some over memory: those of its run, from the last to the first, then every
// so-many-th of the rest. What takes long to compute is kept for a tile.
template <typename Element, typename S>
struct PrefillRunCursor {
  const PrefillParams<Element>& p;
  int at = -1;               // tiles before this one
  int number, first, count;  // of this one; of its stages the block's first, and how many

  __device__ explicit PrefillRunCursor(const PrefillParams<Element>& params) : p(params) {
    advance();
  }
  __device__ static int block() { return static_cast<int>(blockIdx.x); }
  __device__ void advance() {
    const auto run = plan::StageRun::of(p.stage_runs, block());
    if (++at < run.tiles) {
      number = run.last - at;
      first = run.first_stage(number, p.stages);
      count = run.end_stage(number, p.stages) - first;
    } else {
      const int whole = at - run.tiles, blocks = static_cast<int>(gridDim.x);
      number = p.shared_tiles + whole * blocks + block();
      first = 0;
      count = whole < p.whole_tiles ? p.stages : 0;
    }
  }
  __device__ bool valid() const { return count > 0; }
  __device__ int first_stage() const { return first; }
  __device__ int stages() const { return count; }
  __device__ bool sends() const { return first + count < p.stages; }
  __device__ bool gathers() const { return first > 0 && !sends(); }
  __device__ int first_sender() const { return p.stage_runs.first_sender(block(), number); }

  __device__ int rank() const { return 0; }
  __device__ plan::TileOfOrder<PrefillParams<Element>> whole() const { return {p, number}; }
  __device__ int row_block() const { return whole().row_tile() * S::kRowBlocks; }
  __device__ int pieces() const { return min(S::kRowBlocks, p.n_blocks - row_block()); }
  __device__ int token() const { return whole().token_tile() * S::kTokens; }
  __device__ int first_token() const { return first_token_of<S>(token(), p.m); }
};

template <typename Element, typename S>
using PrefillCursor =
    std::conditional_t<S::kRuns, PrefillRunCursor<Element, S>, PrefillTileCursor<Element, S>>;

// What a block leaves of a tile that another stores: [row blocks][tokens / 8][128 threads][4], as threads have
// their sums, and for each row block a flag.
template <typename Element, typename S>
struct PrefillPartials {
  const PrefillParams<Element>& p;

  static_assert(S::kTile.partial_floats() == S::kRowBlocks * (S::kTokens / 8 * 128) * 4);

  __device__ float4* sums(int block, int row_block) const {
    return reinterpret_cast<float4*>(p.partials) +
           (block * S::kRowBlocks + row_block) * (S::kTokens / 8 * 128);
  }
  __device__ uint64_t* flag(int block, int row_block) const {
    return p.partial_flags + block * S::kRowBlocks + row_block;
  }
};

}  // namespace marlin::cuda::sm90
